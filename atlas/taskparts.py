"""TaskPart: what the circuits of one task have in common, kept equal to the circuits.

One node stands for everything in circuits of one task that is the same but for the prompt: a node (`source`: a
feature's id, or else what the node is, as "embedding @ Texas" or "L3 mlp error"), an edge between two members
(`source`, `target`, `via`, and an OV edge's layer and head), and the circuits themselves (`part` circuit: how many
there are). It says how many circuits and prompts have it, of how many prompts it is a root, and the sum of what it
gives: a node's attribution over the root's value, an edge's weight over its target's pre_activation; `n_shares` counts
the terms of that sum, without those over 0. Each of these is there over all rules, and in lists by rule. Multi-token
circuits do not count, being unions of others, and neither do prompts without a task.

Every number is a sum over prompts, so a prompt is added and taken away by adding and subtracting its own numbers,
within its transaction; what no circuit has any more is deleted. An index finds the most common by log2_circuits, and
those that give most by log2_share: the whole parts of the logarithms of n_circuits and of |total_share|, the latter
within SHARE_LOGS. `rebuild` makes all of them anew, for a store that an earlier program wrote.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, LiteralString, NamedTuple, TypeAlias, cast

import neo4j
import pandas as pd

from atlas.batches import ROWS_PER_STATEMENT, batches, delete_in_batches
from atlas.feeds import edges_of
from atlas.records import Kind, NodeRecord, PromptRecord
from atlas.store import Store

SHARE_LOGS = (-30, 40)

Row: TypeAlias = dict[str, Any]


@lru_cache(maxsize=ROWS_PER_STATEMENT)
def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


class Part(NamedTuple):
    """One part of a task's circuits: `part` is circuit, node or edge; what does not apply is empty, or -1."""

    task: str
    part: str
    source: str = ""
    target: str = ""
    via: str = ""
    layer: int = -1
    head: int = -1

    @property
    def id(self) -> str:
        """Names of nodes may hold anything; quoted as JSON they cannot run into each other."""
        if self.part == "circuit":
            return f"circuits in {self.task}"
        source = _quoted(self.source)
        if self.part == "node":
            return f"{source} in {self.task}"
        target = _quoted(self.target)
        via = f"L{self.layer}.H{self.head}" if self.head >= 0 else self.via
        return f"{source} -> {target} {via} in {self.task}"


class Count(NamedTuple):
    """The sums over some circuits."""

    n_circuits: int = 0
    n_prompts: int = 0
    n_prompts_as_root: int = 0
    n_shares: int = 0
    total_share: float = 0.0

    def plus(self, other: "Count", sign: int = 1) -> "Count":
        """Their sum, or with `sign` -1 the difference."""
        return Count._make(a + sign * b for a, b in zip(self, other, strict=True))


_NONE = Count()

# By rule; under None, over all rules.
Counts: TypeAlias = dict[str | None, Count]
Totals: TypeAlias = dict[Part, Counts]


class _Circuit(NamedTuple):
    """`members` are nodes with their attributions, all nodes by their place in the prompt or by their id."""

    rule: str
    root_value: float
    root: int | str
    members: dict[Any, float]


class _Edge(NamedTuple):
    source: int | str
    target: int | str
    via: str
    layer: int
    head: int
    weight: float


_CIRCUITS: LiteralString = """
UNWIND $prompts AS prompt
MATCH (p:Prompt {id: prompt})-[:HAS_CIRCUIT]->(c:Circuit)
WHERE p.task IS NOT NULL AND NOT c:MultiToken
MATCH (c)-[:ROOT]->(root:CircuitNode)
MATCH (c)-[i:INCLUDES]->(n:CircuitNode)
RETURN p.id AS prompt, p.task AS task, c.rule AS rule, c.root_value AS root_value, root.id AS root,
       c.id AS circuit, collect(n.id) AS nodes, collect(coalesce(i.attribution, 0.0)) AS attributions
"""
_NODES: LiteralString = """
UNWIND $prompts AS prompt
MATCH (n:CircuitNode {prompt: prompt})
OPTIONAL MATCH (n)-[:OF]->(f:Feature)
RETURN prompt, n.id AS id, coalesce(n.pre_activation, 0.0) AS pre_activation,
       CASE
         WHEN f IS NOT NULL THEN f.id
         WHEN n:Error THEN 'L' + toString(n.layer) + ' ' + n.site + ' error'
         WHEN n:Bias THEN 'L' + toString(n.layer) + ' ' + n.site + ' bias'
         ELSE n.name
       END AS name
"""
_EDGES: LiteralString = """
UNWIND $prompts AS prompt
MATCH (u:CircuitNode {prompt: prompt})-[e:DIRECT|OV]->(v:CircuitNode)
RETURN prompt, u.id AS source, v.id AS target, type(e) AS via, coalesce(e.layer, -1) AS layer,
       coalesce(e.head, -1) AS head, e.weight AS weight
"""
_NAMES: tuple[LiteralString, ...] = ("n_circuits", "n_prompts", "n_prompts_as_root", "n_shares", "total_share")
_BY_RULE: tuple[LiteralString, ...] = tuple(name + "_by_rule" for name in _NAMES)
_SUMS: tuple[LiteralString, ...] = ("log2_circuits", "log2_share", "rules", *_NAMES, *_BY_RULE)
_OF_PART: tuple[LiteralString, ...] = ("task", "part", "source", "target", "via", "layer", "head")
_FIND: LiteralString = "MATCH (t:TaskPart {id: row.id}) "
# Two writers of one task wait for each other at MERGE: until the first is through, the other does not read.
_READ: LiteralString = (
    "UNWIND $tasks AS task MERGE (t:TaskPart {id: task.id}) SET t.task = task.name, t.part = 'circuit' "
    "WITH count(*) AS locked UNWIND $ids AS id MATCH (t:TaskPart {id: id}) RETURN id, "
    + ", ".join("t." + name + " AS " + name for name in ("rules", *_NAMES, *_BY_RULE))
)
_CREATE: LiteralString = (
    "UNWIND $rows AS row CREATE (t:TaskPart {"
    + ", ".join(name + ": row." + name for name in ("id", *_OF_PART, *_SUMS))
    + "})"
)
_SET: LiteralString = (
    "UNWIND $rows AS row " + _FIND + "SET " + ", ".join("t." + name + " = row." + name for name in _SUMS)
)
_DELETE: LiteralString = "UNWIND $rows AS row " + _FIND + "DETACH DELETE t"


