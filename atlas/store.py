"""The store: one small object in front of the embedded engine and of any Neo4j.

    with connect("atlas-store") as store:
        store.read("MATCH (c:Circuit) RETURN c.id AS id, c.n_nodes AS nodes")

Reading cannot change anything: a query runs in an explicit transaction with READ access that is
rolled back at its end. Writing happens in managed transactions only, which are retried when the
database asks for it, and are on disk when `write` returns.

A Neo4j's user is NEO4J_USERNAME (default neo4j); its password NEO4J_PASSWORD, or the first line of
the file that NEO4J_PASSWORD_FILE names.
"""

import atexit
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, LiteralString, TypeVar, cast
from urllib.parse import urlsplit

import neo4j
import pandas as pd
from neo4j.exceptions import AuthError, DriverError, Neo4jError, ServiceUnavailable
from neo4j.graph import Node, Relationship
from neo4j.graph import Path as GraphPath

from atlas import embedded
from atlas.collector import paused
from atlas.columns import returned_columns
from atlas.errors import AtlasError
from atlas.records import SCHEMA_VERSION

DEFAULT_FOLDER = "atlas-store"
SCHEMES = ("bolt", "bolt+s", "bolt+ssc", "neo4j", "neo4j+s", "neo4j+ssc")
CONNECTION_TIMEOUT = 15.0  # seconds

T = TypeVar("T")

_PLAIN: set[type] = {str, int, float, bool, type(None)}  # what is the same in a frame as it comes from the driver

# A retried transaction is no news for a terminal; a program that wants the driver's log adds a handler.
logging.getLogger("neo4j").addHandler(logging.NullHandler())


def connect(where: str | Path | None = None, *, create: bool = True) -> "Store":
    """Open the store at `where`: a Bolt address (it has `://`) or a folder of the embedded engine.

    A folder that is named is made where it is missing, unless `create` is false. None means ATLAS_STORE
    of the environment, or else the folder `atlas-store` in the working directory, and makes nothing.
    Raises AtlasError when there is no store, when the server is not there or refuses the password, when
    the folder cannot be used, and when a newer program wrote the database.
    """
    place = str(where or os.environ.get("ATLAS_STORE") or DEFAULT_FOLDER)
    create = create and where is not None
    store = _connect_neo4j(place) if "://" in place else _open_folder(Path(place), create)
    try:
        check_version(store)
    except BaseException:
        store.close()
        raise
    return store


def check_version(store: "Store") -> int | None:
    """The version of the schema that the database records; None where nothing was prepared yet.

    Raises AtlasError if a newer program wrote the database.
    """
    found = store.read("MATCH (s:Schema {id: 'atlas'}) RETURN s.version AS version")["version"]
    if found.empty:
        return None
    version = int(found.iloc[0])
    if version > SCHEMA_VERSION:
        raise AtlasError(
            f"The database at {store.address} has schema {version}, and this program knows up to "
            f"{SCHEMA_VERSION}; update circuit-atlas, or use another store."
        )
    return version


class Store:
    """An open store; close it, or use it as a context manager.

    `engine` is "embedded" or "neo4j"; `address` names the folder or the server, without a password.
    """

    def __init__(
        self,
        address: str,
        writer: neo4j.Driver,
        reader: neo4j.Driver,
        server: embedded.EmbeddedServer | None = None,
    ) -> None:
        self.address = address
        self.engine = "embedded" if server else "neo4j"
        self._writer = writer
        self._reader = reader
        self._server = server
        self._database = embedded.DATABASE if server else None
        # An open connection would keep the embedded engine, and with it the process, from ending.
        atexit.register(self.close)

    def read(self, cypher: str, /, **parameters: Any) -> pd.DataFrame:
        """The rows of a query, one column per returned key (also when there is no row).

        Nodes and relationships come as dicts of their properties. Raises AtlasError with the
        database's own sentence when the query is wrong or tries to write.
        """
        with self._reading(cypher, parameters, size=10_000) as result:
            keys = list(result.keys()) or returned_columns(cypher)
            return _frame(result, keys)

    def read_columns(self, cypher: str, /, **parameters: Any) -> dict[str, Sequence[Any]]:
        """The rows of a query as `read` has them, but as one sequence of plain values per returned key.

        For who knows the types: pandas would look for them in every value.
        """
        with self._reading(cypher, parameters, size=10_000) as result:
            keys = list(result.keys()) or returned_columns(cypher)
            # A record is a tuple whose own iterator is slow; most columns hold nothing but plain values.
            columns = list(zip(*map(cast(Any, tuple).__iter__, result), strict=True)) or [()] * len(keys)
        return {key: _plain_column(values) for key, values in zip(keys, columns, strict=True)}

    def read_batches(self, cypher: str, /, *, size: int = 10_000, **parameters: Any) -> Iterator[pd.DataFrame]:
        """The rows of a query as DataFrames of at most `size` rows each; none when there is no row."""
        with self._reading(cypher, parameters, size) as result:
            keys = list(result.keys())
            while rows := result.fetch(size):
                yield _frame(rows, keys)

    def explain(self, cypher: str, /, **parameters: Any) -> str:
        """The plan by which the database would run the query, in its own words; nothing is run."""
        with self._reading("EXPLAIN " + cypher, parameters, size=1) as result:
            plan = cast(Any, result.consume()).plan
        return str(plan["args"]["string-representation"]).strip()

    def change(self, cypher: str, /, **parameters: Any) -> pd.DataFrame:
        """Run one query that may change the store, whole or not at all, and return its rows as `read` does."""

        def work(transaction: neo4j.ManagedTransaction) -> pd.DataFrame:
            result = transaction.run(cast(LiteralString, cypher), parameters)
            return _frame(result, list(result.keys()) or returned_columns(cypher))

        return self.write(work)

    def write(self, work: Callable[[neo4j.ManagedTransaction], T]) -> T:
        """Run `work` in one managed write transaction, again where the database asks for a retry.

        Either all that `work` wrote is stored when this returns, or nothing is. Raises AtlasError
        when the database refuses.
        """
        with paused(), _sentences(self.address), self._session(self._writer, neo4j.WRITE_ACCESS) as session:
            return session.execute_write(work)

    def close(self) -> None:
        """Close the connection, and stop the engine if it is the embedded one."""
        atexit.unregister(self.close)
        self._reader.close()
        self._writer.close()
        if self._server:
            self._server.stop()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.address!r})"

    def _session(self, driver: neo4j.Driver, access: str, size: int = 10_000) -> neo4j.Session:
        open_session = cast(Any, driver).session
        return open_session(database=self._database, default_access_mode=access, fetch_size=size)

    @contextmanager
    def _reading(self, cypher: str, parameters: dict[str, Any], size: int) -> Generator[neo4j.Result]:
        with (
            _sentences(self.address),
            self._session(self._reader, neo4j.READ_ACCESS, size) as session,
            session.begin_transaction() as transaction,
        ):
            result = transaction.run(cast(LiteralString, cypher), parameters)
            yield result
            if result.consume().counters.contains_updates:
                raise AtlasError("The query would write, and queries only read; nothing was changed.")
            transaction.rollback()


