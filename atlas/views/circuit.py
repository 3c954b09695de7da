"""The picture of one circuit: tokens across, layers upward, a node's area its |attribution| to the root.

An edge's share is its weight over its target's pre-activation p_v, summed over the heads that carry it;
behind each head of an OV edge stand the QK pairs that make the head look from target to source.
"""

from dataclasses import dataclass
from typing import Any, cast

import pandas as pd

from atlas.errors import AtlasError
from atlas.store import Store
from atlas.views.picture import (
    KINDS,
    Column,
    Edge,
    Head,
    Look,
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

PAIRS = 8  # most QK pairs shown of one head's look
Row = dict[str, Any]

_CIRCUIT = """
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit {id: $circuit})
RETURN p.id AS prompt, p.text AS text, p.task AS task, c.rule AS rule, c.threshold AS threshold,
       c.root_value AS root_value, c.completeness AS completeness, c.error_share AS error_share,
       c.pruned_share AS pruned_share, c.faithfulness AS faithfulness, c.necessity AS necessity
"""
_TOKENS = "MATCH (:Prompt {id: $prompt})-[:HAS_TOKEN]->(t:Token) RETURN t.position AS position, t.text AS text"
_ROOTS = "MATCH (:Circuit {id: $circuit})-[:ROOT]->(n:CircuitNode) RETURN n.id AS id"
_NODES = """
MATCH (:Circuit {id: $circuit})-[given:INCLUDES]->(n:CircuitNode)
OPTIONAL MATCH (n)-[:OF]->(f:Feature)
RETURN n.id AS id, n.name AS name, [l IN labels(n) WHERE NOT l IN ['CircuitNode', 'Activation']][0] AS kind,
       n.layer AS layer, n.site AS site, n.position AS position, given.attribution AS attribution,
       n.value AS value, n.pre_activation AS pre_activation, n.constant AS constant, n.unstored AS unstored,
       n.norm AS norm, n.logit AS logit, n.probability AS probability,
       f.id AS feature, f.label AS label, f.url AS url, f.density AS density
ORDER BY id
"""
_EDGES = """
MATCH (c:Circuit {id: $circuit})-[:INCLUDES]->(s:CircuitNode)-[e:DIRECT|OV]->(t:CircuitNode)<-[:INCLUDES]-(c)
RETURN s.id AS source, t.id AS target, coalesce(e.layer, -1) AS layer, coalesce(e.head, -1) AS head,
       e.pattern AS pattern, e.weight AS weight
ORDER BY source, target, layer, head
"""
_LOOKS = """
MATCH (a:AttentionScore {prompt: $prompt})
RETURN a.layer AS layer, a.head AS head, a.query AS query, a.key AS key, a.score AS score, a.unstored AS unstored
"""
_PAIRS = """
MATCH (k:CircuitNode {prompt: $prompt})-[e:QK]->(q:CircuitNode)
RETURN e.layer AS layer, e.head AS head, q.position AS query, k.position AS key,
       q.name AS query_name, k.name AS key_name, e.score AS score, e.lift AS lift
"""


@dataclass(frozen=True)
class Stored:
    """A circuit as it is stored: its properties, tokens by position, nodes by id, edges, and whole prompt's QK.

    `whole` is what attributions are shares of: the value of the root, or of all roots together.
    """

    id: str
    circuit: Row
    tokens: dict[int, str]
    roots: set[str]
    nodes: dict[str, Row]
    edges: list[Row]
    looks: list[Row]
    pairs: list[Row]
    whole: float

    @property
    def prompt(self) -> list[tuple[str, bool]]:
        """The prompt's text in runs, the roots' tokens marked."""
        marked = {self.nodes[root]["position"] for root in self.roots if root in self.nodes}
        first = min(self.tokens, default=0)
        return [
            (token, position in marked)
            for position, token in sorted(self.tokens.items())
            # a token that was put before the text is none of it
            if position > first or str(self.circuit["text"]).startswith(token)
        ]


def stored(store: Store, circuit: str) -> Stored:
    """Read one circuit; raises AtlasError where the store has none of that id."""
    found = rows_of(store.read(_CIRCUIT, circuit=circuit))
    if not found:
        raise AtlasError(f"There is no circuit {circuit!r} in the store; `atlas query circuits` lists them.")
    prompt = found[0]["prompt"]
    nodes = {row["id"]: row for row in rows_of(store.read(_NODES, circuit=circuit))}
    roots = {row["id"] for row in rows_of(store.read(_ROOTS, circuit=circuit))}
    values = [number(nodes[root]["pre_activation"]) or 0.0 for root in roots if root in nodes]
    return Stored(
        id=circuit,
        circuit=found[0],
        tokens={row["position"]: row["text"] for row in rows_of(store.read(_TOKENS, prompt=prompt))},
        roots=roots,
        nodes=nodes,
        edges=rows_of(store.read(_EDGES, circuit=circuit)),
        looks=rows_of(store.read(_LOOKS, prompt=prompt)),
        pairs=rows_of(store.read(_PAIRS, prompt=prompt)),
        whole=number(found[0]["root_value"]) or sum(values),
    )


def picture(store: Store, circuit: str) -> Picture:
    """The picture of the circuit of that id; raises AtlasError where there is none."""
    one = stored(store, circuit)
    places = sorted({place(n["layer"], n["site"], n["kind"]) for n in one.nodes.values()})
    names = {
        place(n["layer"], n["site"], n["kind"]): row_name(n["layer"], n["site"], n["kind"]) for n in one.nodes.values()
    }
    marked = {one.nodes[root]["position"] for root in one.roots if root in one.nodes}
    positions = sorted({*one.tokens, *(n["position"] for n in one.nodes.values())})
    at = {id: i for i, id in enumerate(one.nodes)}
    edges = [
        Edge(at[source], at[target], abs(share), share < 0, percent(share), heads)
        for source, target, share, heads in drawn_edges(one)
    ]
    return Picture(
        title=f"Circuit {circuit}",
        prompts=[one.prompt],
        lines=[summary(one)],
        columns_are="tokens",
        columns=[Column(one.tokens.get(p, ""), p in marked) for p in positions],
        rows=[names[where] for where in places],
        nodes=[
            Node(
                name=n["name"],
                caption=caption(n["name"], text(n["label"])),
                kind=n["kind"],
                row=places.index(place(n["layer"], n["site"], n["kind"])),
                column=positions.index(n["position"]),
                size=attributed(one, n),
                facts=_card(one, n),
                label=text(n["label"]),
                root=n["id"] in one.roots,
                url=text(n["url"]),
            )
            for n in one.nodes.values()
        ],
        edges=edges,
        strength="share of the target",
        size="share of the root",
        percent=True,
        empty="This circuit has no nodes.",
        looks=_looks(one),
        parts={},
    )


def attributed(one: Stored, node: Row) -> float:
    """The node's attribution as a share of the root's value; 0 where either is not known."""
    given = number(node["attribution"])
    return given / one.whole if given is not None and one.whole else 0.0


def drawn_edges(one: Stored) -> list[tuple[str, str, float, list[Head]]]:
    """Source, target, share of all heads together, and the heads, the strongest first."""
    shares: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for edge in one.edges:
        whole = number(one.nodes[edge["target"]]["pre_activation"])
        share = edge["weight"] / whole if whole else 0.0
        shares.setdefault((edge["source"], edge["target"]), []).append((share, edge))
    known = {_look_key(row) for row in one.looks}
    found: list[tuple[str, str, float, list[Head]]] = []
    for (source, target), ways in shares.items():
        ways.sort(key=lambda way: -abs(way[0]))
        heads = [_head(one, share, edge, known) for share, edge in ways if edge["head"] >= 0]
        found.append((source, target, sum(share for share, _ in ways), heads))
    return found


def _head(one: Stored, share: float, edge: Row, known: set[str]) -> Head:
    attends = number(edge["pattern"])
    look = f"{edge['layer']}.{edge['head']}/{_position(one, edge['target'])}-{_position(one, edge['source'])}"
    name = f"L{edge['layer']}.H{edge['head']} {percent(share)}"
    return Head(name if attends is None else f"{name}, attends {attends:.2g}", look if look in known else None)


def _position(one: Stored, node: str) -> int:
    return one.nodes[node]["position"]


def _looks(one: Stored) -> dict[str, Look]:
    """For every (head, query, key) that an edge of the circuit runs through: its score and strongest pairs."""
    used = {
        f"{e['layer']}.{e['head']}/{_position(one, e['target'])}-{_position(one, e['source'])}"
        for e in one.edges
        if e["head"] >= 0
    }
    pairs: dict[str, list[Row]] = {}
    for pair in one.pairs:
        pairs.setdefault(_look_key(pair), []).append(pair)
    looks: dict[str, Look] = {}
    for row in one.looks:
        key = _look_key(row)
        if key in used:
            strongest = sorted(pairs.get(key, []), key=lambda pair: -abs(pair["score"]))[:PAIRS]
            looks[key] = Look(_look(one, row), [_pair(pair) for pair in strongest])
    return looks


def _look_key(row: Row) -> str:
    return f"{row['layer']}.{row['head']}/{row['query']}-{row['key']}"


def _look(one: Stored, row: Row) -> str:
    query, key = (one.tokens.get(row[end], "") for end in ("query", "key"))
    left = number(row["unstored"])
    rest = "" if left is None else f", {left:+.3g} of it in weaker pairs"
    return f"L{row['layer']}.H{row['head']} from “{query}” to “{key}”: score {row['score']:.3g}{rest}"


def _pair(row: Row) -> str:
    lift = number(row["lift"])
    lifts = "" if lift is None else f" (lift {lift:+.3g})"
    return f"{row['score']:+.3g}: {row['query_name']} with {row['key_name']}{lifts}"


def summary(one: Stored) -> str:
    """What the circuit explains, in one line."""
    shares = [
        (name, number(one.circuit[key]))
        for name, key in (
            ("explained", "completeness"),
            ("errors", "error_share"),
            ("pruned", "pruned_share"),
            ("faithfulness", "faithfulness"),
            ("necessity", "necessity"),
        )
    ]
    said = [f"{name} {percent(share)}" for name, share in shares if share is not None]
    rule = f"{one.circuit['rule']} at {number(one.circuit['threshold']) or 0:g}" if text(one.circuit["rule"]) else ""
    task = f"task {one.circuit['task']}" if text(one.circuit["task"]) else ""
    counts = f"value {one.whole:.4g}"
    return " · ".join(part for part in (counts, *said, rule, task) if part)


def _card(one: Stored, node: Row) -> list[tuple[str, str]]:
    given = number(node["attribution"])
    gives = None if given is None else f"{percent(attributed(one, node))} ({given:.4g})"
    return facts(
        ("kind", KINDS.get(node["kind"], node["kind"])),
        ("gives to the root", gives),
        ("value", number(node["value"])),
        ("pre-activation", number(node["pre_activation"])),
        ("of it constant", number(node["constant"])),
        ("of it over weaker edges", number(node["unstored"])),
        ("norm", number(node["norm"])),
        ("logit", number(node["logit"])),
        ("probability", number(node["probability"])),
        ("feature", text(node["feature"])),
        ("fires on", None if number(node["density"]) is None else percent(node["density"]) + " of tokens"),
    )


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """Rows with None where a value is missing."""
    plain = frame.astype(object)
    return cast(list[Row], plain.where(plain.notna(), None).to_dict("records"))
