"""Records into the graph: one prompt, one transaction.

A prompt's earlier version is deleted and the new one created in the same transaction, so the database
holds the old version whole or the new one whole, and never a prompt twice. Rows go by UNWIND: nodes by
CREATE with all their labels at once, together with their AT and OF; edges by two look-ups on the key and
CREATE. Features are made when first seen, and stay when a prompt goes. A prompt's multi-token circuits, which
are found over what is stored, are kept when it is replaced. Every statement says how many rows it wrote, and a
row that found no partner fails the whole transaction.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, LiteralString, TypeAlias

import neo4j
import numpy as np
from numpy.typing import NDArray

from atlas import feeds, multitoken, taskparts
from atlas.batches import batches
from atlas.errors import AtlasError
from atlas.features import make_missing
from atlas.records import DictionaryRecord, Kind, NodeRecord, PromptRecord, ReplacementModelRecord, RunRecord
from atlas.runs import this_process
from atlas.schema import PROMPT_LABELS
from atlas.store import Store

Row: TypeAlias = dict[str, Any]

_COMMON: LiteralString = "id: row.id, prompt: row.prompt, layer: row.layer, position: row.position, name: row.name"
_LINEAR: LiteralString = "pre_activation: row.pre_activation, constant: row.constant, unstored: row.unstored"
_SHARES: LiteralString = (
    "ablation: row.ablation, faithfulness: row.faithfulness, necessity: row.necessity, "
    "random_faithfulness: row.random_faithfulness, random_necessity: row.random_necessity, "
    "top_faithfulness: row.top_faithfulness, top_necessity: row.top_necessity"
)
# Labels besides CircuitNode, and properties besides the common ones.
_KINDS: dict[Kind, tuple[LiteralString, LiteralString]] = {
    Kind.MLP: ("Activation:MLP", ", site: row.site, value: row.value, " + _LINEAR),
    Kind.ATTN: ("Activation:Attn", ", site: row.site, value: row.value, " + _LINEAR),
    Kind.EMBEDDING: ("Embedding", ", token_id: row.token_id"),
    Kind.POSITION: ("PositionEmbedding", ""),
    Kind.ERROR: ("Error", ", site: row.site, norm: row.norm"),
    Kind.BIAS: ("Bias", ", site: row.site"),
    Kind.LOGIT: (
        "Logit",
        ", token: row.token, versus: row.versus, logit: row.logit, probability: row.probability, " + _LINEAR,
    ),
}


@dataclass(frozen=True)
class WriteCounts:
    """What one prompt put into the graph; `edges` are its DIRECT and OV edges."""

    nodes: int
    edges: int
    circuits: int
    firings: int
    replaced: bool


@dataclass(frozen=True)
class Asked:
    """What a stored prompt was given with: its task, and the circuits that were asked for."""

    task: str | None
    requests: tuple[str, ...]


@dataclass(frozen=True)
class _Earlier:
    """What a prompt that was taken out had added to FEEDS and TaskPart, and its multi-token circuits."""

    stored: bool
    fed: feeds.Totals
    parts: taskparts.Totals
    joined: list[Row]


def register(store: Store, model: ReplacementModelRecord, run: RunRecord) -> None:
    """Write the model, its dictionaries, the replacement model, and the run with status 'running'.

    Raises AtlasError if the store holds a model or dictionary of the same id with other weights.
    """

    def work(transaction: neo4j.ManagedTransaction) -> None:
        _refuse_other_weights(transaction, model)
        _create(transaction, "MERGE (n:Model {id: row.id}) SET n = row", [asdict(model.model)])
        _create(transaction, "MERGE (n:Dictionary {id: row.id}) SET n += row", [_known(d) for d in model.dictionaries])
        _create(
            transaction,
            "MATCH (m:Model {id: row.model}) MERGE (n:ReplacementModel {id: row.id}) SET n.name = row.name, "
            "n.open_attention = row.open, n.dtype = row.dtype MERGE (n)-[:REPLACES]->(m)",
            [
                {
                    "id": model.id,
                    "name": model.name,
                    "model": model.model.id,
                    "open": list(model.open_attention),
                    "dtype": model.dtype,
                }
            ],
        )
        _create(
            transaction,
            "MATCH (r:ReplacementModel {id: row.model}) MATCH (d:Dictionary {id: row.id}) MERGE (r)-[:USES]->(d)",
            [{"model": model.id, "id": d.id} for d in model.dictionaries],
        )
        _create(
            transaction,
            "MERGE (n:Run {id: row.id}) SET n = row",
            [{**asdict(run), "status": "running", "process": this_process()}],
        )

    store.write(work)


def record_quality(store: Store, dictionaries: Sequence[DictionaryRecord]) -> int:
    """Note what was measured of those dictionaries that the store holds with the same weights; returns how many."""
    cypher: LiteralString = (
        "UNWIND $rows AS row MATCH (n:Dictionary {id: row.id}) WHERE n.sha256 = row.sha256 SET n += row "
        "RETURN count(*) AS n"
    )
    rows = [_known(dictionary) for dictionary in dictionaries]
    return store.write(lambda transaction: transaction.run(cypher, {"rows": rows}).single(strict=True)["n"])


def _known(dictionary: DictionaryRecord) -> Row:
    """A dictionary's properties; what was not measured now is left out, so that what was before stays."""
    return {name: value for name, value in asdict(dictionary).items() if value is not None}