def _open_folder(folder: Path, create: bool) -> Store:
    if not create and not embedded.is_store(folder.expanduser()):
        raise AtlasError(f"There is no store in {folder.absolute()}; make one with `atlas ingest`, or name another.")
    server = embedded.EmbeddedServer(folder)
    writer, reader = _driver(server.uri, server.writer), _driver(server.uri, server.reader)
    return Store(str(server.folder), writer, reader, server)


def _connect_neo4j(uri: str) -> Store:
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise AtlasError("Keep the password out of the store's address: set NEO4J_USERNAME and NEO4J_PASSWORD.")
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise AtlasError(f"The store's address {uri} is not one of a Neo4j; it looks like bolt://localhost:7687.")
    auth = _credentials()
    try:
        driver = _driver(uri, auth)
    except (DriverError, ValueError) as error:
        raise AtlasError(f"The store's address {uri} is not one of a Neo4j: {_first_line(error)}") from error
    try:
        with _sentences(uri):
            cast(Any, driver).verify_connectivity()
    except BaseException as error:
        driver.close()
        if isinstance(error, ValueError):  # the driver's word for a host or port that nobody knows
            raise AtlasError(f"No database answers at {uri}: {_first_line(error)}") from error
        raise
    return Store(uri, driver, driver)


def _driver(uri: str, auth: tuple[str, str] | None) -> neo4j.Driver:
    return cast(Any, neo4j.GraphDatabase).driver(
        uri,
        auth=auth,
        connection_timeout=CONNECTION_TIMEOUT,
        notifications_min_severity=neo4j.NotificationMinimumSeverity.OFF,
        warn_notification_severity=neo4j.NotificationMinimumSeverity.OFF,
    )


def _credentials() -> tuple[str, str] | None:
    """User and password from the environment; None where no password is set (a server without any)."""
    user = os.environ.get("NEO4J_USERNAME") or "neo4j"
    if password := os.environ.get("NEO4J_PASSWORD"):
        return user, password
    path = os.environ.get("NEO4J_PASSWORD_FILE")
    if not path:
        return None
    try:
        return user, Path(path).read_text(encoding="utf-8").splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise AtlasError(f"No password can be read from {path}, which NEO4J_PASSWORD_FILE names.") from error


@contextmanager
def _sentences(address: str) -> Generator[None]:
    """Turn what the driver raises into AtlasError."""
    try:
        yield
    except AuthError as error:
        raise AtlasError(
            f"The database at {address} refuses the user or the password; check NEO4J_USERNAME and NEO4J_PASSWORD."
        ) from error
    except ServiceUnavailable as error:
        raise AtlasError(f"No database answers at {address}; start it, or check the address.") from error
    except (Neo4jError, DriverError) as error:
        raise AtlasError(f"The database at {address} answers: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


def _frame(rows: neo4j.Result | Sequence[neo4j.Record], keys: list[str]) -> pd.DataFrame:
    values = [[_plain(value) for value in row.values()] for row in rows]
    return pd.DataFrame(values, columns=pd.Index(keys, dtype=object))


def _plain_column(values: Sequence[Any]) -> Sequence[Any]:
    return values if {type(value) for value in values} <= _PLAIN else [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """Graph values as dicts and lists, times as Python's own; everything else as it is."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (Node, Relationship, dict)):
        return {key: _plain(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, GraphPath):
        return [_plain(item) for item in value.nodes]
    if isinstance(value, list):
        return [_plain(item) for item in cast(list[Any], value)]
    return value.to_native() if hasattr(value, "to_native") else value
