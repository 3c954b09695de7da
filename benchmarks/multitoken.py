"""The tables of docs/multitoken.md, from a store that `atlas wild` and `atlas multitoken` filled.

    python -m benchmarks.multitoken --store atlas-store [--plot docs/images/multitoken.png]

The path of a circuit is the strongest one from a later root back to an activation at an earlier token of the
span, along stored edges between the circuit's nodes: the largest product of weight / pre-activation.
"""

import click
import pandas as pd

import atlas
import queries
from atlas.cli import store_option
from atlas.store import Store

RATES = (0.05, 0.1, 0.2)
BEST = 10


def survivors(store: Store) -> str:
    """How many candidates survive at which false discovery rate, and what ablation says of them."""
    found = store.read(
        "MATCH (m:MultiToken) RETURN m.form AS form, m.q_value AS q, m.crossing_weight AS weight, m.null_mean AS null, "
        "m.shuffled_mean AS shuffled, m.lost AS lost, m.lost_random AS random"
    )
    lines = ["| | candidates | " + " | ".join(f"q <= {rate}" for rate in RATES) + " |", "|---" * (len(RATES) + 2) + "|"]
    for form in ("span", "chain"):
        of = found[found["form"] == form]
        lines.append(f"| {form}s | {len(of)} | " + " | ".join(str((of["q"] <= rate).sum()) for rate in RATES) + " |")
    lines += ["", "| median of | crossing_weight | null | shuffled | lost | lost at random |", "|---" * 6 + "|"]
    groups = [(f"all {form}s", found["form"] == form) for form in ("span", "chain")]
    groups += [(f"{form}s at q <= 0.1", (found["form"] == form) & (found["q"] <= 0.1)) for form in ("span", "chain")]
    for name, rows in groups:
        medians = found.loc[rows, ["weight", "null", "shuffled", "lost", "random"]].astype(float).median()
        lines.append(f"| {name} ({rows.sum()}) | " + " | ".join(_number(value) for value in medians) + " |")
    return "\n".join(lines)


def best(store: Store) -> str:
    """The best circuits: lowest q, then largest crossing_weight over its null; one a phrase."""
    found = store.read(
        "MATCH (p:Prompt)-[:HAS_CIRCUIT]->(m:MultiToken) RETURN m.id AS id, m.form AS form, m.prompt AS prompt, "
        "m.text AS text, m.start AS start, m.end AS end, m.crossing_weight AS weight, m.null_mean AS null, "
        "m.null_sd AS sd, m.null_n AS n, m.p_value AS p, m.q_value AS q, m.shuffled_mean AS shuffled, "
        "m.shuffled_n AS orders, m.lost AS lost, m.lost_random AS random, m.n_ablated AS ablated, "
        "m.n_nodes AS nodes, m.n_shared AS shared"
    )
    found["over"] = found["weight"] - found["null"].astype(float).fillna(0)
    found = found.sort_values(["q", "over"], ascending=[True, False]).drop_duplicates("text").head(BEST)
    return "\n\n".join(_described(store, number, row) for number, row in enumerate(found.itertuples(index=False), 1))


def _described(store: Store, number: int, m) -> str:  # type: ignore[no-untyped-def]
    roots = store.read(
        "MATCH (m:Circuit {id: $id})-[r:ROOT]->(n)-[:OF]->(f) RETURN f.id AS feature, n.position AS position, "
        "n.name AS name, n.value AS value ORDER BY r.order",
        id=m.id,
    )
    tokens = store.read(
        "MATCH (t:Token {prompt: $prompt}) RETURN t.position AS position, t.text AS text ORDER BY position",
        prompt=m.prompt,
    )
    near = [(p, text) for p, text in tokens.itertuples(index=False, name=None) if m.start - 14 <= p <= m.end + 6 and p]
    context = "".join("[[" * (p == m.start) + text + "]]" * (p == m.end) for p, text in near)
    features = list(dict.fromkeys(roots["feature"]))
    lines = [
        f"### {number}. {' '.join(m.text.split())} ({m.form}, {', '.join(features)})",
        "",
        f"> {_plain(context)}",
        "",
        f"- crossing_weight {_number(m.weight)}; other features there {_number(m.null)} (sd {_number(m.sd)}, {m.n} "
        f"draws), p {m.p:.3f}, q {m.q:.3f}; tokens shuffled {_number(m.shuffled)} ({m.orders} orders)",
        f"- without {_count(m.ablated)} features at the first token the later roots lose {_number(m.lost)}; without "
        f"as many others {_number(m.random)}",
        f"- {m.nodes} nodes, {m.shared} of them shared; path: {path(store, m)}",
    ]
    for feature in features:
        top = queries.prompts_of(store, feature, limit=4)
        shown = [_plain(_marked(text)) for text in top["text"]]
        lines.append(f"- {feature} fires most on: " + "; ".join(f"`{text}`" for text in shown))
    return "\n".join(lines)


