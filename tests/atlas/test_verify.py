"""Every check of `verify` finds what was planted for it."""

from dataclasses import replace

import pytest

from atlas.multitoken import write_multitoken
from atlas.store import Store
from atlas.verify import QUESTIONS, verify
from atlas.writer import register, write_prompt
from tests.graph import verified
from tests.synthetic import synthetic_model, synthetic_multitoken, synthetic_prompt, synthetic_run

PLANTED = [
    ("prompts", "MATCH (p:Prompt) WITH p LIMIT 1 SET p.complete = false"),
    ("prompts", "MATCH (p:Prompt) WITH p LIMIT 1 SET p.n_tokens = 99"),
    ("prompts", "MATCH (:Prompt)-[e:TRACED_BY]->() WITH e LIMIT 1 DELETE e"),
    ("tokens", "MATCH (:Token)-[e:NEXT]->() WITH e LIMIT 1 DELETE e"),
    ("tokens", "MATCH (t:Token) WITH t LIMIT 1 SET t.position = 7"),
    ("nodes", "MATCH (n:Embedding)-[e:AT]->() WITH e LIMIT 1 DELETE e"),
    ("nodes", "MATCH (n:Error) WITH n LIMIT 1 SET n.layer = n.layer + 1"),
    ("nodes", "MATCH (n:Bias) WITH n LIMIT 1 SET n.site = 'mlp2'"),
    ("activations", "MATCH (:MLP)-[e:OF]->() WITH e LIMIT 1 DELETE e"),
    ("activations", "MATCH (n:Attn)-[:OF]->(f) WITH f LIMIT 1 SET f.layer = 9"),
    ("firings", "MATCH ()-[e:FIRES_ON]->() WITH e LIMIT 1 SET e.max = e.max + 1"),
    ("firings", "MATCH ()-[e:FIRES_ON]->() WITH e LIMIT 1 SET e.positions = [0, 0]"),
    ("firings", "MATCH (f)-[e:FIRES_ON]->(p) WITH f, e, p LIMIT 1 CREATE (f)-[:FIRES_ON {positions: [1]}]->(p)"),
    ("inverted index", "MATCH (n:MLP {position: 1})-[:OF]->()-[e:FIRES_ON]->(:Prompt {id: n.prompt}) DELETE e"),
    ("spans", "MATCH (s:Span) WITH s LIMIT 1 SET s.end = s.end + 1"),
    ("spans", "MATCH (s:Span)-[e:OF]->() WITH e LIMIT 1 DELETE e"),
    ("spans", "MATCH (s:Span)-[:OF]->()-[e:FIRES_ON]->(p:Prompt {id: s.prompt}) DELETE e"),
    ("edges", "MATCH ()-[e:OV]->() WITH e LIMIT 1 SET e.layer = 9"),
    (
        "edges",
        "MATCH (u:MLP {layer: 1}) MATCH (v:Attn {layer: 1, prompt: u.prompt}) WHERE u.position <= v.position "
        "WITH u, v LIMIT 1 CREATE (u)-[:OV {layer: 1, head: 0, weight: 0.0, pattern: 0.1}]->(v)",
    ),
    (
        "edges",
        "MATCH (u:Embedding {position: 2}) MATCH (v:Attn {position: 1, prompt: u.prompt}) "
        "WITH u, v LIMIT 1 CREATE (u)-[:OV {layer: v.layer, head: 0, weight: 0.0, pattern: 0.1}]->(v)",
    ),
    (
        "edges",
        "MATCH (u:Embedding {position: 1}) MATCH (v:Logit) WHERE u.prompt <> v.prompt "
        "WITH u, v LIMIT 1 CREATE (u)-[:DIRECT {weight: 0.0}]->(v)",
    ),
    (
        "edges",
        "MATCH (u:Embedding {position: 1}) MATCH (v:Logit {position: 2, prompt: u.prompt}) "
        "WITH u, v LIMIT 1 CREATE (u)-[:DIRECT {weight: 0.0}]->(v)",
    ),
    ("single edges", "MATCH (u)-[e:DIRECT]->(v) WITH u, v LIMIT 1 CREATE (u)-[:DIRECT {weight: 0.0}]->(v)"),
    (
        "single edges",
        "MATCH (u)-[e:OV]->(v) WITH u, v, e LIMIT 1 "
        "CREATE (u)-[:OV {layer: e.layer, head: e.head, weight: 0.0, pattern: 0.1}]->(v)",
    ),
    ("conservation", "MATCH ()-[e:DIRECT]->() WITH e LIMIT 1 SET e.weight = e.weight + 0.01"),
    ("conservation", "MATCH ()-[e:OV]->() WITH e LIMIT 1 DELETE e"),
    ("conservation", "MATCH (n:Logit) WITH n LIMIT 1 REMOVE n.unstored"),
    ("QK edges", "MATCH (v)-[e:QK]->(u) WITH v, u, e LIMIT 1 CREATE (v)-[f:QK]->(u) SET f = properties(e)"),
    ("QK edges", "MATCH ()-[e:QK]->(u) WHERE u.layer >= 0 WITH e LIMIT 1 SET e.layer = -1"),
    ("QK edges", "MATCH (v:Bias {site: 'k'})-[e:QK]->() WITH e LIMIT 1 SET e.layer = e.layer + 1"),
    ("QK edges", "MATCH ()-[e:QK]->() WITH e LIMIT 1 REMOVE e.lift"),
    (
        "QK edges",
        "MATCH (v:Embedding {position: 2}) MATCH (u:Embedding {position: 1, prompt: v.prompt}) "
        "WITH v, u LIMIT 1 CREATE (v)-[:QK {layer: 1, head: 0, score: 0.0, lift: 0.0}]->(u)",
    ),
    ("attention", "MATCH (:AttentionScore)-[e:KEY]->() WITH e LIMIT 1 DELETE e"),
    ("attention", "MATCH (a:AttentionScore) WITH a LIMIT 1 SET a.pattern = 1.01"),
    ("attention", "MATCH (a:AttentionScore) WITH a LIMIT 1 SET a.head = a.head + 1"),
    ("scores", "MATCH ()-[e:QK]->() WITH e LIMIT 1 SET e.score = e.score + 0.01"),
    ("scores", "MATCH (a:AttentionScore) WITH a LIMIT 1 REMOVE a.unstored"),
    ("scores", "MATCH ()-[e:QK]->() WITH e LIMIT 1 SET e.head = 7"),
    ("circuits", "MATCH (c:Circuit)-[e:ROOT]->() WHERE NOT c:MultiToken WITH e LIMIT 1 DELETE e"),
    (
        "circuits",
        "MATCH (c:Circuit)-[:INCLUDES]->(n:Embedding) WHERE NOT c:MultiToken WITH c, n LIMIT 1 CREATE (c)-[:ROOT]->(n)",
    ),
    (
        "circuits",
        "MATCH (c:Circuit)-[:INCLUDES]->(n) WHERE NOT c:MultiToken WITH c, n LIMIT 1 CREATE (c)-[:INCLUDES]->(n)",
    ),
    ("circuits", "MATCH (:Prompt)-[e:HAS_CIRCUIT]->(c) WHERE NOT c:MultiToken WITH e LIMIT 1 DELETE e"),
    ("circuits", "MATCH (c:Circuit) WHERE NOT c:MultiToken WITH c LIMIT 1 SET c.n_nodes = c.n_nodes + 1"),
    ("feeds", "MATCH ()-[e:FEEDS]->() WITH e LIMIT 1 SET e.n_edges = e.n_edges + 1"),
    ("multi-token", "MATCH (:MultiToken)-[e:JOINS]->() WITH e LIMIT 1 DELETE e"),
    ("multi-token", "MATCH (:MultiToken)-[e:ROOT {order: 2}]->() WITH e LIMIT 1 SET e.order = 1"),
    ("multi-token", "MATCH (m:MultiToken) WITH m LIMIT 1 SET m.n_shared = m.n_shared + 1"),
    ("multi-token", "MATCH (m:MultiToken)-[e:INCLUDES]->() WITH e LIMIT 1 DELETE e"),
    ("multi-token", "MATCH (m:MultiToken) WITH m LIMIT 1 REMOVE m.crossing_weight"),
    ("multi-token", "MATCH (m:MultiToken) WITH m LIMIT 1 SET m.p_value = 0.0"),
    ("circuit edges", "MATCH (c:Circuit) WITH c LIMIT 1 SET c.n_edges = c.n_edges - 1"),
    ("shares", "MATCH (c:Circuit) WITH c LIMIT 1 SET c.error_share = c.error_share + 0.001"),
    ("shares", "MATCH (c:Circuit) WITH c LIMIT 1 REMOVE c.pruned_share"),
    ("faithfulness", "MATCH (c:Circuit) WHERE c.faithfulness > 0 WITH c LIMIT 1 REMOVE c.top_necessity"),
    ("faithfulness", "MATCH (c:Circuit) WHERE c.faithfulness > 0 WITH c LIMIT 1 SET c.random_necessity = 0.0 / 0.0"),
    ("features", "MATCH (f:Feature) WITH f LIMIT 1 SET f.index = 1000"),
    ("features", "MATCH (:Feature)-[e:IN]->() WITH e LIMIT 1 DELETE e"),
    ("task parts", "MATCH (t:TaskPart {part: 'circuit'}) SET t.n_prompts = t.n_prompts + 1"),
    ("task parts", "MATCH (t:TaskPart {part: 'edge'}) WITH t LIMIT 1 SET t.total_share = t.total_share + 0.01"),
    ("task parts", "MATCH (t:TaskPart {part: 'edge'}) WITH t LIMIT 1 SET t.total_share_by_rule = [99.0]"),
    ("task parts", "MATCH (t:TaskPart {part: 'edge'}) WITH t LIMIT 1 SET t.total_share_by_rule = []"),
    ("task parts", "MATCH (t:TaskPart {part: 'node'}) WITH t LIMIT 1 SET t.n_circuits_by_rule = [99]"),
    ("task parts", "MATCH (t:TaskPart {part: 'node'}) WITH t LIMIT 1 SET t.log2_share = t.log2_share + 1"),
    ("task parts", "MATCH (t:TaskPart {part: 'node'}) WITH t LIMIT 1 DELETE t"),
    ("task parts", "CREATE (:TaskPart {id: '\"x\" in gone', task: 'gone', part: 'node', source: 'x'})"),
    ("task parts", "CREATE (:TaskPart {id: 'circuit in ', part: 'circuit', n_prompts: 1})"),
    ("leftovers", "MATCH (p:Prompt) WITH p LIMIT 1 DETACH DELETE p"),
    ("leftovers", "CREATE (:CircuitNode:Embedding {id: 'gone/0/embedding', prompt: 'gone'})"),
    ("leftovers", "CREATE (:AttentionScore {id: 'gone/0.0/1-0', prompt: 'gone'})"),
]


