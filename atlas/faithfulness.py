"""The shares of METHOD 6 in the graph: which circuits have them, what measuring the others needs, and where they go.

Shares belong to a circuit as it was when they were measured. They are written only where the circuit is still
the same: of the same threshold, root value and number of nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import LiteralString

import neo4j
import pandas as pd

from atlas.errors import AtlasError
from atlas.records import SharesRecord
from atlas.store import Store

_NAMES: tuple[LiteralString, ...] = (
    "ablation",
    "faithfulness",
    "necessity",
    "random_faithfulness",
    "random_necessity",
    "top_faithfulness",
    "top_necessity",
)
_SET: LiteralString = ", ".join("c." + name + " = row." + name for name in _NAMES)
_RETURN: LiteralString = ", ".join("c." + name + " AS " + name for name in _NAMES)
_PLAIN: LiteralString = "NOT c:MultiToken AND NOT c:Imported"


@dataclass(frozen=True)
class StoredCircuit:
    """A circuit without its edges: `features` are (layer, site, position, index) of the activations in it."""

    id: str
    threshold: float
    root_value: float
    n_nodes: int
    features: tuple[tuple[int, str, int, int], ...]


def prompts_without_shares(
    store: Store, replacement_model: str, ablation: str, circuits: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The token ids of every prompt that has circuits without shares by this ablation, by the prompt's id.

    With `circuits`, only the prompts of these. Raises AtlasError where one of them is not in the store, is not
    the circuit of one root, or was traced with another replacement model.
    """
    for circuit in circuits:
        _require(store, circuit, replacement_model)
    found = store.read(
        "MATCH (m:ReplacementModel {id: $model})<-[:TRACED_BY]-(p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit) "
        f"WHERE {_PLAIN} AND coalesce(c.ablation, '') <> $ablation AND ($all OR c.id IN $circuits) "
        "WITH DISTINCT p MATCH (p)-[:HAS_TOKEN]->(t:Token) "
        "RETURN p.id AS prompt, t.token_id AS token ORDER BY prompt, t.position",
        model=replacement_model,
        ablation=ablation,
        circuits=list(circuits),
        all=not circuits,
    )
    return _by_prompt(found)


def some_prompts(store: Store, replacement_model: str, limit: int) -> dict[str, tuple[int, ...]]:
    """The token ids of the first prompts by id, by the prompt's id."""
    found = store.read(
        "MATCH (m:ReplacementModel {id: $model})<-[:TRACED_BY]-(p:Prompt) WITH p ORDER BY p.id LIMIT $limit "
        "MATCH (p)-[:HAS_TOKEN]->(t:Token) "
        "RETURN p.id AS prompt, t.token_id AS token ORDER BY prompt, t.position",
        model=replacement_model,
        limit=limit,
    )
    return _by_prompt(found)


def traced_by_others(store: Store, replacement_model: str) -> int:
    """How many prompts were traced with another replacement model than this."""
    found = store.read(
        "MATCH (p:Prompt)-[:TRACED_BY]->(m:ReplacementModel) WHERE m.id <> $model RETURN count(p) AS n",
        model=replacement_model,
    )
    return int(found["n"][0])


def circuits_without_shares(
    store: Store, prompt: str, ablation: str, circuits: Sequence[str] = ()
) -> list[StoredCircuit]:
    """The circuits of a prompt that have no shares by this ablation; with `circuits`, only these."""
    found = store.read(
        "MATCH (:Prompt {id: $prompt})-[:HAS_CIRCUIT]->(c:Circuit) "
        f"WHERE {_PLAIN} AND coalesce(c.ablation, '') <> $ablation AND ($all OR c.id IN $circuits) "
        "MATCH (c)-[:INCLUDES]->(n:CircuitNode) "
        "RETURN c.id AS id, c.threshold AS threshold, c.root_value AS root_value, c.n_nodes AS n_nodes, n.id AS node, "
        "n:Activation AS is_feature, n.layer AS layer, n.site AS site, n.position AS position ORDER BY id, node",
        prompt=prompt,
        ablation=ablation,
        circuits=list(circuits),
        all=not circuits,
    )
    heads: dict[str, tuple[float, float, int]] = {}
    features: dict[str, list[tuple[int, str, int, int]]] = {}
    for row in found.to_dict("records"):
        id, node = str(row["id"]), str(row["node"])
        heads[id] = float(row["threshold"]), float(row["root_value"]), int(row["n_nodes"])
        at = features.setdefault(id, [])
        if row["is_feature"]:
            at.append((int(row["layer"]), str(row["site"]), int(row["position"]), int(node.rpartition("/")[2])))
    return [StoredCircuit(id, *head, tuple(features[id])) for id, head in heads.items()]


def stored_shares(store: Store, prompt: str) -> dict[str, tuple[float, SharesRecord]]:
    """What is stored of a prompt's circuits that were measured, with their thresholds, by circuit."""
    found = store.read(
        "MATCH (:Prompt {id: $prompt})-[:HAS_CIRCUIT]->(c:Circuit) WHERE c.ablation IS NOT NULL "
        f"RETURN c.id AS id, c.threshold AS threshold, {_RETURN}",
        prompt=prompt,
    )
    return {
        str(row["id"]): (float(row["threshold"]), SharesRecord(**{name: row[name] for name in _NAMES}))
        for row in found.to_dict("records")
    }


def write_shares(store: Store, shares: Mapping[StoredCircuit, SharesRecord]) -> int:
    """Store shares, all in one transaction; returns how many circuits are still as they were measured."""
    rows = [
        {
            "id": c.id,
            "threshold": c.threshold,
            "root_value": c.root_value,
            "n_nodes": c.n_nodes,
            **{field.name: getattr(s, field.name) for field in fields(s)},
        }
        for c, s in shares.items()
    ]
    cypher: LiteralString = (
        "UNWIND $rows AS row MATCH (c:Circuit {id: row.id}) "
        "WHERE c.threshold = row.threshold AND c.root_value = row.root_value AND c.n_nodes = row.n_nodes "
        f"SET {_SET} RETURN count(c) AS n"
    )

    def work(transaction: neo4j.ManagedTransaction) -> int:
        return int(transaction.run(cypher, {"rows": rows}).single(strict=True)["n"])

    return store.write(work)


def _by_prompt(tokens: pd.DataFrame) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for prompt, token in zip(tokens["prompt"], tokens["token"], strict=True):
        found.setdefault(str(prompt), []).append(int(token))
    return {prompt: tuple(ids) for prompt, ids in found.items()}


def _require(store: Store, circuit: str, replacement_model: str) -> None:
    found = store.read(
        "MATCH (c:Circuit {id: $id}) OPTIONAL MATCH (c)<-[:HAS_CIRCUIT]-(:Prompt)-[:TRACED_BY]->(m) "
        f"RETURN {_PLAIN} AS plain, m.id AS model, m.name AS name",
        id=circuit,
    )
    if found.empty:
        raise AtlasError(f"There is no circuit {circuit} in the store; its prompt may have been ingested anew since.")
    row = found.iloc[0]
    if not row["plain"]:
        raise AtlasError(f"Circuit {circuit} is not the circuit of one root; only these are measured.")
    if row["model"] != replacement_model:
        raise AtlasError(
            f"Circuit {circuit} was traced with another model or other dictionaries ({row['name']}, {row['model']}); "
            "give these by --model and --dictionaries."
        )
