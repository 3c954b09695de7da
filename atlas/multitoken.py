"""Multi-token circuits in the graph: what finding them reads, and Circuit:MultiToken (METHOD 8).

A multi-token circuit is the union of the circuits it JOINS, one rooted at each token of its span:

    INCLUDES   the joined circuits' nodes, each with the sum of its attributions there
    n_shared   nodes of two or more joined circuits
    root_value the sum of the roots' values; completeness and the other shares are means weighted by these

All of that is made from the joined circuits in Cypher, so that a prompt that is written anew, with its
joined circuits, gets its multi-token circuits back in the same transaction.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, LiteralString

import neo4j
import pandas as pd

from atlas.errors import AtlasError
from atlas.records import MultiTokenRecord
from atlas.store import Store

PROMPTS_PER_QUERY = 50


@dataclass(frozen=True)
class StoredPrompt:
    """A prompt as it was given, its token ids, and the circuits that were asked for."""

    id: str
    text: str
    task: str | None
    source: str | None
    fields: dict[str, object]
    token_ids: list[int]


def write_multitoken(store: Store, records: Sequence[MultiTokenRecord]) -> None:
    """Write multi-token circuits in place of those of the same id, all in one transaction.

    Raises AtlasError, and writes nothing, if a circuit that one joins is not stored.
    """
    rows = [asdict(record) for record in records]

    def work(transaction: neo4j.ManagedTransaction) -> None:
        _run(transaction, "MATCH (m:Circuit {id: row.id}) DETACH DELETE m", rows)
        create(transaction, rows)

    store.write(work)


def stored(transaction: neo4j.ManagedTransaction, prompt: str) -> list[dict[str, Any]]:
    """The multi-token circuits of a prompt, as rows for `create`."""
    found = transaction.run(
        "MATCH (m:Circuit {prompt: $prompt})-[e:JOINS]->(c:Circuit) WITH m, c, e ORDER BY e.order "
        "RETURN properties(m) AS properties, collect(c.id) AS joins",
        {"prompt": prompt},
    )
    return [{**row["properties"], "joins": row["joins"]} for row in found]


def restore(transaction: neo4j.ManagedTransaction, rows: Sequence[dict[str, Any]]) -> None:
    """Write again what `stored` read, where all that it joins is there; circuits under another threshold than
    before leave out what was measured of the earlier ones in the real model."""
    for row in rows:
        found = transaction.run(
            "UNWIND $ids AS id MATCH (c:Circuit {id: id}) RETURN c.threshold AS threshold", {"ids": row["joins"]}
        )
        thresholds = [record["threshold"] for record in found]
        if len(thresholds) == len(row["joins"]):
            same = set(thresholds) == {row["threshold"]}
            create(transaction, [row if same else {k: v for k, v in row.items() if k not in _OF_THE_UNION}])


_MEASURED: LiteralString = (
    "crossing_weight: row.crossing_weight, crossing_leaves: row.crossing_leaves, null_n: row.null_n, "
    "null_mean: row.null_mean, null_sd: row.null_sd, p_value: row.p_value, q_value: row.q_value, "
    "shuffled_n: row.shuffled_n, shuffled_mean: row.shuffled_mean, "
    "ablated_to: row.ablated_to, n_ablated: row.n_ablated, lost: row.lost, lost_random: row.lost_random"
)
_OF_THE_UNION = ("ablated_to", "n_ablated", "lost", "lost_random")


def create(transaction: neo4j.ManagedTransaction, rows: Sequence[dict[str, Any]]) -> None:
    """Create multi-token circuits, whose joined circuits must be there."""
    written = _run(
        transaction,
        "MATCH (p:Prompt {id: row.prompt}) MATCH (c:Circuit {id: row.joins[0]}) "
        "CREATE (m:Circuit:MultiToken {id: row.id, prompt: row.prompt, rule: c.rule, threshold: c.threshold, "
        f"form: row.form, start: row.start, end: row.end, text: row.text, {_MEASURED}}}) "
        "CREATE (p)-[:HAS_CIRCUIT]->(m)",
        rows,
    )
    joins = [
        {"id": row["id"], "circuit": circuit, "order": k} for row in rows for k, circuit in enumerate(row["joins"], 1)
    ]
    joined = _run(
        transaction,
        "MATCH (m:Circuit {id: row.id}) MATCH (c:Circuit {id: row.circuit})-[:ROOT]->(root:CircuitNode) "
        "CREATE (m)-[:JOINS {order: row.order}]->(c) CREATE (m)-[:ROOT {order: row.order}]->(root)",
        joins,
    )
    if written != len(rows) or joined != len(joins):
        raise AtlasError("A multi-token circuit joins circuits that are not in the store; nothing was written.")
    _run(
        transaction,
        "MATCH (m:Circuit {id: row.id})-[:JOINS]->(c:Circuit)-[e:INCLUDES]->(n:CircuitNode) "
        "WITH m, n, sum(e.attribution) AS attribution, count(c) AS roots "
        "CREATE (m)-[:INCLUDES {attribution: attribution, n_roots: roots}]->(n)",
        rows,
    )
    _run(
        transaction,
        "MATCH (m:Circuit {id: row.id})-[e:INCLUDES]->(n:CircuitNode) "
        "WITH m, count(n) AS nodes, sum(CASE WHEN e.n_roots > 1 THEN 1 ELSE 0 END) AS shared "
        "SET m.n_nodes = nodes, m.n_shared = shared",
        rows,
    )
    _run(
        transaction,
        "MATCH (m:Circuit {id: row.id}) OPTIONAL MATCH (m)-[:INCLUDES]->(u)-[e:DIRECT|OV]->(v)<-[:INCLUDES]-(m) "
        "WITH m, count(e) AS edges SET m.n_edges = edges",
        rows,
    )
    _run(
        transaction,
        "MATCH (m:Circuit {id: row.id})-[:JOINS]->(c:Circuit) WITH m, sum(c.root_value) AS total, "
        "sum(c.completeness * c.root_value) AS complete, sum(c.error_share * c.root_value) AS error, "
        "sum(c.pruned_share * c.root_value) AS pruned "
        "SET m.root_value = total, m.completeness = complete / total, m.error_share = error / total, "
        "m.pruned_share = pruned / total",
        rows,
    )


def _run(transaction: neo4j.ManagedTransaction, cypher: LiteralString, rows: Sequence[dict[str, Any]]) -> int:
    """Run a statement for each `row`, and say for how many it found what it names."""
    result = transaction.run(f"UNWIND $rows AS row {cypher} RETURN count(*) AS n", {"rows": list(rows)})
    return int(result.single(strict=True)["n"])


def span_table(store: Store, replacement_model: str, length: int) -> pd.DataFrame:
    """The spans of `length` tokens and more above layer 0, and whether a circuit is rooted at each token.

    Columns: prompt, feature, start, end, text, mean, layer, site, index.
    """
    return store.read(
        "MATCH (r:ReplacementModel {id: $model})<-[:TRACED_BY]-(p:Prompt)-[:HAS_SPAN]->(s:Span)-[:OF]->(f:Feature) "
        "WHERE s.length >= $length AND f.layer > 0 "
        "RETURN p.id AS prompt, f.id AS feature, s.start AS start, s.end AS end, s.text AS text, s.mean AS mean, "
        "f.layer AS layer, f.site AS site, f.index AS index",
        model=replacement_model,
        length=length,
    )


def root_table(store: Store, replacement_model: str, rule: str) -> pd.DataFrame:
    """The activations that circuits under `rule` are rooted at. Columns: prompt, position, layer, site, index."""
    return store.read(
        "MATCH (r:ReplacementModel {id: $model})<-[:TRACED_BY]-(p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit {rule: $rule}) "
        "WHERE NOT c:MultiToken MATCH (c)-[:ROOT]->(n:Activation)-[:OF]->(f:Feature) "
        "RETURN p.id AS prompt, n.position AS position, n.layer AS layer, n.site AS site, f.index AS index",
        model=replacement_model,
        rule=rule,
    )


def frequencies(store: Store) -> dict[str, float]:
    """On which share of the stored tokens after BOS each feature fires."""
    n_tokens = store.read("MATCH (p:Prompt) RETURN sum(p.n_tokens - 1) AS n")["n"].iloc[0] or 1
    found = store.read(
        "MATCH (f:Feature)-[e:FIRES_ON]->(:Prompt) RETURN f.id AS feature, sum(size(e.positions)) AS tokens"
    )
    return {str(f): int(n) / int(n_tokens) for f, n in zip(found["feature"], found["tokens"], strict=True)}


def read_prompts(store: Store, ids: Sequence[str]) -> list[StoredPrompt]:
    """Prompts with their token ids, in the order of `ids`; one that is not stored any more is left out."""
    found: dict[str, StoredPrompt] = {}
    for start in range(0, len(ids), PROMPTS_PER_QUERY):
        rows = store.read(
            "UNWIND $ids AS id MATCH (p:Prompt {id: id})-[:HAS_TOKEN]->(t:Token) WITH p, t ORDER BY t.position "
            "WITH p, collect(t.token_id) AS tokens "
            "RETURN p.id AS id, p.text AS text, p.task AS task, p.source AS source, p.fields AS fields, tokens",
            ids=list(ids[start : start + PROMPTS_PER_QUERY]),
        )
        for id, text, task, source, fields, tokens in rows.astype(object).itertuples(index=False, name=None):
            found[id] = StoredPrompt(id, text, task, source, json.loads(fields), tokens)
    return [found[id] for id in ids if id in found]
