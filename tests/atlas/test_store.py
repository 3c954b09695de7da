"""What the store promises on either engine: frames out, read-only reading, whole writing, clear refusals."""

import socket

import pytest

from atlas import AtlasError, connect
from atlas.records import SCHEMA_VERSION
from atlas.schema import prepare
from atlas.store import Store, check_version
from tests.neo4j_server import Neo4jServer


def _count(store: Store) -> int:
    return int(store.read("MATCH (n) RETURN count(n) AS n")["n"][0])


def _create(store: Store, **properties: object) -> None:
    store.write(lambda transaction: transaction.run("CREATE (n:Run) SET n = $p", p=properties).consume())


def test_rows_come_as_a_frame(store: Store) -> None:
    frame = store.read("UNWIND $xs AS x RETURN x, 'a' AS letter ORDER BY x", xs=[2, 1])
    assert frame.to_dict("list") == {"x": [1, 2], "letter": ["a", "a"]}


def test_columns_are_there_without_rows(store: Store) -> None:
    frame = store.read("UNWIND [] AS x RETURN x.a AS first, count(x), 'from, RETURN' AS `a column` ORDER BY first")
    assert list(frame.columns) == ["first", "count(x)", "a column"]
    assert frame.empty


def test_nodes_edges_and_paths_are_readable(store: Store) -> None:
    _create(store, id="a")
    query = "MATCH (a:Run {id: 'a'}) CREATE (a)-[:WROTE {n: 1}]->(:Prompt {id: 'b'})"
    store.write(lambda transaction: transaction.run(query).consume())
    row = store.read("MATCH p = (a:Run)-[e:WROTE]->() RETURN a, e, p, [a] AS list, {x: a} AS map").iloc[0]
    a, b = {"id": "a"}, {"id": "b"}
    assert row.to_dict() == {"a": a, "e": {"n": 1}, "p": [a, b], "list": [a], "map": {"x": a}}


def test_batches_are_the_rows_in_order(store: Store) -> None:
    batches = list(store.read_batches("UNWIND range(1, 25) AS x RETURN x", size=10))
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert [x for batch in batches for x in batch["x"]] == list(range(1, 26))


def test_an_abandoned_batch_leaves_the_store_usable(store: Store) -> None:
    batches = store.read_batches("UNWIND range(1, 25000) AS x RETURN x", size=10)
    next(batches)
    del batches
    assert store.read("RETURN 1 AS one")["one"][0] == 1


@pytest.mark.parametrize(
    "query",
    [
        "CREATE (n:Run {id: 'new'})",
        "CREATE (n:Run {id: 'new'}) RETURN n.id AS id",
        "MERGE (n:Unheard {id: 'new'})",
        "MATCH (n:Run) SET n.status = 'changed'",
        "MATCH (n:Run) SET n.status = 'changed' RETURN n.status AS status",
        "MATCH (n:Run) REMOVE n.status",
        "MATCH (n) DETACH DELETE n",
        "CREATE INDEX planted FOR (n:Run) ON (n.status)",
        "CREATE CONSTRAINT planted FOR (n:Run) REQUIRE n.status IS UNIQUE",
        "CALL { MATCH (n:Run) SET n.status = 'changed' } IN TRANSACTIONS",
    ],
)
def test_reading_cannot_write(store: Store, query: str) -> None:
    _create(store, id="kept", status="running")
    before = _count(store)
    with pytest.raises(AtlasError):
        store.read(query)
    assert _count(store) == before
    assert store.read("MATCH (n:Run) RETURN n")["n"].to_list() == [{"id": "kept", "status": "running"}]
    assert "planted" not in store.read("SHOW INDEXES")["name"].to_list()
    assert "planted" not in store.read("SHOW CONSTRAINTS")["name"].to_list()


