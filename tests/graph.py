"""A stored prompt read back whole, and a record in the same form: equal graphs are equal values."""

import json
from typing import Any, NamedTuple

from atlas.records import Firings, Kind, PromptRecord, Spans
from atlas.store import Store
from atlas.verify import verify

Graph = dict[str, Any]


class Firing(NamedTuple):
    """One feature of a prompt, by its id, and where it fires."""

    feature: str
    positions: list[int]
    values: list[float]


class Span(NamedTuple):
    """One span, its feature by its id."""

    feature: str
    start: int
    end: int
    text: str
    mean: float


def firing_rows(firings: Firings) -> list[Firing]:
    rows: list[Firing] = []
    for i, (dictionary, index) in enumerate(firings.features):
        here = slice(int(firings.start[i]), int(firings.start[i + 1]))
        rows.append(Firing(f"{dictionary}/{index}", firings.position[here].tolist(), firings.value[here].tolist()))
    return rows


def span_rows(firings: Firings, spans: Spans) -> list[Span]:
    ids = [f.feature for f in firing_rows(firings)]
    columns = (spans.start.tolist(), spans.end.tolist(), spans.text, spans.mean.tolist())
    return [Span(ids[f], *row) for f, *row in zip(spans.feature.tolist(), *columns, strict=True)]


def graph_of(record: PromptRecord) -> Graph:
    """What must be in the store once `record` is written."""
    ids = [node.id for node in record.nodes]
    nodes: dict[str, Any] = {}
    for node in record.nodes:
        given = {k: v for k, v in node._asdict().items() if v is not None and k not in ("kind", "dictionary", "index")}
        labels = {"CircuitNode", str(node.kind)} | ({"Activation"} if node.kind in (Kind.MLP, Kind.ATTN) else set())
        feature = None if node.dictionary is None else f"{node.dictionary}/{node.index}"
        at = f"{record.id}/{node.position}"
        nodes[node.id] = (sorted(labels), given | {"prompt": record.id}, at, feature)
    d, o, scores, qk = record.direct, record.ov, record.scores, record.qk
    return {
        "prompt": {
            "id": record.id,
            "text": record.text,
            "n_tokens": len(record.token_ids),
            "complete": True,
            "requests": list(record.requests),
            "fields": dict(record.fields),
            **({"task": record.task} if record.task is not None else {}),
            **({"source": record.source} if record.source is not None else {}),
        },
        "model": record.replacement_model,
        "tokens": [(i, *token) for i, token in enumerate(zip(record.token_ids, record.token_texts, strict=True))],
        "firings": {f.feature: (f.positions, f.values, max(f.values)) for f in firing_rows(record.firings)},
        "spans": {
            f"{record.id}/{s.feature}/{s.start}-{s.end}": (
                {
                    "id": f"{record.id}/{s.feature}/{s.start}-{s.end}",
                    "prompt": record.id,
                    "start": s.start,
                    "end": s.end,
                    "length": s.end - s.start + 1,
                    "text": s.text,
                    "mean": s.mean,
                },
                s.feature,
            )
            for s in span_rows(record.firings, record.spans)
        },
        "nodes": nodes,
        "direct": sorted(
            (ids[s], ids[t], w) for s, t, w in zip(d.source.tolist(), d.target.tolist(), d.weight.tolist(), strict=True)
        ),
        "ov": sorted(
            (ids[s], ids[t], layer, head, w, p)
            for s, t, layer, head, w, p in zip(
                *(a.tolist() for a in (o.source, o.target, o.layer, o.head, o.weight, o.pattern)), strict=True
            )
        ),
        "scores": sorted(
            (f"{record.id}/{layer}.{head}/{q}-{k}", layer, head, q, k, *rest, f"{record.id}/{q}", f"{record.id}/{k}")
            for layer, head, q, k, *rest in zip(*(a.tolist() for a in vars(scores).values()), strict=True)
        ),
        "qk": sorted(
            (ids[s], ids[t], *rest) for s, t, *rest in zip(*(a.tolist() for a in vars(qk).values()), strict=True)
        ),
        "circuits": {
            c.id: (
                {
                    "id": c.id,
                    "prompt": record.id,
                    "rule": c.rule,
                    "threshold": c.threshold,
                    "n_nodes": len(c.members),
                    "n_edges": c.n_edges,
                    "root_value": c.root_value,
                    "completeness": c.completeness,
                    "error_share": c.error_share,
                    "pruned_share": c.pruned_share,
                    **(vars(c.shares) if c.shares else {}),
                },
                ids[c.root],
                {ids[m]: a for m, a in zip(c.members.tolist(), c.attribution.tolist(), strict=True)},
            )
            for c in record.circuits
        },
    }


