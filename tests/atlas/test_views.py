"""Pictures: what they hold against the records they come from, and their pages in a real headless Chromium."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from atlas.errors import AtlasError
from atlas.records import CircuitRecord, PromptRecord
from atlas.schema import prepare
from atlas.store import Store, connect
from atlas.views import circuit, compare, map
from atlas.views.page import page
from atlas.views.picture import Column, Edge, Head, Look, Node, Picture
from atlas.writer import register, write_prompt
from tests.synthetic import synthetic_model, synthetic_prompt, synthetic_run

HOSTILE = "\"'`</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u2028\u202e\n\\u003c${1}"
SHOWN = "\"'`</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\\u2028\\u202e\\n\\u003c${1}"
Open = Callable[[str | Picture], Page]


def fill(store: Store, *prompts: PromptRecord) -> None:
    register(store, synthetic_model(), synthetic_run())
    for prompt in prompts:
        write_prompt(store, prompt, "run-1")


def members(prompt: PromptRecord, of: CircuitRecord) -> dict[str, float]:
    """Attribution by node, straight from the record."""
    return {prompt.nodes[m].id: a for m, a in zip(of.members.tolist(), of.attribution.tolist(), strict=True)}


def shares(prompt: PromptRecord, of: CircuitRecord) -> dict[tuple[str, str], float]:
    """Share of the target by pair of the circuit's nodes, all heads together, straight from the record."""
    inside, found = set(of.members.tolist()), dict[tuple[str, str], float]()
    for edges in (prompt.direct, prompt.ov):
        for s, t, w in zip(edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True):
            if s in inside and t in inside:
                pair = (prompt.nodes[s].id, prompt.nodes[t].id)
                found[pair] = found.get(pair, 0.0) + w / (prompt.nodes[t].pre_activation or 0.0)
    return found


# ---------------------------------------------------------------- what the pictures hold


def test_a_circuit_as_a_picture(store: Store) -> None:
    prompt = synthetic_prompt(3)
    fill(store, prompt)
    of = prompt.circuits[-1]
    drawn = circuit.picture(store, of.id)
    given = members(prompt, of)
    order = sorted(given)
    assert [n.size for n in drawn.nodes] == pytest.approx([given[id] / of.root_value for id in order])
    assert [n.root for n in drawn.nodes] == [id == prompt.nodes[of.root].id for id in order]
    assert [c.name for c in drawn.columns] == list(prompt.token_texts)
    by_id = {n.id: n for n in prompt.nodes}
    assert [drawn.columns[n.column].name for n in drawn.nodes] == [prompt.token_texts[by_id[i].position] for i in order]
    found = {(order[e.source], order[e.target]): -e.strength if e.negative else e.strength for e in drawn.edges}
    assert found == pytest.approx(shares(prompt, of))
    assert drawn.rows == [
        r for r in ("embeddings", "L0 attn", "L0 mlp", "L1 attn", "L1 mlp", "logits") if r in drawn.rows
    ]


def test_behind_a_head_stand_its_score_and_its_strongest_pairs(store: Store) -> None:
    prompt = synthetic_prompt(3)
    fill(store, prompt)
    drawn = circuit.picture(store, prompt.circuits[-1].id)
    s, qk = prompt.scores, prompt.qk
    scored = list(zip(*(a.tolist() for a in (s.layer, s.head, s.query, s.key, s.score)), strict=True))
    assert drawn.looks
    assert {h.look for e in drawn.edges for h in e.heads if h.look} == set(drawn.looks)
    for layer, head, query, key, score in scored:
        look = drawn.looks.get(f"{layer}.{head}/{query}-{key}")
        if look is None:
            continue
        assert f"score {score:.3g}" in look.text
        pairs = [
            (value, prompt.nodes[v].name, prompt.nodes[u].name)
            for v, u, la, h, value in zip(
                *(a.tolist() for a in (qk.source, qk.target, qk.layer, qk.head, qk.score)), strict=True
            )
            if (la, h, prompt.nodes[u].position, prompt.nodes[v].position) == (layer, head, query, key)
        ]
        pairs.sort(key=lambda pair: -abs(pair[0]))
        assert len(look.pairs) == len(pairs)
        for said, (value, key_name, query_name) in zip(look.pairs, pairs, strict=True):
            assert said.startswith(f"{value:+.3g}: {query_name} with {key_name} (lift")