def finish_run(store: Store, run_id: str, status: str) -> None:
    """Record how a run ended, and when."""
    ended = {"id": run_id, "status": status, "finished_at": datetime.now(UTC).isoformat(timespec="seconds")}
    cypher: LiteralString = "MATCH (n:Run {id: row.id}) SET n.status = row.status, n.finished_at = row.finished_at"
    store.write(lambda transaction: _create(transaction, cypher, [ended]))


def write_prompt(store: Store, prompt: PromptRecord, run_id: str) -> WriteCounts:
    """Write a prompt with everything of it, in place of its earlier version if there is one.

    The model and the run must be registered. Raises AtlasError, and writes nothing, if a number is not
    finite, an id stands twice, or something refers to what is not there.
    """
    _refuse_doubles(prompt)
    _refuse_infinite(prompt)
    return store.write(lambda transaction: _write_prompt(transaction, prompt, run_id))


def delete_prompt(store: Store, prompt_id: str) -> bool:
    """Delete a prompt with everything that is only its own; false if there was none."""

    def work(transaction: neo4j.ManagedTransaction) -> bool:
        earlier = _take_out(transaction, prompt_id)
        feeds.change(transaction, earlier.fed, {})
        taskparts.change(transaction, earlier.parts, {})
        return earlier.stored

    return store.write(work)


def asked_before(store: Store, prompt_ids: Sequence[str]) -> dict[str, Asked]:
    """What those of these prompts were given with that are stored completely, by their ids."""
    found = store.read(
        "UNWIND $ids AS id MATCH (p:Prompt {id: id}) WHERE p.complete "
        "RETURN p.id AS id, p.task AS task, p.requests AS requests",
        ids=list(prompt_ids),
    )
    rows = zip(found["id"], found["task"], found["requests"], strict=True)
    return {str(id): Asked(task if isinstance(task, str) else None, tuple(requests)) for id, task, requests in rows}


def set_task(store: Store, prompt_id: str, task: str) -> None:
    """Give a stored prompt another task."""
    cypher: LiteralString = "MATCH (p:Prompt {id: $id}) SET p.task = $task"

    def work(transaction: neo4j.ManagedTransaction) -> None:
        before = taskparts.of_stored(transaction, prompt_id)
        transaction.run(cypher, {"id": prompt_id, "task": task}).consume()
        taskparts.change(transaction, before, taskparts.of_stored(transaction, prompt_id))

    store.write(work)