def of_record(prompt: PromptRecord) -> Totals:
    """What the circuits of this prompt add."""
    if prompt.task is None:
        return {}
    circuits = [
        _Circuit(c.rule, c.root_value, c.root, dict(zip(c.members.tolist(), c.attribution.tolist(), strict=True)))
        for c in prompt.circuits
    ]
    nodes = {i: (_name(node), node.pre_activation or 0.0) for i, node in enumerate(prompt.nodes)}
    return _totals(prompt.task, circuits, nodes, (_Edge(*edge) for edge in edges_of(prompt)))


def of_stored(transaction: neo4j.ManagedTransaction, prompt: str) -> Totals:
    """What the stored circuits of this prompt have added."""
    given = {"prompts": [prompt]}
    circuits = [record.data() for record in transaction.run(_CIRCUITS, given)]
    if not circuits:
        return {}
    nodes, edges = ([record.data() for record in transaction.run(q, given)] for q in (_NODES, _EDGES))
    return _of_rows(circuits, nodes, edges)


def of_prompts(store: Store, prompts: Sequence[str]) -> Iterator[Totals]:
    """What the stored circuits of each of these prompts have added; of those without a task or circuits, nothing."""
    circuits, nodes, edges = (_by_prompt(store.read(q, prompts=list(prompts))) for q in (_CIRCUITS, _NODES, _EDGES))
    return (_of_rows(circuits[prompt], nodes[prompt], edges[prompt]) for prompt in list(circuits))


def change(transaction: neo4j.ManagedTransaction, removed: Totals, added: Totals) -> None:
    """Take the circuits `removed` out and put the circuits `added` in."""
    changes = _difference(removed, added)
    tasks = [{"id": Part(task, "circuit").id, "name": task} for task in sorted({part.task for part in changes})]
    for parts in batches(sorted(changes)):
        batch = {part.id: part for part in parts}
        found = transaction.run(_READ, {"tasks": tasks, "ids": list(batch)})
        there = {record["id"]: counts_in(record.data()) for record in found}
        rows = {id: row(part, add(changes[part], there.get(id, {}))) for id, part in batch.items()}
        old = [row for id, row in rows.items() if id in there]
        _send(transaction, _CREATE, [row for id, row in rows.items() if id not in there])
        _send(transaction, _SET, [{name: row[name] for name in ("id", *_SUMS)} for row in old if row["rules"]])
        _send(transaction, _DELETE, [{"id": row["id"]} for row in old if not row["rules"]])


def rebuild(store: Store) -> None:
    """Delete every TaskPart and make them anew from the circuits, a prompt at a time."""
    delete_in_batches(store, "MATCH (t:TaskPart) WITH t LIMIT $most DETACH DELETE t RETURN count(*) AS n")
    for prompt in store.read("MATCH (p:Prompt) WHERE p.task IS NOT NULL RETURN p.id AS id ORDER BY id")["id"].tolist():
        store.write(lambda transaction, id=str(prompt): change(transaction, {}, of_stored(transaction, id)))


def add(counts: Counts, more: Counts, sign: int = 1) -> Counts:
    """Their sums, or with `sign` -1 the differences."""
    if not more:
        return counts
    return {rule: counts.get(rule, _NONE).plus(more.get(rule, _NONE), sign) for rule in counts.keys() | more.keys()}