def test_two_circuits_of_a_prompt_compared(store: Store) -> None:
    prompt = synthetic_prompt(3)
    fill(store, prompt)
    a, b = prompt.circuits[0], prompt.circuits[-1]
    drawn = compare.picture(store, a.id, b.id)
    in_a, in_b = members(prompt, a), members(prompt, b)
    order = sorted(in_a | in_b)
    parts = ["both" if id in in_a and id in in_b else "a" if id in in_a else "b" for id in order]
    assert [n.part for n in drawn.nodes] == parts
    assert set(parts) == {"both", "a", "b"}
    of_a, of_b = shares(prompt, a), shares(prompt, b)
    found = {(order[e.source], order[e.target]): e for e in drawn.edges}
    assert set(found) == set(of_a) | set(of_b)
    for pair, edge in found.items():
        assert edge.part == ("both" if pair in of_a and pair in of_b else "a" if pair in of_a else "b")
        assert edge.strength == pytest.approx(abs(of_a.get(pair, of_b.get(pair, 0.0))))
    assert list(drawn.parts.values()) == [
        f"only A ({parts.count('a')})",
        f"in both ({parts.count('both')})",
        f"only B ({parts.count('b')})",
    ]


def test_circuits_of_two_prompts_meet_in_their_features(store: Store) -> None:
    first, second = synthetic_prompt(3), synthetic_prompt(4)
    fill(store, first, second)
    a, b = first.circuits[-1], second.circuits[-1]
    drawn = compare.picture(store, a.id, b.id)

    def features(prompt: PromptRecord, of: CircuitRecord) -> dict[str, float]:
        found: dict[str, float] = {}
        by_id = {n.id: n for n in prompt.nodes}
        for id, given in members(prompt, of).items():
            if by_id[id].dictionary:
                feature = f"{by_id[id].dictionary}/{by_id[id].index}"
                found[feature] = found.get(feature, 0.0) + given / of.root_value
        return found

    of_a, of_b = features(first, a), features(second, b)
    nodes = {dict(n.facts)["feature"]: n for n in drawn.nodes if "feature" in dict(n.facts)}
    assert set(nodes) == set(of_a) | set(of_b)
    assert set(of_a) & set(of_b)
    for feature, node in nodes.items():
        assert node.part == ("both" if feature in of_a and feature in of_b else "a" if feature in of_a else "b")
        assert abs(node.size) == pytest.approx(max(abs(of_a.get(feature, 0)), abs(of_b.get(feature, 0))))
    assert [column.name for column in drawn.columns] == ["only A", "in both", "only B"]


def test_the_map_counts_the_prompts_of_every_edge(store: Store) -> None:
    prompts = [synthetic_prompt(seed) for seed in (3, 4, 5)]
    fill(store, *prompts)
    counted: dict[tuple[str, str], dict[int, set[str]]] = {}
    for p in prompts:
        for edges, heads in ((p.direct, itertools.repeat(-1)), (p.ov, p.ov.head.tolist())):
            for s, t, head in zip(edges.source.tolist(), edges.target.tolist(), heads, strict=False):
                u, v = p.nodes[s], p.nodes[t]
                if u.dictionary and v.dictionary:
                    pair = (f"{u.dictionary}/{u.index}", f"{v.dictionary}/{v.index}")
                    counted.setdefault(pair, {}).setdefault(head, set()).add(p.id)
    drawn = map.picture(store)
    ids = [dict(n.facts)["feature"] for n in drawn.nodes]
    most = {pair: max(map_len(heads)) for pair, heads in counted.items()}
    assert {(ids[e.source], ids[e.target]): e.strength for e in drawn.edges} == most
    few = map.picture(store, edges=5)
    assert sum(len(e.heads) or 1 for e in few.edges) == 5
    assert min(e.strength for e in few.edges) == sorted(len(p) for h in counted.values() for p in h.values())[-5]


def map_len(heads: dict[int, set[str]]) -> list[int]:
    return [len(prompts) for prompts in heads.values()]


def test_an_unknown_circuit_and_an_empty_store(store: Store) -> None:
    with pytest.raises(AtlasError, match="There is no circuit 'no/such'"):
        circuit.picture(store, "no/such")
    assert map.picture(store).nodes == []


# ---------------------------------------------------------------- pages in a browser


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Picture]:
    """Pictures of all three kinds, of a store in which every text is hostile."""
    prompt, other = synthetic_prompt(3), synthetic_prompt(4)
    hostile = [
        replace(
            p,
            text=HOSTILE,
            task=HOSTILE,
            token_texts=tuple(HOSTILE for _ in p.token_texts),
            nodes=tuple(n._replace(name=f"{n.name}{HOSTILE}") for n in p.nodes),
        )
        for p in (prompt, other)
    ]
    set_texts = "MATCH (f:Feature) SET f.label = $hostile, f.url = 'javascript:window.hacked=1'"
    with connect(tmp_path_factory.mktemp("views") / "store") as store:
        prepare(store)
        fill(store, *hostile)
        first, last = prompt.circuits[0].id, prompt.circuits[-1].id
        plain = circuit.picture(store, last)
        store.write(lambda transaction: transaction.run(set_texts, hostile=HOSTILE).consume())
        return {
            "unlabelled": plain,
            "circuit": circuit.picture(store, last),
            "compare": compare.picture(store, first, last),
            "compare prompts": compare.picture(store, last, other.circuits[-1].id),
            "map": map.picture(store),
        }


