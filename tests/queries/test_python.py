"""Questions as a person asks them in Python: typed, streamed, as a graph, and unable to change anything."""

import math
from pathlib import Path

import networkx
import pandas as pd
import pytest

import queries
from atlas.errors import AtlasError
from atlas.store import Store, connect
from queries import ask
from queries.catalogue import parse, questions
from tests.graph import graph_in
from tests.queries import expected
from tests.queries.conftest import Filled

WRITING = """\
// What if a question wrote?
//
// Parameters:
//   feature: string; e.g. "m/1"; a feature
//
// Columns, in order:
//   x*: integer; a number
//
// In Neo4j Browser, first:
//   :param {feature: "m/1"}
"""
WRITES = [
    "CREATE (n:Feature {id: 'new'}) RETURN 1 AS x",
    "MERGE (n:Prompt {id: 'new'}) RETURN 1 AS x",
    "MATCH (n:Prompt) SET n.task = 'mine' RETURN 1 AS x",
    "MATCH (n:Prompt) REMOVE n.text RETURN 1 AS x",
    "MATCH (n:CircuitNode) DETACH DELETE n RETURN 1 AS x",
    "MATCH ()-[r:OV]->() DELETE r RETURN 1 AS x",
    "MATCH (n:Prompt) CALL (n) { SET n.task = 'mine' RETURN 1 AS x } RETURN x",
    "MATCH (n:Prompt) FOREACH (i IN [1] | SET n.task = 'mine') RETURN 1 AS x",
    "MATCH (n:Prompt) CALL (n) { DETACH DELETE n } IN TRANSACTIONS OF 1 ROW RETURN 1 AS x",
    "DROP CONSTRAINT prompt_id",
    "CREATE INDEX mine FOR (n:Prompt) ON (n.text)",
]


def everything(store: Store) -> object:
    """All that is in the store: every prompt whole, and how many there are of every kind of node and edge."""
    prompts = store.read("MATCH (p:Prompt) RETURN p.id AS id ORDER BY id")["id"].tolist()
    counts = [
        store.read("MATCH (n) RETURN labels(n)[0] AS what, count(*) AS n ORDER BY what").to_dict(),
        store.read("MATCH ()-[r]->() RETURN type(r) AS what, count(*) AS n ORDER BY what").to_dict(),
    ]
    return [graph_in(store, str(prompt)) for prompt in prompts], counts


def answer_or_refusal(store: Store, name: str, given: dict[str, object]) -> pd.DataFrame | str:
    try:
        return ask.ask(store, name, given)
    except AtlasError as error:
        return str(error)