def graph_in(store: Store, prompt: str) -> Graph:
    """Everything that the store holds of one prompt."""

    def rows(cypher: str) -> list[tuple[Any, ...]]:
        frame = store.read(cypher, prompt=prompt).astype(object)
        return list(frame.where(frame.notna(), None).itertuples(index=False, name=None))

    (properties, model) = rows(
        "MATCH (p:Prompt {id: $prompt})-[:TRACED_BY]->(m) RETURN properties(p) AS properties, m.id AS model"
    )[0]
    circuits: dict[str, Any] = {
        c["id"]: (c, root, {})
        for c, root in rows(
            "MATCH (:Prompt {id: $prompt})-[:HAS_CIRCUIT]->(c)-[:ROOT]->(r) RETURN properties(c) AS c, r.id AS root"
        )
    }
    for circuit, node, attribution in rows(
        "MATCH (c:Circuit {prompt: $prompt})-[e:INCLUDES]->(n) RETURN c.id, n.id, e.attribution"
    ):
        circuits[circuit][2][node] = attribution
    return {
        "prompt": properties | {"fields": json.loads(properties["fields"])},
        "model": model,
        "tokens": rows(
            "MATCH (:Prompt {id: $prompt})-[:HAS_TOKEN]->(t) "
            "RETURN t.position AS position, t.token_id AS id, t.text AS text ORDER BY position"
        ),
        "firings": {
            feature: (positions, values, most)
            for feature, positions, values, most in rows(
                "MATCH (f:Feature)-[e:FIRES_ON]->(:Prompt {id: $prompt}) RETURN f.id, e.positions, e.values, e.max"
            )
        },
        "spans": {
            span["id"]: (span, feature)
            for span, feature in rows(
                "MATCH (:Prompt {id: $prompt})-[:HAS_SPAN]->(s)-[:OF]->(f) "
                "RETURN properties(s) AS span, f.id AS feature"
            )
        },
        "nodes": {
            node["id"]: (sorted(labels), node, token, feature)
            for node, labels, token, feature in rows(
                "MATCH (n:CircuitNode {prompt: $prompt})-[:AT]->(t) OPTIONAL MATCH (n)-[:OF]->(f) "
                "RETURN properties(n) AS node, labels(n) AS labels, t.id AS token, f.id AS feature"
            )
        },
        "direct": sorted(rows("MATCH (a:CircuitNode {prompt: $prompt})-[e:DIRECT]->(b) RETURN a.id, b.id, e.weight")),
        "ov": sorted(
            rows(
                "MATCH (a:CircuitNode {prompt: $prompt})-[e:OV]->(b) "
                "RETURN a.id, b.id, e.layer, e.head, e.weight, e.pattern"
            )
        ),
        "scores": sorted(
            rows(
                "MATCH (k:Token)<-[:KEY]-(a:AttentionScore {prompt: $prompt})-[:QUERY]->(q:Token) RETURN a.id, "
                "a.layer, a.head, a.query, a.key, a.score, a.pattern, a.unstored, q.id AS at_query, k.id AS at_key"
            )
        ),
        "qk": sorted(
            rows(
                "MATCH (a:CircuitNode {prompt: $prompt})-[e:QK]->(b) "
                "RETURN a.id, b.id, e.layer, e.head, e.score, e.lift"
            )
        ),
        "circuits": circuits,
    }


def verified(store: Store, name: str) -> tuple[int, int]:
    """What one check of `atlas verify` counts: all that it looked at, and the violations."""
    (check,) = [check for check in verify(store) if check.name == name]
    return check.checked, check.violations
