"""The databases that tests run on: one server of each engine a session, emptied for every test.

`store` runs a test on both engines. Where no Neo4j can be started, its half is skipped with one line;
with `neo4j` among ATLAS_TEST_REQUIRE that is a failure instead. `browser` is a headless Chromium, and
likewise: `browser` among ATLAS_TEST_REQUIRE makes a missing one a failure.
"""

import faulthandler
import os
from collections.abc import Iterator
from typing import NoReturn

import pytest
from playwright.sync_api import Browser, sync_playwright

from atlas import embedded
from atlas.schema import prepare
from atlas.store import Store, connect
from atlas.views import chromium
from tests import neo4j_server
from tests.neo4j_server import Neo4jServer


@pytest.fixture(scope="session", autouse=True)
def _session() -> Iterator[None]:
    """No settings from outside, one thread for commands, and signals as the embedded engine's Java machine needs them.

    It uses SIGSEGV for its own purposes; pytest's faulthandler would, at the end, put the handler from
    before the Java machine back, and the next such signal would kill the process.
    """
    faulthandler.disable()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ATLAS_STORE", "NEO4J_USERNAME", "NEO4J_PASSWORD", "NEO4J_PASSWORD_FILE"):
            patch.delenv(name, raising=False)
        # Of commands that tests start, side by side on two cores: threads that spin for each other starve the rest.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(embedded, "JVM_ARGS", [*embedded.JVM_ARGS, *neo4j_server.BRIEF])
        yield


@pytest.fixture(scope="session")
def neo4j_real() -> Iterator[Neo4jServer]:
    """A running Neo4j; NEO4J_PASSWORD is set to its password for the rest of the session."""
    if reason := neo4j_server.missing():
        _go_without("neo4j", reason)
    with neo4j_server.running(options=neo4j_server.BRIEF) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEO4J_PASSWORD", server.password)
        yield server


@pytest.fixture(scope="session")
def _neo4j_session(neo4j_real: Neo4jServer) -> Iterator[Store]:
    with connect(neo4j_real.bolt) as store:
        yield store


@pytest.fixture(scope="session")
def _embedded_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with connect(tmp_path_factory.mktemp("embedded") / "store") as store:
        yield store


@pytest.fixture
def embedded_store(_embedded_session: Store) -> Store:
    """The embedded engine, prepared and otherwise empty."""
    return emptied(_embedded_session)


@pytest.fixture
def neo4j_store(_neo4j_session: Store) -> Store:
    """A real Neo4j, prepared and otherwise empty."""
    return emptied(_neo4j_session)


@pytest.fixture(params=["embedded", pytest.param("neo4j", marks=pytest.mark.neo4j)])
def store(request: pytest.FixtureRequest) -> Store:
    """A prepared and otherwise empty store, on each engine in turn."""
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; a test opens its own context in it, and closes that."""
    path = chromium.executable()
    if path is None:
        _go_without("browser", "no browser: neither Chromium nor one made from it is here")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


def _go_without(part: str, reason: str) -> NoReturn:
    """Skip a test for want of `part`, or fail it where ATLAS_TEST_REQUIRE demands that part."""
    if part in os.environ.get("ATLAS_TEST_REQUIRE", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


def emptied(store: Store) -> Store:
    """The store prepared and otherwise empty."""
    store.write(lambda transaction: transaction.run("MATCH (n) WHERE NOT n:Schema DETACH DELETE n").consume())
    prepare(store)
    return store