def test_a_question_cannot_write(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to write, as the Cypher of a question, whole and streamed: nothing of it happens."""
    before = everything(filled.store)
    for cypher in WRITES:
        monkeypatch.setattr(ask, "question", lambda name, cypher=cypher: parse(name, WRITING + cypher))
        with pytest.raises(AtlasError):
            ask.ask(filled.store, "writing", {"feature": "a"})
        with pytest.raises(AtlasError):
            list(queries.batches(filled.store, "writing", feature="a"))
    assert everything(filled.store) == before


def test_hostile_parameters_stay_data(filled: Filled) -> None:
    before = everything(filled.store)
    for text in ["'}) DETACH DELETE n //", '"` \\ $feature \x00 🜁 {id: 1}']:
        for asked in questions().values():
            texts = [p.name for p in asked.parameters if not p.choices and p.type not in ("integer", "float")]
            required = {p.name: p.example for p in asked.parameters if p.required}
            for left in ("feature", "node") if {"feature", "node"} <= {*texts} else ("",):  # they exclude each other
                given = required | dict.fromkeys((name for name in texts if name != left), text)
                found = answer_or_refusal(filled.store, asked.name, given)
                assert isinstance(found, pd.DataFrame) or found.startswith("There is no"), asked.name
    assert everything(filled.store) == before


def test_batches_together_are_the_answer(filled: Filled) -> None:
    store = filled.store
    whole = queries.circuits(store, limit=100_000)
    assert len(whole) > 7
    found = list(queries.batches(store, "circuits", size=3))
    assert [len(frame) for frame in found[:-1]] == [3] * (len(found) - 1)
    pd.testing.assert_frame_equal(pd.concat(found, ignore_index=True), whole)
    limited = queries.batches(store, "circuits", size=2, limit=5, task="stones")
    wanted = queries.circuits(store, limit=5, task="stones")
    pd.testing.assert_frame_equal(pd.concat(limited, ignore_index=True), wanted)


def test_batches_are_read_one_at_a_time_beside_other_questions(filled: Filled) -> None:
    store = filled.store
    streamed = queries.batches(store, "circuits", size=1)
    first = next(streamed)
    edges = queries.circuit(store, first["circuit"][0])
    assert set(edges["target"]) <= set(edges.nodes["node"])
    streamed.close()  # type: ignore[attr-defined]
    assert len(queries.circuits(store)) > 1


def test_nothing_found_is_one_empty_batch_and_a_mistake_is_told(filled: Filled) -> None:
    store = filled.store
    (only,) = queries.batches(store, "circuits", rule="top_mass")
    pd.testing.assert_frame_equal(only, queries.circuits(store, rule="top_mass"))
    with pytest.raises(AtlasError, match="There is no task 'stonse' in the store; nearest: stones"):
        list(queries.batches(store, "circuits", task="stonse"))
    with pytest.raises(AtlasError, match="rule takes one of paper"):
        queries.batches(store, "circuits", rule="none")
    with pytest.raises(AtlasError, match="size takes a number of rows, 1 or more, not 0"):
        queries.batches(store, "circuits", size=0)


def test_progress_counts_on_the_error_stream(filled_embedded: Filled, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sum(len(frame) for frame in queries.batches(filled_embedded.store, "circuits", size=2, progress=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert f"circuits: {rows} rows" in err
    list(queries.batches(filled_embedded.store, "circuits"))
    assert capsys.readouterr() == ("", "")


def test_a_circuit_as_a_graph(filled: Filled) -> None:
    t = filled.tables
    rows = t.nodes.set_index("id")
    for name in t.circuits["circuit"]:
        circuit = queries.circuit(filled.store, name)
        graph = circuit.to_networkx()
        wanted = expected.circuit(t, name)
        assert set(graph) == set(t.members.loc[t.members["circuit"] == name, "node"])
        assert graph.number_of_edges() == len(wanted)
        assert networkx.is_directed_acyclic_graph(graph)
        for edge in wanted.to_dict("records"):
            ov = edge["via"] == "OV"
            key = f"L{edge['layer']:.0f}.H{edge['head']:.0f}" if ov else "DIRECT"
            found = graph.edges[edge["source"], edge["target"], key]
            assert math.isclose(found["weight"], edge["weight"], rel_tol=1e-12)
            assert ("pattern" in found) == ov
        (root,) = [node for node, data in graph.nodes(data=True) if data["root"]]
        assert root == t.circuits.set_index("circuit")["root"][name]
        for node, data in graph.nodes(data=True):
            row = rows.loc[node]
            assert (data["name"], data["kind"], data["layer"]) == (row["name"], row["kind"], row["layer"])
            assert data.get("feature", "none") == (row["feature"] if pd.notna(row["feature"]) else "none")
            assert not any(value is pd.NA for value in data.values())


def test_rows_of_a_circuit_are_a_circuit_of_the_same_nodes(filled_embedded: Filled) -> None:
    store = filled_embedded.store
    name = filled_embedded.tables.circuits.sort_values("n_edges")["circuit"].iloc[-1]
    circuit = queries.circuit(store, name)
    strong = circuit[circuit["share"].abs() >= circuit["share"].abs().median()]
    assert isinstance(strong, queries.Circuit)
    assert 0 < strong.to_networkx().number_of_edges() < len(circuit)
    assert set(strong.to_networkx()) == set(circuit.nodes["node"])
    with pytest.raises(AtlasError, match="needs the circuit's columns source"):
        circuit[["share", "weight"]].to_networkx()
    with pytest.raises(AtlasError, match="needs the circuit's columns source"):
        circuit[["share", "weight"]].render()
    joined = pd.concat([circuit.head(1), circuit.tail(1)])
    with pytest.raises(AtlasError, match="leaves the nodes behind"):
        joined.to_networkx()
    joined.nodes = circuit.nodes
    assert joined.to_networkx().number_of_edges() == 2


def test_connect_without_a_name_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AtlasError, match=r"There is no store in .*atlas-store; make one with `atlas ingest`"):
        connect()
    monkeypatch.setenv("ATLAS_STORE", str(tmp_path / "typo"))
    with pytest.raises(AtlasError, match=r"There is no store in .*typo"):
        connect()
    assert list(tmp_path.iterdir()) == []
    with connect(tmp_path / "mine") as made:
        assert made.engine == "embedded"
    monkeypatch.setenv("ATLAS_STORE", str(tmp_path / "mine"))
    with connect() as opened:
        assert opened.address == str(tmp_path / "mine")