@pytest.fixture
def open_page(browser: Browser, pictures: dict[str, Picture], tmp_path: Path) -> Iterator[Open]:
    """Opens a picture's page; at the end no error was on the console, and nothing but the page was asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    wrong: list[str] = []

    def opened(picture: str | Picture) -> Page:
        file = tmp_path / "page.html"
        file.write_text(page(pictures[picture] if isinstance(picture, str) else picture), encoding="utf-8")
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: wrong.append(dialog.message))
        tab.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
        tab.goto(file.as_uri())
        return tab

    yield opened
    context.close()
    assert [said for said in wrong if not said.startswith("blob:")] == []


def small() -> Picture:
    """A logit driven by an attention feature and, negatively, by an error; an embedding feeds it over two heads."""
    nodes = [
        Node("logit Paris", "Paris", "Logit", 2, 1, 1.0, [("kind", "logit"), ("gives", "100.0%")], root=True),
        Node("L0 attn 7 @ is", "capitals", "Attn", 1, 1, 0.6, [("kind", "attention feature")], label="capitals"),
        Node("embedding @ France", "embedding", "Embedding", 0, 0, 0.5, [("kind", "token embedding")]),
        Node("L0 attn error @ is", "attn error", "Error", 1, 1, -0.1, [("kind", "reconstruction error")]),
    ]
    heads = [Head("L0.H1 40.0%, attends 0.9", "look"), Head("L0.H0 10.0%")]
    return Picture(
        title="small",
        prompts=[[(" France", False), (" is", True)]],
        lines=["value 1"],
        columns_are="tokens",
        columns=[Column(" France"), Column(" is", True)],
        rows=["embeddings", "L0 attn", "logits"],
        nodes=nodes,
        edges=[
            Edge(1, 0, 0.6, False, "60.0%", []),
            Edge(3, 0, 0.1, True, "-10.0%", []),
            Edge(2, 1, 0.5, False, "50.0%", heads),
        ],
        strength="share of target",
        size="share of root",
        percent=True,
        empty="",
        looks={"look": Look("L0.H1 from is to France: score 3", ["+2: is with France"])},
        parts={},
    )


def node(tab: Page, name: str) -> Locator:
    return tab.locator(f'svg g[role=button][aria-label^="{name}"]')


@pytest.mark.browser
@pytest.mark.parametrize("name", ["circuit", "compare", "compare prompts", "map", "unlabelled"])
def test_no_text_acts_in_a_page(open_page: Open, pictures: dict[str, Picture], name: str) -> None:
    tab = open_page(name)
    drawn = pictures[name]
    expect(tab.locator("svg g.nodes > g")).to_have_count(len(drawn.nodes))
    for chosen in ("g.nodes > g >> nth=0", "g.nodes > g >> nth=-1"):
        tab.locator(chosen).focus()
        tab.keyboard.press("Enter")
        expect(tab.locator("aside h2")).not_to_be_empty()
    expect(tab.locator("body")).to_contain_text(SHOWN)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("script").count() == 3
    assert tab.locator("img").count() == tab.locator("aside a").count() == 0
    assert tab.evaluate("d3.version") == "7.9.2"


@pytest.mark.browser
def test_the_policy_stops_a_script_that_got_into_the_page(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page(small()), encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    )
    assert tab.evaluate("window.hacked") is None
    tab.close()


@pytest.mark.browser
def test_everything_by_keyboard(open_page: Open) -> None:
    tab = open_page(small())
    tab.locator("#search").focus()
    for _ in range(20):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.getAttribute('role')") == "button":
            break
    expect(node(tab, "logit Paris")).to_be_focused()
    expect(tab.locator("aside h2")).to_have_text("logit Paris")
    tab.keyboard.press("ArrowDown")
    expect(node(tab, "L0 attn 7")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(node(tab, "L0 attn 7")).to_have_attribute("aria-pressed", "true")
    tab.keyboard.press("ArrowRight")
    expect(node(tab, "L0 attn error")).to_be_focused()
    expect(tab.locator("aside h2")).to_have_text("L0 attn 7 @ is")
    tab.keyboard.press("ArrowUp")
    expect(node(tab, "logit Paris")).to_be_focused()
    tab.keyboard.press("Escape")
    expect(node(tab, "L0 attn 7")).to_have_attribute("aria-pressed", "false")
    expect(tab.locator("aside h2")).to_have_count(0)
    assert tab.evaluate("getComputedStyle(document.activeElement.querySelector('.ring')).stroke") != "none"


@pytest.mark.browser
def test_the_card_tells_edges_heads_and_what_made_them_look(open_page: Open) -> None:
    tab = open_page(small())
    node(tab, "L0 attn 7").hover()
    card = tab.locator("aside")
    expect(card).to_contain_text("“capitals”")
    expect(card.locator("h3")).to_have_text(["Driven by 1", "Drives 1"])
    expect(card.locator("li > .amount")).to_have_text(["50.0%", "60.0%"])
    expect(card.locator("summary")).to_have_text("L0.H1 40.0%, attends 0.9")
    expect(card.locator(".head")).to_have_text("L0.H0 10.0%")
    node(tab, "L0 attn 7").click()
    card.locator("summary").click()
    expect(card.locator("details p")).to_be_visible()
    expect(card.locator("details li")).to_have_text("+2: is with France")
    card.get_by_role("button", name="embedding @ France").click()
    expect(card.locator("h2")).to_have_text("embedding @ France")
    tab.locator("svg rect.back").click(position={"x": 2, "y": 2})
    expect(card.locator("h2")).to_have_count(0)


@pytest.mark.browser
def test_filters_and_search(open_page: Open) -> None:
    tab = open_page(small())
    counts = tab.locator("#counts")
    expect(counts).to_have_text("4 of 4 nodes, 3 of 3 edges")
    tab.locator("#edges-from").fill("100")
    expect(counts).to_have_text("4 of 4 nodes, 1 of 3 edges")
    tab.locator("#edges-from").fill("0")
    tab.locator("#nodes-from").fill("50")
    expect(counts).to_have_text("3 of 4 nodes, 2 of 3 edges")
    tab.locator("#nodes-from").fill("0")
    tab.get_by_label("token embeddings").uncheck()
    expect(counts).to_have_text("3 of 4 nodes, 2 of 3 edges")
    tab.get_by_label("token embeddings").check()
    tab.locator("#from").select_option("L0 attn")
    expect(counts).to_have_text("3 of 4 nodes, 2 of 3 edges")
    tab.locator("#from").select_option("embeddings")
    tab.locator("#search").fill("capitals attn")
    expect(counts).to_have_text("4 of 4 nodes, 3 of 3 edges, 1 found")
    expect(tab.locator("g.node.found")).to_have_count(1)
    tab.locator("#search").press("Enter")
    expect(node(tab, "L0 attn 7")).to_be_focused()


@pytest.mark.browser
def test_a_thousand_nodes_and_five_thousand_edges(open_page: Open) -> None:
    """All are drawn and inside the window at first, and the page answers to a zoom and to a slider."""
    rows, columns = 25, 20
    nodes = [
        Node(f"node {i}", f"n{i}", "MLP", i % rows, (i * 7) % columns, 1 / (1 + i), [("kind", "MLP feature")])
        for i in range(1000)
    ]
    edges = [Edge(i % 1000, (i * 31 + 1) % 1000, 1 / (1 + i), i % 3 == 0, "1%", []) for i in range(5000)]
    large = replace(
        small(),
        nodes=nodes,
        edges=edges,
        rows=[f"L{i}" for i in range(rows)],
        columns=[Column(f"token {i}") for i in range(columns)],
    )
    tab = open_page(large)
    expect(tab.locator("#counts")).to_have_text("1000 of 1000 nodes, 300 of 5000 edges")
    tab.locator("#edges-from").fill("0")
    expect(tab.locator("#counts")).to_have_text("1000 of 1000 nodes, 5000 of 5000 edges")
    box = tab.locator(".figure").bounding_box()
    assert box is not None
    for i in range(0, 1000, 97):
        at = tab.locator("g.nodes > g").nth(i).bounding_box()
        assert at is not None
        assert box["x"] <= at["x"] <= box["x"] + box["width"]
        assert box["y"] <= at["y"] <= box["y"] + box["height"]
    before = tab.locator("g.world").get_attribute("transform")
    tab.get_by_role("button", name="Zoom in").click()
    expect(tab.locator("g.world")).not_to_have_attribute("transform", before or "")


@pytest.mark.browser
def test_light_and_dark(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(small()), encoding="utf-8")
    seen: list[str] = []
    for scheme in ("light", "dark"):
        tab = browser.new_page(color_scheme=scheme)
        tab.goto(file.as_uri())
        seen.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        tab.close()
    assert seen == ["rgb(255, 255, 255)", "rgb(22, 24, 29)"]


@pytest.mark.browser
def test_an_empty_picture_says_so(open_page: Open) -> None:
    tab = open_page(replace(small(), nodes=[], edges=[], rows=[], columns=[], empty="Nothing is here yet."))
    expect(tab.get_by_text("Nothing is here yet.")).to_be_visible()