@pytest.mark.parametrize("query", ["MATCH (n RETURN n", "RETURN $missing AS x", "RETURN 1/0 AS x", "RETURN nothing"])
def test_a_wrong_query_is_one_sentence(store: Store, query: str) -> None:
    with pytest.raises(AtlasError, match=r"^The database at .* answers: .+") as caught:
        store.read(query)
    assert "\n" not in str(caught.value)


def test_work_that_fails_leaves_nothing(store: Store) -> None:
    before = _count(store)

    def work(transaction):  # type: ignore[no-untyped-def]
        transaction.run("CREATE (:Run {id: 'half'})-[:WROTE]->(:Prompt {id: 'written'})").consume()
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        store.write(work)
    assert _count(store) == before


def test_a_key_cannot_stand_twice(store: Store) -> None:
    _create(store, id="once")
    with pytest.raises(AtlasError):
        _create(store, id="once")


def test_preparing_again_changes_nothing(store: Store) -> None:
    before = store.read("SHOW INDEXES")["name"].to_list()
    store.write(lambda transaction: transaction.run("MATCH (s:Schema) DELETE s").consume())
    assert check_version(store) is None
    prepare(store)
    assert store.read("SHOW INDEXES")["name"].to_list() == before
    assert check_version(store) == SCHEMA_VERSION


def test_a_newer_schema_is_refused(store: Store) -> None:
    def set_version(version: int) -> None:
        store.write(lambda transaction: transaction.run("MATCH (s:Schema) SET s.version = $v", v=version).consume())

    set_version(SCHEMA_VERSION + 1)
    try:
        with pytest.raises(AtlasError, match="update circuit-atlas"):
            prepare(store)
        if store.engine == "neo4j":
            with pytest.raises(AtlasError, match="update circuit-atlas"):
                connect(store.address)
    finally:
        set_version(SCHEMA_VERSION)


def test_nobody_answers() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(AtlasError, match="No database answers at bolt://127"):
            connect(f"bolt://127.0.0.1:{unused.getsockname()[1]}")


@pytest.mark.parametrize(
    "address", ["http://localhost:7474", "bolt:///", "nonsense://x", "bolt://localhost:port", "bolt://nowhere.invalid"]
)
def test_what_is_no_bolt_address(address: str) -> None:
    with pytest.raises(AtlasError):
        connect(address)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(AtlasError, match="NEO4J_PASSWORD") as caught:
        connect("bolt://neo4j:secret@127.0.0.1:7687")
    assert "secret" not in str(caught.value)


def test_a_password_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEO4J_PASSWORD", raising=False)
    monkeypatch.setenv("NEO4J_PASSWORD_FILE", "/nowhere/password")
    with pytest.raises(AtlasError, match="/nowhere/password"):
        connect("bolt://127.0.0.1:7687")


@pytest.mark.neo4j
@pytest.mark.parametrize("password", ["wrong-secret", None])
def test_a_refused_password(neo4j_real: Neo4jServer, monkeypatch: pytest.MonkeyPatch, password: str | None) -> None:
    monkeypatch.delenv("NEO4J_PASSWORD")
    if password:
        monkeypatch.setenv("NEO4J_PASSWORD", password)
    with pytest.raises(AtlasError, match="refuses the user or the password") as caught:
        connect(neo4j_real.bolt)
    assert "wrong-secret" not in str(caught.value)


@pytest.mark.neo4j
def test_a_password_from_a_file(neo4j_real: Neo4jServer, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("NEO4J_PASSWORD")
    (tmp_path / "password").write_text(neo4j_real.password + "\n")
    monkeypatch.setenv("NEO4J_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("ATLAS_STORE", neo4j_real.bolt)
    with connect() as store:
        assert store.engine == "neo4j"
        assert store.read("RETURN 1 AS one")["one"][0] == 1
        assert neo4j_real.password not in repr(store) + str(vars(store))


def test_what_a_user_writes_wrongly_warns_nobody(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    store.read("MATCH (n:NoSuchLabel)-[:NO_SUCH_TYPE]->(m) RETURN n.no_such_property AS x, m")
    assert capfd.readouterr() == ("", "")