def _write_prompt(transaction: neo4j.ManagedTransaction, prompt: PromptRecord, run_id: str) -> WriteCounts:
    earlier = _take_out(transaction, prompt.id)
    _write_text(transaction, prompt, run_id)
    _write_features(transaction, prompt)
    _write_spans(transaction, prompt)
    feeds.change(transaction, earlier.fed, feeds.of_record(prompt))
    _write_nodes(transaction, prompt)
    _write_edges(transaction, prompt)
    _write_scores(transaction, prompt)
    _write_circuits(transaction, prompt)
    multitoken.restore(transaction, earlier.joined)
    taskparts.change(transaction, earlier.parts, taskparts.of_record(prompt))
    n_edges = len(prompt.direct.weight) + len(prompt.ov.weight)
    return WriteCounts(len(prompt.nodes), n_edges, len(prompt.circuits), len(prompt.firings), earlier.stored)


def _take_out(transaction: neo4j.ManagedTransaction, prompt_id: str) -> _Earlier:
    """Delete a prompt, and return what is left to be changed for it."""
    found = transaction.run("MATCH (p:Prompt {id: $id}) RETURN count(p) AS n", {"id": prompt_id}).single(strict=True)
    if found["n"] == 0:
        return _Earlier(False, {}, {}, [])
    fed, parts = feeds.of_stored(transaction, prompt_id), taskparts.of_stored(transaction, prompt_id)
    joined = multitoken.stored(transaction, prompt_id)
    for label in PROMPT_LABELS:
        transaction.run(f"MATCH (n:{label} {{prompt: $id}}) DETACH DELETE n", {"id": prompt_id}).consume()
    fired: LiteralString = "MATCH (p:Prompt {id: $id})<-[:FIRES_ON]-(f:Feature) SET f.n_prompts = f.n_prompts - 1"
    transaction.run(fired, {"id": prompt_id}).consume()
    transaction.run("MATCH (p:Prompt {id: $id}) DETACH DELETE p", {"id": prompt_id}).consume()
    return _Earlier(True, fed, parts, joined)


def _write_text(transaction: neo4j.ManagedTransaction, prompt: PromptRecord, run_id: str) -> None:
    row: Row = {
        "id": prompt.id,
        "run": run_id,
        "model": prompt.replacement_model,
        "text": prompt.text,
        "task": prompt.task,
        "source": prompt.source,
        "n_tokens": len(prompt.token_ids),
        "requests": list(prompt.requests),
        "fields": json.dumps(dict(prompt.fields), ensure_ascii=False, sort_keys=True),
    }
    _create(
        transaction,
        "MATCH (m:ReplacementModel {id: row.model}) MATCH (r:Run {id: row.run}) "
        "CREATE (p:Prompt {id: row.id, text: row.text, task: row.task, source: row.source, n_tokens: row.n_tokens, "
        "requests: row.requests, fields: row.fields, complete: true}) "
        "CREATE (p)-[:TRACED_BY]->(m) CREATE (r)-[:WROTE]->(p)",
        [row],
    )
    ids = [f"{prompt.id}/{position}" for position in range(len(prompt.token_ids))]
    texts = zip(ids, prompt.token_ids, prompt.token_texts, strict=True)
    _create(
        transaction,
        "MATCH (p:Prompt {id: row.prompt}) CREATE (t:Token {id: row.id, prompt: row.prompt, position: row.position, "
        "token_id: row.token_id, text: row.text}) CREATE (p)-[:HAS_TOKEN]->(t)",
        [
            {"id": id, "prompt": prompt.id, "position": position, "token_id": token_id, "text": text}
            for position, (id, token_id, text) in enumerate(texts)
        ],
    )
    _create(
        transaction,
        "MATCH (a:Token {id: row.first}) MATCH (b:Token {id: row.second}) CREATE (a)-[:NEXT]->(b)",
        [{"first": first, "second": second} for first, second in pairwise(ids)],
    )


