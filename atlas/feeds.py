"""FEEDS: which feature feeds which across all prompts, kept equal to the edges.

(A)-[:FEEDS {via, layer, head}]->(B) sums up every DIRECT edge, or every OV edge of one head, that runs from an
activation of feature A to one of feature B: n_edges, n_prompts, and the means of the edges' weight and of their
share, which is weight / pre_activation of the target (0 where that is 0). The totals stand beside the means, so
that a prompt is added and taken away by adding and subtracting its own sums, within its transaction; a relationship
whose last edge goes is deleted. log2_prompts, the whole part of the logarithm of n_prompts, finds the most common by
an index. `rebuild` makes all of them anew, for a store that an earlier program wrote.
"""

from collections.abc import Iterator, Mapping
from typing import Any, LiteralString, NamedTuple, TypeAlias

import neo4j

from atlas.batches import batches, delete_in_batches
from atlas.records import NodeRecord, PromptRecord
from atlas.store import Store

FEATURES_PER_STATEMENT = 500


class Path(NamedTuple):
    """From feature to feature, and how: `head` and its `layer` are -1 for DIRECT."""

    target: str
    source: str
    via: str
    layer: int
    head: int


class Total(NamedTuple):
    """The sums over some edges."""

    n_prompts: int
    n_edges: int
    weight: float
    share: float


Totals: TypeAlias = dict[Path, Total]
_ROW = (*Path._fields, *Total._fields, "place")

_OF_PROMPT: LiteralString = """
MATCH (u:CircuitNode {prompt: $prompt})-[e:DIRECT|OV]->(v:CircuitNode)
MATCH (u)-[:OF]->(a:Feature)
MATCH (v)-[:OF]->(b:Feature)
RETURN b.id AS target, a.id AS source, type(e) AS via, coalesce(e.layer, -1) AS layer, coalesce(e.head, -1) AS head,
       count(*) AS n_edges, sum(e.weight) AS weight,
       sum(CASE WHEN v.pre_activation <> 0 THEN e.weight / v.pre_activation ELSE 0.0 END) AS share
"""
# The target first: features are driven by fewer others than they drive, and the embedded engine searches one side.
_FIND: LiteralString = """
UNWIND $rows AS row
MATCH (b:Feature {id: row.target})
MATCH (a:Feature {id: row.source})
MATCH (b)<-[r:FEEDS]-(a)
WHERE r.via = row.via AND coalesce(r.head, -1) = row.head
"""
# Of the whole number n, exact below 2 ** 29.
LOG2: LiteralString = "CASE WHEN n > 0 THEN toInteger(floor(log(n) / log(2) + 1e-9)) ELSE 0 END"
_ADD: LiteralString = (
    _FIND
    + f"""
WITH row, r, r.n_prompts + row.n_prompts AS n, r.n_edges + row.n_edges AS n_edges,
     r.total_weight + row.weight AS weight, r.total_share + row.share AS share
WITH row, r, n AS n_prompts, {LOG2} AS log2_prompts, n_edges AS n, weight, share
SET r.n_prompts = n_prompts, r.log2_prompts = log2_prompts,
    r.n_edges = n, r.total_weight = weight, r.total_share = share,
    r.mean_weight = CASE WHEN n > 0 THEN weight / n ELSE 0.0 END,
    r.mean_share = CASE WHEN n > 0 THEN share / n ELSE 0.0 END
RETURN row.place AS place
"""
)
_DELETE_EMPTY: LiteralString = _FIND + "WITH r WHERE r.n_edges <= 0 DELETE r"
# One prompt is added at a time, so log2_prompts is 0.
_CREATE: LiteralString = """
UNWIND $rows AS row
MATCH (b:Feature {id: row.target})
MATCH (a:Feature {id: row.source})
CREATE (a)-[:FEEDS {via: row.via, layer: CASE WHEN row.layer >= 0 THEN row.layer END,
                    head: CASE WHEN row.head >= 0 THEN row.head END, n_prompts: row.n_prompts, log2_prompts: 0,
                    n_edges: row.n_edges, mean_weight: row.weight / row.n_edges, mean_share: row.share / row.n_edges,
                    total_weight: row.weight, total_share: row.share}]->(b)
"""
_COUNT_FEEDS: LiteralString = f"""
UNWIND $ids AS id
MATCH (b:Feature {{id: id}})<-[r:FEEDS]-()
WITH r, r.n_prompts AS n
SET r.log2_prompts = {LOG2}
"""
_COUNT_FIRINGS: LiteralString = """
UNWIND $ids AS id
MATCH (f:Feature {id: id})
OPTIONAL MATCH (f)-[e:FIRES_ON]->()
WITH f, count(e) AS n
SET f.n_prompts = n
"""


