"""A store read back by plain Cypher, a table for each kind of row: what pandas then computes the answers from."""

import pandas as pd

from atlas.store import Store
from tests.queries.expected import Tables

NODES = """
MATCH (n:CircuitNode)-[:AT]->(t:Token)
MATCH (p:Prompt {id: n.prompt})
OPTIONAL MATCH (n)-[:OF]->(f:Feature)
RETURN n.id AS id, n.name AS name, [label IN labels(n) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS kind,
       n.layer AS layer, n.position AS position, f.id AS feature, f.label AS label, n.site AS site,
       n.pre_activation AS pre, f.index AS index, n.value AS value, t.text AS token, n.prompt AS prompt, p.task AS task
"""
EDGES = """
MATCH (a:CircuitNode)-[e:DIRECT|OV]->(b:CircuitNode)
RETURN a.id AS source, b.id AS target, type(e) AS via, e.weight AS weight, e.layer AS layer, e.head AS head,
       e.pattern AS pattern
"""
MEMBERS = """
MATCH (c:Circuit)-[:ROOT]->(root:CircuitNode)
MATCH (c)-[i:INCLUDES]->(n:CircuitNode)
RETURN c.id AS circuit, n.id AS node, i.attribution AS attribution, n.id = root.id AS is_root
"""
CIRCUITS = """
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit)-[:ROOT]->(root:CircuitNode)-[:AT]->(t:Token)
RETURN properties(c) AS circuit, p.id AS prompt, p.task AS task, p.text AS text, root.id AS root,
       root.name AS root_name, root.position AS root_position, t.text AS root_token
"""
FIRINGS = """
MATCH (f:Feature)-[r:FIRES_ON]->(p:Prompt)
RETURN f.id AS feature, p.id AS prompt, p.task AS task, r.positions AS positions, r.values AS values
"""
TOKENS = "MATCH (t:Token) RETURN t.prompt AS prompt, t.text AS text ORDER BY prompt, t.position"
PAIRS = """
MATCH (k:CircuitNode)-[e:QK]->(q:CircuitNode)
MATCH (p:Prompt {id: q.prompt})
RETURN p.id AS prompt, p.task AS task, e.layer AS layer, e.head AS head, q.position AS query, k.position AS key,
       k.id AS key_node, q.id AS query_node, e.score AS qk, e.lift AS lift
"""
SCORES = """
MATCH (s:AttentionScore)
RETURN s.prompt AS prompt, s.layer AS layer, s.head AS head, s.query AS query, s.key AS key,
       s.score AS score, s.pattern AS pattern, s.unstored AS unstored
"""
LABELS = "MATCH (f:Feature) WHERE f.label IS NOT NULL RETURN f.id AS id, f.label AS label"


def exported(store: Store) -> Tables:
    """All of the store's prompts."""
    nodes, found, firings, labels = (store.read(cypher) for cypher in (NODES, CIRCUITS, FIRINGS, LABELS))
    properties = pd.DataFrame(found["circuit"].tolist()).drop(columns="prompt").rename(columns={"id": "circuit"})
    kinds = nodes.set_index("id")["kind"]
    circuits = pd.concat([properties, found.drop(columns="circuit")], axis=1)
    tokens = store.read(TOKENS).groupby("prompt")["text"].agg(list)
    pairs = store.read(PAIRS).merge(store.read(SCORES), on=["prompt", "layer", "head", "query", "key"], validate="m:1")
    return Tables(
        nodes=nodes,
        edges=store.read(EDGES),
        members=store.read(MEMBERS),
        circuits=circuits.assign(root_kind=circuits["root"].map(kinds)),
        firings=firings.assign(tokens=firings["prompt"].map(tokens)),
        pairs=pairs,
        labels=dict(zip(labels["id"], labels["label"], strict=True)),
    )