def _write_features(transaction: neo4j.ManagedTransaction, prompt: PromptRecord) -> None:
    firings, features = prompt.firings, prompt.firings.features
    used = {(n.dictionary, n.index) for n in prompt.nodes if n.dictionary is not None and n.index is not None}
    make_missing(transaction, sorted(used.union(features)))
    positions, values = firings.position.tolist(), firings.value.tolist()
    _create(
        transaction,
        "MATCH (f:Feature {id: row.feature}) MATCH (p:Prompt {id: row.prompt}) "
        "CREATE (f)-[:FIRES_ON {positions: row.positions, values: row.values, max: row.max}]->(p) "
        "SET f.n_prompts = coalesce(f.n_prompts, 0) + 1",
        [
            {
                "feature": f"{dictionary}/{index}",
                "prompt": prompt.id,
                "positions": positions[start:stop],
                "values": values[start:stop],
                "max": max(values[start:stop]),
            }
            for (dictionary, index), (start, stop) in zip(features, pairwise(firings.start.tolist()), strict=True)
        ],
    )


def _write_spans(transaction: neo4j.ManagedTransaction, prompt: PromptRecord) -> None:
    spans, ids = prompt.spans, [f"{dictionary}/{index}" for dictionary, index in prompt.firings.features]
    _create(
        transaction,
        "MATCH (f:Feature {id: row.feature}) MATCH (p:Prompt {id: row.prompt}) "
        "CREATE (s:Span {id: row.id, prompt: row.prompt, start: row.start, end: row.end, length: row.length, "
        "text: row.text, mean: row.mean}) CREATE (p)-[:HAS_SPAN]->(s) CREATE (s)-[:OF]->(f)",
        [
            {
                "id": f"{prompt.id}/{ids[feature]}/{start}-{end}",
                "prompt": prompt.id,
                "feature": ids[feature],
                "start": start,
                "end": end,
                "length": end + 1 - start,
                "text": text,
                "mean": mean,
            }
            for text, (feature, start, end, mean) in zip(
                spans.text, _columns(spans.feature, spans.start, spans.end, spans.mean), strict=True
            )
        ],
    )


def _write_nodes(transaction: neo4j.ManagedTransaction, prompt: PromptRecord) -> None:
    for kind, (labels, properties) in _KINDS.items():
        rows = [_node_row(prompt.id, node) for node in prompt.nodes if node.kind is kind]
        of_feature = kind in (Kind.MLP, Kind.ATTN)
        feature: LiteralString = "MATCH (f:Feature {id: row.feature}) " if of_feature else ""
        of: LiteralString = " CREATE (n)-[:OF]->(f)" if of_feature else ""
        create: LiteralString = f"CREATE (n:CircuitNode:{labels} {{{_COMMON}{properties}}}) CREATE (n)-[:AT]->(t)"
        _create(transaction, f"MATCH (t:Token {{id: row.at}}) {feature}{create}{of}", rows)


def _node_row(prompt: str, node: NodeRecord) -> Row:
    row = {key: value for key, value in node._asdict().items() if value is not None and key != "kind"}
    row |= {"prompt": prompt, "at": f"{prompt}/{node.position}"}
    if node.dictionary is not None:
        row["feature"] = f"{node.dictionary}/{node.index}"
    return row


def _write_edges(transaction: neo4j.ManagedTransaction, prompt: PromptRecord) -> None:
    ids = [node.id for node in prompt.nodes]
    direct, ov = prompt.direct, prompt.ov
    ends: LiteralString = "MATCH (a:CircuitNode {id: row.source}) MATCH (b:CircuitNode {id: row.target}) "
    _create(
        transaction,
        ends + "CREATE (a)-[:DIRECT {weight: row.weight}]->(b)",
        [
            {"source": ids[s], "target": ids[t], "weight": weight}
            for s, t, weight in _columns(direct.source, direct.target, direct.weight)
        ],
    )
    _create(
        transaction,
        ends + "CREATE (a)-[:OV {layer: row.layer, head: row.head, weight: row.weight, pattern: row.pattern}]->(b)",
        [
            {"source": ids[s], "target": ids[t], "layer": layer, "head": head, "weight": weight, "pattern": pattern}
            for s, t, layer, head, weight, pattern in _columns(
                ov.source, ov.target, ov.layer, ov.head, ov.weight, ov.pattern
            )
        ],
    )