def row(part: Part, counts: Counts) -> Row:
    """The properties of a part with these counts; without a rule, that of a part that no circuit has."""
    rules = sorted(rule for rule, count in counts.items() if rule is not None and count.n_circuits)
    whole, by_rule = counts.get(None, _NONE), [counts[rule] for rule in rules]
    total = sum(count.total_share for count in by_rule)
    found: Row = {name: value for name, value in zip(_OF_PART, part, strict=True) if value != "" and value != -1}
    found |= zip(_NAMES, whole, strict=True)
    found |= zip(_BY_RULE, map(list, zip(*by_rule, strict=True)), strict=False)
    found["id"], found["rules"], found["total_share"] = part.id, rules, total
    found["log2_circuits"], found["log2_share"] = whole.n_circuits.bit_length() - 1, log2_share(total)
    return found


def counts_in(properties: Mapping[str, Any]) -> Counts:
    """The counts in the properties of a stored part."""
    rules = properties["rules"]
    if rules is None:
        return {}
    by_rule = zip(*(properties[f"{name}_by_rule"] for name in _NAMES), strict=True)
    counts: Counts = {rule: Count(*numbers) for rule, numbers in zip(rules, by_rule, strict=True)}
    return counts | {None: Count(*(properties[name] for name in _NAMES))}


def log2_share(total: float) -> int:
    """The whole part of the logarithm of |total|, within SHARE_LOGS."""
    least, most = SHARE_LOGS
    return max(least, min(most, math.frexp(total)[1] - 1)) if total else least


def _send(transaction: neo4j.ManagedTransaction, cypher: LiteralString, rows: Sequence[Row]) -> None:
    if rows:
        transaction.run(cypher, {"rows": rows}).consume()


def _name(node: NodeRecord) -> str:
    if node.dictionary is not None:
        return f"{node.dictionary}/{node.index}"
    return f"L{node.layer} {node.site} {node.kind.lower()}" if node.kind in (Kind.ERROR, Kind.BIAS) else node.name


def _by_prompt(rows: pd.DataFrame) -> defaultdict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows.to_dict("records"):
        found[row["prompt"]].append(cast(Row, row))
    return found


def _of_rows(circuits: Sequence[Row], nodes: Sequence[Row], edges: Sequence[Row]) -> Totals:
    """Of one prompt; what refers to nodes of another, in a store that is damaged, counts nowhere."""
    known = {node["id"]: (node["name"], node["pre_activation"]) for node in nodes}
    found = [
        _Circuit(c["rule"], c["root_value"], c["root"], dict(zip(c["nodes"], c["attributions"], strict=True)))
        for c in circuits
        if known.keys() >= {c["root"], *c["nodes"]}
    ]
    between = [_Edge(*(e[name] for name in _Edge._fields)) for e in edges if known.keys() >= {e["source"], e["target"]}]
    return _totals(circuits[0]["task"], found, known, between)


def _totals(
    task: str, circuits: Iterable[_Circuit], nodes: Mapping[Any, tuple[str, float]], edges: Iterable[_Edge]
) -> Totals:
    """What some circuits of one prompt add; `nodes` have a name and a pre_activation, 0 where they have none."""
    parts: dict[Part, int] = {Part(task, "circuit"): 0}  # each with its number: one hash of many texts for each
    of_node = {node: parts.setdefault(Part(task, "node", name), len(parts)) for node, (name, _) in nodes.items()}
    of_edge: list[tuple[int | str, int | str, int, float | None]] = []
    for source, target, via, layer, head, weight in edges:
        (a, _), (b, pre) = nodes[source], nodes[target]
        part = parts.setdefault(Part(task, "edge", a, b, via, layer, head), len(parts))
        of_edge.append((source, target, part, weight / pre if pre else None))
    n_circuits: defaultdict[str, Counter[int]] = defaultdict(Counter)
    shares: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    roots: set[tuple[int, str]] = set()
    for circuit in circuits:
        members, value, rule = circuit.members, circuit.root_value, circuit.rule
        has = {0}
        roots.add((of_node[circuit.root], rule))
        for node, attribution in members.items():
            has.add(of_node[node])
            if value:
                shares[of_node[node], rule].append(attribution / value)
        for source, target, part, share in of_edge:
            if target in members and source in members:
                has.add(part)
                if share is not None:
                    shares[part, rule].append(share)
        n_circuits[rule].update(has)
    totals: list[Counts] = [{} for _ in parts]
    for rule, counter in n_circuits.items():
        for part, n in counter.items():
            values = shares.get((part, rule), [])
            # Exact in whatever order, so that a prompt written again changes nothing.
            totals[part][rule] = Count(n, 1, int((part, rule) in roots), len(values), math.fsum(values))
    return {part: _with_sum(counts) for part, counts in zip(parts, totals, strict=True) if counts}


def _with_sum(counts: Counts) -> Counts:
    """With the counts over all rules, of one prompt."""
    whole, *others = counts.values()
    for other in others:
        whole = whole.plus(other)
    if others:
        whole = whole._replace(n_prompts=1, n_prompts_as_root=min(1, whole.n_prompts_as_root))
    return counts | {None: whole}


def _difference(removed: Totals, added: Totals) -> Totals:
    """`added` minus `removed`, without the parts where nothing changes."""
    if not removed:
        return added
    changes = {part: add(added.get(part, {}), removed.get(part, {}), -1) for part in removed.keys() | added.keys()}
    return {part: counts for part, counts in changes.items() if any(map(any, counts.values()))}