def test_every_check_has_something_planted() -> None:
    assert {name for name, _ in PLANTED} == {*(question.name for question in QUESTIONS), "task parts"}


@pytest.mark.parametrize(("name", "planted"), PLANTED)
def test_a_planted_violation_is_found(store: Store, name: str, planted: str) -> None:
    register(store, synthetic_model(), synthetic_run())
    for seed in (1, 2):
        record = synthetic_prompt(seed, n_tokens=3, n_active=1)
        write_prompt(store, record, "run-1")
        write_multitoken(store, [synthetic_multitoken(record)])
    store.write(lambda transaction: transaction.run(planted).consume())
    found = {check.name: check for check in verify(store)}
    assert found[name].violations > 0
    assert found[name].example is not None


def test_direct_edges_cross_positions_through_open_attention_alone(store: Store) -> None:
    """With attention open at layer 1: from below it, but neither from its own MLP, nor up to what lies under it."""
    register(store, replace(synthetic_model(), open_attention=(1,)), synthetic_run())
    write_prompt(store, synthetic_prompt(1, n_tokens=3, n_active=1), "run-1")

    def found(source: str, target: str) -> int:
        cypher = (
            f"MATCH (u:{source}) WHERE u.position < 2 MATCH (v:{target}) WHERE v.position = 2 WITH u, v LIMIT 1 "
            "CREATE (u)-[e:DIRECT {weight: 0.0}]->(v) RETURN count(e) AS n"
        )
        assert store.write(lambda transaction: transaction.run(cypher).single(strict=True)["n"]) == 1
        return verified(store, "edges")[1]

    assert found("MLP {layer: 0}", "Logit") == 0
    assert found("Embedding", "MLP {layer: 1}") == 0
    assert found("MLP {layer: 1}", "Logit") == 1
    assert found("Embedding", "MLP {layer: 0}") == 2


def test_an_empty_store_has_nothing_to_check(store: Store) -> None:
    assert all(check.checked == check.violations == 0 for check in verify(store))