def _write_scores(transaction: neo4j.ManagedTransaction, prompt: PromptRecord) -> None:
    ids = [node.id for node in prompt.nodes]
    s, qk = prompt.scores, prompt.qk
    _create(
        transaction,
        "MATCH (q:Token {id: row.at_query}) MATCH (k:Token {id: row.at_key}) "
        "CREATE (a:AttentionScore {id: row.id, prompt: row.prompt, layer: row.layer, head: row.head, query: row.query, "
        "key: row.key, score: row.score, pattern: row.pattern, unstored: row.unstored}) "
        "CREATE (a)-[:QUERY]->(q) CREATE (a)-[:KEY]->(k)",
        [
            {
                "id": f"{prompt.id}/{layer}.{head}/{query}-{key}",
                "prompt": prompt.id,
                "at_query": f"{prompt.id}/{query}",
                "at_key": f"{prompt.id}/{key}",
                "layer": layer,
                "head": head,
                "query": query,
                "key": key,
                "score": score,
                "pattern": pattern,
                "unstored": unstored,
            }
            for layer, head, query, key, score, pattern, unstored in _columns(
                s.layer, s.head, s.query, s.key, s.score, s.pattern, s.unstored
            )
        ],
    )
    _create(
        transaction,
        "MATCH (a:CircuitNode {id: row.source}) MATCH (b:CircuitNode {id: row.target}) "
        "CREATE (a)-[:QK {layer: row.layer, head: row.head, score: row.score, lift: row.lift}]->(b)",
        [
            {"source": ids[a], "target": ids[b], "layer": layer, "head": head, "score": score, "lift": lift}
            for a, b, layer, head, score, lift in _columns(qk.source, qk.target, qk.layer, qk.head, qk.score, qk.lift)
        ],
    )


def _write_circuits(transaction: neo4j.ManagedTransaction, prompt: PromptRecord) -> None:
    ids = [node.id for node in prompt.nodes]
    _create(
        transaction,
        "MATCH (p:Prompt {id: row.prompt}) MATCH (root:CircuitNode {id: row.root}) "
        "CREATE (c:Circuit {id: row.id, prompt: row.prompt, rule: row.rule, threshold: row.threshold, "
        "n_nodes: row.n_nodes, n_edges: row.n_edges, root_value: row.root_value, completeness: row.completeness, "
        f"error_share: row.error_share, pruned_share: row.pruned_share, {_SHARES}}}) "
        "CREATE (p)-[:HAS_CIRCUIT]->(c) CREATE (c)-[:ROOT]->(root)",
        [
            {
                "id": c.id,
                "prompt": prompt.id,
                "root": ids[c.root],
                "rule": c.rule,
                "threshold": c.threshold,
                "n_nodes": len(c.members),
                "n_edges": c.n_edges,
                "root_value": c.root_value,
                "completeness": c.completeness,
                "error_share": c.error_share,
                "pruned_share": c.pruned_share,
                **(vars(c.shares) if c.shares else {}),
            }
            for c in prompt.circuits
        ],
    )
    _create(
        transaction,
        "MATCH (c:Circuit {id: row.circuit}) MATCH (n:CircuitNode {id: row.node}) "
        "CREATE (c)-[:INCLUDES {attribution: row.attribution}]->(n)",
        [
            {"circuit": c.id, "node": ids[member], "attribution": attribution}
            for c in prompt.circuits
            for member, attribution in _columns(c.members, c.attribution)
        ],
    )