def path(store: Store, m) -> str:  # type: ignore[no-untyped-def]
    """The strongest path from the last root back to an activation at an earlier token, and why its head looks."""
    edges = store.read(
        "MATCH (m:Circuit {id: $id})-[:INCLUDES]->(a)-[e:DIRECT|OV]->(b)<-[:INCLUDES]-(m) WHERE a:Activation "
        "RETURN a.id AS a, b.id AS b, e.weight / b.pre_activation AS share, e.layer AS layer, e.head AS head, "
        "a.position AS position",
        id=m.id,
    )
    into = {node: rows for node, rows in edges.groupby("b")}
    roots = store.read("MATCH (m:Circuit {id: $id})-[r:ROOT]->(n) RETURN n.id AS id ORDER BY r.order", id=m.id)
    last = roots["id"].iloc[-1]
    nodes = store.read("MATCH (m:Circuit {id: $id})-[:INCLUDES]->(n) RETURN n.id AS id, n.name AS name", id=m.id)
    names = dict(nodes.itertuples(index=False, name=None))
    share, steps = _strongest(last, into, m.start, m.end)
    if not steps:
        return "no stored path of edges leads to an earlier token's activation"
    words, looks = names[last], []
    for source, layer, head in steps:
        words += f" ← {names[source]}" if pd.isna(head) else f" ←L{int(layer)}.H{int(head)}— {names[source]}"
    target = last
    for source, layer, head in steps:
        if not pd.isna(head):
            looks += _look(store, m.prompt, target, source, int(layer), int(head))
        target = source
    return f"{words} (share {_number(share)})" + "".join(f"; {look}" for look in looks)


def _strongest(node: str, into, start: int, end: int) -> tuple[float, list[tuple[str, float, float]]]:  # type: ignore[no-untyped-def]
    """The largest product of shares from `node` back to an activation at a token before its own in the span."""
    own = int(node.split("/")[1])
    best: tuple[float, list[tuple[str, float, float]]] = (0.0, [])
    if node not in into:
        return best
    for a, _, share, layer, head, position in into[node].itertuples(index=False, name=None):
        if start <= position < end and position < own:
            rest: tuple[float, list[tuple[str, float, float]]] = (1.0, [])
        elif position == own:
            rest = _strongest(a, into, start, end)
            if not rest[1]:
                continue
        else:
            continue
        if share * rest[0] > best[0]:
            best = (share * rest[0], [(a, layer, head), *rest[1]])
    return best


def _look(store: Store, prompt: str, target: str, source: str, layer: int, head: int) -> list[str]:
    """The pair of nodes that most makes a head look where the path goes, if its score was taken apart."""
    query, key = target.split("/")[1], source.split("/")[1]
    pair = store.read(
        "MATCH (s:AttentionScore {id: $id}) MATCH (k:CircuitNode {prompt: s.prompt, position: s.key})-[e:QK]->(q) "
        "WHERE e.layer = s.layer AND e.head = s.head AND q.position = s.query "
        "RETURN k.name AS key, q.name AS query, e.score AS score, e.lift AS lift, s.pattern AS pattern "
        "ORDER BY lift DESC, score DESC LIMIT 1",
        id=f"{prompt}/{layer}.{head}/{query}-{key}",
    )
    return [
        f"L{layer}.H{head} looks there (pattern {_number(r.pattern)}) most of all by {r.query} "
        f"(lift {_number(r.lift)}), with {r.key} (score {_number(r.score)})"
        for r in pair.itertuples(index=False)
    ]


def _marked(text: str) -> str:
    """What stands around the first mark of a text."""
    at = text.find("«")
    return text[max(0, at - 40) : at + 60]


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "/")


def _number(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.2f}"


def _count(value: float | None) -> str:
    return "0" if value is None or pd.isna(value) else str(int(value))


def plot(store: Store, file: str) -> None:
    """Every candidate: its crossing_weight against its null, and what its ablation takes against the random one's."""
    import matplotlib.pyplot as plt

    found = store.read(
        "MATCH (m:MultiToken) RETURN m.form AS form, m.crossing_weight AS weight, m.null_mean AS null, "
        "m.null_sd AS sd, m.lost AS lost, m.lost_random AS random"
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    for form, color in (("span", "tab:blue"), ("chain", "tab:orange")):
        of = found[found["form"] == form].drop(columns="form").astype(float)
        style = {"fmt": "o", "ms": 4, "alpha": 0.6, "color": color, "elinewidth": 0.5}
        left.errorbar(of["null"], of["weight"], xerr=of["sd"], label=f"{form}s ({len(of)})", **style)
        right.scatter(of["random"], of["lost"], s=16, alpha=0.6, color=color, label=f"{form}s")
    for axis, x, y in (
        (left, "null: other features on the same tokens (bars: sd)", "crossing_weight"),
        (right, "as many other features of that token", "lost without the first token's own"),
    ):
        axis.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


@click.command()
@store_option
@click.option("--plot", "file", metavar="FILE", help="Also draw all candidates into a PNG.")
def main(store: str | None, file: str | None) -> None:
    """Print the tables as Markdown."""
    with atlas.connect(store, create=False) as opened:
        click.echo(survivors(opened) + "\n\n" + best(opened))
        if file:
            plot(opened, file)


if __name__ == "__main__":
    main()
