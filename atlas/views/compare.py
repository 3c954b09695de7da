"""The picture of two circuits over each other: what both have, what only A has, what only B has.

In one prompt, nodes are the same where their ids are: the picture has the prompt's tokens across. In two
prompts a feature is the same at any position: its attributions are summed, an edge's share is the sum of
its weights over the sum of its targets' pre-activations, and the columns are the three parts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from atlas.store import Store
from atlas.views.circuit import Row, Stored, attributed, stored, summary
from atlas.views.picture import (
    KINDS,
    Column,
    Edge,
    Head,
    Node,
    Picture,
    caption,
    facts,
    number,
    percent,
    place,
    row_name,
    text,
)

PARTS = {"a": "only A", "both": "in both", "b": "only B"}


@dataclass
class _Merged:
    """The nodes of one circuit that count as one; `share` of the root, `whole` their pre-activations' sum."""

    row: Row
    share: float = 0.0
    whole: float = 0.0
    tokens: list[str] = field(default_factory=list[str])
    root: bool = False


@dataclass
class _Flow:
    """The edges between two such nodes: their weights by head; -1 where no head carries it."""

    weights: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])


@dataclass(frozen=True)
class _Side:
    """One of the two circuits."""

    name: str
    nodes: dict[str, _Merged]
    flows: dict[tuple[str, str], _Flow]


def picture(store: Store, a: str, b: str) -> Picture:
    """The picture of circuits `a` and `b`, by id; raises AtlasError where the store lacks one."""
    one, other = stored(store, a), stored(store, b)
    same = one.circuit["prompt"] == other.circuit["prompt"]
    left, right = _side("A", one, same), _side("B", other, same)
    keys = sorted({*left.nodes, *right.nodes})
    rows = [(left.nodes.get(key) or right.nodes[key]).row for key in keys]
    places = {
        place(row["layer"], row["site"], row["kind"]): row_name(row["layer"], row["site"], row["kind"]) for row in rows
    }
    order = sorted(places)
    positions = sorted({*one.tokens, *(row["position"] for row in rows)}) if same else []
    marked = {m.row["position"] for side in (left, right) for m in side.nodes.values() if m.root}
    columns = [Column(one.tokens.get(p, ""), p in marked) for p in positions] or [Column(n) for n in PARTS.values()]
    nodes = [
        _node(left, right, key, order.index(place(row["layer"], row["site"], row["kind"])), positions)
        for key, row in zip(keys, rows, strict=True)
    ]
    at = {key: i for i, key in enumerate(keys)}
    edges = [_edge(left, right, pair, at) for pair in sorted({*left.flows, *right.flows})]
    return Picture(
        title=f"A: {a} and B: {b}",
        prompts=[one.prompt, other.prompt],
        lines=[f"A: {summary(one)}", f"B: {summary(other)}"],
        columns_are="tokens" if same else "parts",
        columns=columns,
        rows=[places[where] for where in order],
        nodes=nodes,
        edges=edges,
        strength="share of target",
        size="share of root",
        percent=True,
        empty="These circuits have no nodes.",
        looks={},
        parts={part: f"{name} ({sum(n.part == part for n in nodes)})" for part, name in PARTS.items()},
    )


def _side(name: str, one: Stored, same: bool) -> _Side:
    keys = {id: id if same else _key(one, node) for id, node in one.nodes.items()}
    nodes: dict[str, _Merged] = {}
    for id, node in one.nodes.items():
        merged = nodes.setdefault(keys[id], _Merged(node))
        merged.share += attributed(one, node)
        merged.whole += number(node["pre_activation"]) or 0.0
        merged.tokens.append(one.tokens.get(node["position"], ""))
        merged.root = merged.root or id in one.roots
    flows: dict[tuple[str, str], _Flow] = {}
    for edge in one.edges:
        weights = flows.setdefault((keys[edge["source"]], keys[edge["target"]]), _Flow()).weights
        head = (edge["layer"], edge["head"])
        weights[head] = weights.get(head, 0.0) + edge["weight"]
    return _Side(name, nodes, flows)


def _key(one: Stored, node: Row) -> str:
    """What a node is, wherever it stands."""
    if text(node["feature"]):
        return node["feature"]
    if node["kind"] == "Embedding":
        return f"embedding {one.tokens.get(node['position'], '')}"
    if node["kind"] in ("Error", "Bias"):
        return f"{node['kind']} {node['layer']} {node['site']}"
    return f"{node['kind']} {node['name']}"


def _part(left: Iterable[object], right: Iterable[object], key: object) -> str:
    return "both" if key in left and key in right else "a" if key in left else "b"


def _node(left: _Side, right: _Side, key: str, row: int, positions: list[int]) -> Node:
    part = _part(left.nodes, right.nodes, key)
    in_a, in_b = left.nodes.get(key), right.nodes.get(key)
    shown = in_a or right.nodes[key]
    node = shown.row
    token = node["kind"] == "Embedding" and not positions
    name = node["name"] if positions or token else node["name"].partition(" @")[0]
    return Node(
        name=name,
        caption=shown.tokens[0] if token else caption(name, text(node["label"])),
        kind=node["kind"],
        row=row,
        column=positions.index(node["position"]) if positions else list(PARTS).index(part),
        size=max((m.share for m in (in_a, in_b) if m), key=abs),
        facts=facts(
            ("kind", KINDS.get(node["kind"], node["kind"])),
            ("part", PARTS[part]),
            ("gives to the root of A", in_a and percent(in_a.share)),
            ("gives to the root of B", in_b and percent(in_b.share)),
            ("change", percent(in_b.share - in_a.share) if in_a and in_b else None),
            ("in A at", None if positions or not in_a else " ".join(f"“{t}”" for t in in_a.tokens)),
            ("in B at", None if positions or not in_b else " ".join(f"“{t}”" for t in in_b.tokens)),
            ("feature", text(node["feature"])),
        ),
        label=text(node["label"]),
        root=any(m.root for m in (in_a, in_b) if m),
        part=part,
        url=text(node["url"]),
    )


def _edge(left: _Side, right: _Side, pair: tuple[str, str], at: dict[str, int]) -> Edge:
    shares = {side.name: _shares(side, pair) for side in (left, right) if pair in side.flows}
    totals = {name: sum(by_head.values()) for name, by_head in shares.items()}
    most = max(totals.values(), key=abs)
    heads = [
        Head(f"{name} L{layer}.H{head} {percent(share)}")
        for name, by_head in shares.items()
        for (layer, head), share in sorted(by_head.items(), key=lambda item: -abs(item[1]))
        if head >= 0
    ]
    return Edge(
        source=at[pair[0]],
        target=at[pair[1]],
        strength=abs(most),
        negative=most < 0,
        text=", ".join(f"{name} {percent(total)}" for name, total in totals.items()),
        heads=heads,
        part=_part(left.flows, right.flows, pair),
    )


def _shares(side: _Side, pair: tuple[str, str]) -> dict[tuple[int, int], float]:
    whole = side.nodes[pair[1]].whole
    return {head: weight / whole if whole else 0.0 for head, weight in side.flows[pair].weights.items()}