def _columns(*arrays: NDArray[Any]) -> Iterator[tuple[Any, ...]]:
    return zip(*(array.tolist() for array in arrays), strict=True)


def _create(transaction: neo4j.ManagedTransaction, cypher: LiteralString, rows: Sequence[Row]) -> None:
    """Run `cypher` for each `row`; every row must find the partners that it names."""
    for batch in batches(rows):
        result = transaction.run(f"UNWIND $rows AS row {cypher} RETURN count(*) AS n", {"rows": batch})
        written = result.single(strict=True)["n"]
        if written != len(batch):
            raise AtlasError(
                f"{len(batch) - written} of {len(batch)} rows refer to what is not in the store; nothing of the "
                f"prompt was written. The statement: {cypher}"
            )


def _refuse_other_weights(transaction: neo4j.ManagedTransaction, model: ReplacementModelRecord) -> None:
    dictionaries = [{"id": d.id, "hash": d.sha256} for d in model.dictionaries]
    found = transaction.run(
        "UNWIND $rows AS row MATCH (d:Dictionary {id: row.id}) WHERE d.sha256 <> row.hash RETURN d.id AS id "
        "UNION MATCH (m:Model {id: $model}) WHERE m.revision <> $revision RETURN m.id AS id",
        {"rows": dictionaries, "model": model.model.id, "revision": model.model.revision},
    )
    names = sorted(record["id"] for record in found)
    if names:
        raise AtlasError(
            f"The store already holds {names[0]} with other weights, and features of the two would mix; "
            "use another store, or give the model another name."
        )


def _refuse_doubles(prompt: PromptRecord) -> None:
    """Not left to the constraints: the embedded engine misses a key that one transaction deletes and makes twice."""
    direct, ov, scores, qk, spans = prompt.direct, prompt.ov, prompt.scores, prompt.qk, prompt.spans
    groups: dict[str, list[Any]] = {
        "node": [node.id for node in prompt.nodes],
        "circuit": [circuit.id for circuit in prompt.circuits],
        "firing feature": prompt.firings.features,
        "span": list(_columns(spans.feature, spans.start)),
        "DIRECT edge": list(_columns(direct.source, direct.target)),
        "OV edge": list(_columns(ov.source, ov.target, ov.head)),
        "attention score": list(_columns(scores.layer, scores.head, scores.query, scores.key)),
        "QK edge": list(_columns(qk.source, qk.target, qk.layer, qk.head)),
    }
    for what, keys in groups.items():
        if len(set(keys)) < len(keys):
            double = next(key for key, n in Counter(keys).items() if n > 1)
            raise AtlasError(f"The {what} {double} of {prompt.text!r} stands twice; nothing was written.")


def _refuse_infinite(prompt: PromptRecord) -> None:
    of_nodes = [v for n in prompt.nodes for v in (n.value, n.pre_activation, n.constant, n.unstored, n.norm, n.logit)]
    of_circuits = [
        v for c in prompt.circuits for v in (c.root_value, c.completeness, c.error_share, c.pruned_share, c.threshold)
    ]
    of_circuits += [v for c in prompt.circuits if c.shares for v in vars(c.shares).values() if not isinstance(v, str)]
    single = np.array([v for v in (*of_nodes, *of_circuits) if v is not None], dtype=np.float64)
    arrays = [single, prompt.direct.weight, prompt.ov.weight, prompt.ov.pattern, prompt.qk.score, prompt.qk.lift]
    arrays += [prompt.scores.score, prompt.scores.pattern, prompt.scores.unstored]
    arrays += [prompt.firings.value, prompt.spans.mean]
    if not all(np.isfinite(array).all() for array in (*arrays, *(c.attribution for c in prompt.circuits))):
        raise AtlasError(f"The circuits of {prompt.text!r} hold a number that is not finite; nothing was written.")