def of_record(prompt: PromptRecord) -> Totals:
    """What the edges between activations of this prompt add to FEEDS."""
    features = [_feature(node) for node in prompt.nodes]
    found: dict[tuple[str, str, str, int, int], tuple[int, float, float]] = {}
    for source, target, via, layer, head, weight in edges_of(prompt):
        a, b = features[source], features[target]
        if a is None or b is None:
            continue
        pre = prompt.nodes[target].pre_activation
        path = b, a, via, layer, head
        n_edges, weights, shares = found.get(path, (0, 0.0, 0.0))
        found[path] = n_edges + 1, weights + weight, shares + (weight / pre if pre else 0.0)
    return {Path._make(path): Total(1, *sums) for path, sums in found.items()}


def of_stored(transaction: neo4j.ManagedTransaction, prompt: str) -> Totals:
    """What the stored edges of this prompt have added to FEEDS."""
    found = transaction.run(_OF_PROMPT, {"prompt": prompt})
    return {
        Path(r["target"], r["source"], r["via"], r["layer"], r["head"]): Total(1, r["n_edges"], r["weight"], r["share"])
        for r in found
    }


def change(transaction: neo4j.ManagedTransaction, removed: Totals, added: Totals) -> None:
    """Take the edges `removed` out of FEEDS and put the edges `added` in; the features must be there."""
    changes = _difference(removed, added)
    # Always in one order: two writers then wait for each other instead of locking each other out.
    rows: list[dict[str, Any]] = [
        dict(zip(_ROW, (*path, *changes[path], i), strict=True)) for i, path in enumerate(sorted(changes))
    ]
    for batch in batches(rows):
        there = {record["place"] for record in transaction.run(_ADD, {"rows": batch})}
        new = [row for row in batch if row["place"] not in there and row["n_edges"] > 0]
        less = [row for row in batch if row["n_edges"] < 0]
        if new:
            transaction.run(_CREATE, {"rows": new}).consume()
        if less:
            transaction.run(_DELETE_EMPTY, {"rows": less}).consume()


def rebuild(store: Store) -> None:
    """Delete every FEEDS and make them anew from the edges, a prompt at a time."""
    delete_in_batches(store, "MATCH ()-[r:FEEDS]->() WITH r LIMIT $most DELETE r RETURN count(*) AS n")
    for prompt in store.read("MATCH (p:Prompt) RETURN p.id AS id ORDER BY id")["id"].tolist():
        store.write(lambda transaction, id=str(prompt): change(transaction, {}, of_stored(transaction, id)))


def count_prompts(store: Store) -> None:
    """Note of every feature in how many prompts it fires, and of every FEEDS its log2_prompts.

    For a store that an earlier program wrote. A feature that never fired gets 0.
    """
    ids = [str(id) for id in store.read("MATCH (f:Feature) RETURN f.id AS id ORDER BY id")["id"]]
    for batch in batches(ids, FEATURES_PER_STATEMENT):
        store.change(_COUNT_FEEDS, ids=batch)
        store.change(_COUNT_FIRINGS, ids=batch)


def _feature(node: NodeRecord) -> str | None:
    return None if node.dictionary is None else f"{node.dictionary}/{node.index}"


def edges_of(prompt: PromptRecord) -> Iterator[tuple[int, int, str, int, int, float]]:
    """Source, target, via, layer, head and weight of every DIRECT and OV edge; layer and head of DIRECT are -1."""
    direct, ov = prompt.direct, prompt.ov
    for s, t, weight in zip(direct.source.tolist(), direct.target.tolist(), direct.weight.tolist(), strict=True):
        yield s, t, "DIRECT", -1, -1, weight
    columns = (array.tolist() for array in (ov.source, ov.target, ov.layer, ov.head, ov.weight))
    for s, t, layer, head, weight in zip(*columns, strict=True):
        yield s, t, "OV", layer, head, weight


def _difference(removed: Mapping[Path, Total], added: Mapping[Path, Total]) -> Totals:
    """`added` minus `removed`, without the paths where nothing changes."""
    if not removed:
        return dict(added)
    zero = Total(0, 0, 0.0, 0.0)
    changes: Totals = {}
    for path in removed.keys() | added.keys():
        old, new = removed.get(path, zero), added.get(path, zero)
        if old != new:
            changes[path] = Total(
                new.n_prompts - old.n_prompts,
                new.n_edges - old.n_edges,
                new.weight - old.weight,
                new.share - old.share,
            )
    return changes
