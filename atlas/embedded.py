"""The embedded engine: an ArcadeDB server inside this process, reached over Bolt on localhost.

One folder is one database, and one process holds it at a time: `.lock` is locked by the kernel while
the engine runs and names the process, so a killed process never locks anyone out. The engine writes
its log to `log/engine.log` in the folder; the log of the opening before is `log/engine.log.1`. Both
of its ports are random, on 127.0.0.1 only, and guarded by the random password in the file `password`,
which only the owner can read. There are two users: the engine does not enforce a transaction's READ access,
so reading goes through a user who has no right to write.

The Java machine starts once a process and stays; `-Xrs` leaves signals to Python, and
`txWalFlush=2` makes a committed transaction survive a crash. `queryMaxHeapRAM=0` takes away the budget that queries
share: what a query with many subqueries reserves of it is given back when Java next collects garbage, not at the
query's end, so that a few hundred of them one after the other had the next one refused. Closing stops the server; a
process that forgets to close is closed at exit.
"""

import atexit
import contextlib
import gc
import json
import os
import secrets
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO, cast

from atlas.errors import AtlasError

DATABASE = "atlas"
WRITER, READER = "root", "reader"
JVM_ARGS = [
    "-Xmx2g",
    "-Xrs",
    "-Darcadedb.txWalFlush=2",
    "-Darcadedb.queryMaxHeapRAM=0",
    "-Darcadedb.installCustomFormatter=false",
]
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
RECORD_RIGHTS = ["createRecord", "readRecord", "updateRecord", "deleteRecord"]
SCHEMA_RIGHTS = ["updateSecurity", "updateSchema", "updateDatabaseSettings"]
LOGGING = """\
handlers = java.util.logging.ConsoleHandler
.level = INFO
java.util.logging.ConsoleHandler.level = INFO
java.util.logging.ConsoleHandler.formatter = java.util.logging.SimpleFormatter
java.util.logging.SimpleFormatter.format = %1$tF %1$tT %4$s %3$s %5$s%6$s%n
"""


class EmbeddedServer:
    """A running engine on `folder`; `uri` with `writer` or `reader` is what a Bolt driver needs.

    Raises AtlasError when the folder cannot be used or another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        _make_folder(self.folder)
        self._lock = _lock(self.folder)
        self._server: Any = None
        try:
            password = _password(self.folder)
            self.writer, self.reader = (WRITER, password), (READER, password)
            self.uri, self._server = _start(self.folder, password)
        except BaseException:
            self._lock.close()
            raise
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop the server and let the folder go; close every driver first. A second call does nothing."""
        if self._lock.closed:
            return
        atexit.unregister(self.stop)
        try:
            self._server.stop()
        finally:
            self._lock.close()


def is_store(folder: Path) -> bool:
    """Whether an embedded database was ever opened in `folder`."""
    return (folder / "password").is_file()


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise AtlasError(f"The store {folder} is a file; name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_store(folder) and any(name.name != ".lock" for name in folder.iterdir()):
            raise AtlasError(f"The folder {folder} holds other files and is no store; name an empty or a new folder.")
        (folder / "log").mkdir(exist_ok=True)
        (folder / "log" / "logging.properties").write_text(LOGGING)
    except OSError as error:
        raise AtlasError(f"The store {folder} cannot be written: {error.strerror}.") from error


def _lock(folder: Path) -> BinaryIO:
    try:
        file = open(folder / ".lock", "a+b")  # noqa: SIM115  held until the server stops
    except OSError as error:
        raise AtlasError(f"The store {folder} cannot be written: {error.strerror}.") from error
    if not _try_lock(file):
        file.seek(0)
        holder = file.read().decode(errors="replace").strip()
        file.close()
        if holder == str(os.getpid()):
            raise AtlasError(f"The store {folder} is held by this process; use the one that is open, or close it.")
        who = f"another process (id {holder or 'unknown'})"
        raise AtlasError(f"The store {folder} is held by {who}; close it there, or wait until it has finished.")
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file


def _try_lock(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            # The byte that is locked cannot be read by others there, so it lies behind the process id.
            file.seek(1024)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _password(folder: Path) -> str:
    """The folder's password, made on the first opening; a lost one is replaced."""
    path = folder / "password"
    if path.is_file() and (kept := path.read_text().strip()):
        return kept
    (folder / "config" / "server-users.jsonl").unlink(missing_ok=True)  # made for the lost one
    password = secrets.token_urlsafe(24)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(password)
    return password


def _start(folder: Path, password: str) -> tuple[str, Any]:
    from arcadedb_embedded import ArcadeDBError, create_server  # type: ignore[import-untyped]

    _start_jvm(folder)
    _write_groups(folder)
    bolt, http = _free_ports()
    server = cast(
        Any,
        create_server(
            root_path=str(folder),
            root_password=password,
            config={
                "host": "127.0.0.1",
                "http_port": http,
                "bolt_port": bolt,
                "bolt_maxMessageSize": MAX_MESSAGE_BYTES,
                "server_plugins": "Bolt:com.arcadedb.bolt.BoltProtocolPlugin",
            },
        ),
    )
    try:
        server.start()
        server.create_database(DATABASE)
        _create_reader(server, password)
    except BaseException as error:
        server.stop()
        if not isinstance(error, ArcadeDBError):
            raise
        reason = str(error).splitlines()[0]
        log = folder / "log" / "engine.log"
        raise AtlasError(f"The store {folder} cannot be opened: {reason} (its log is {log}).") from error
    return f"bolt://127.0.0.1:{bolt}", server


def _write_groups(folder: Path) -> None:
    """Who may do what; the engine's own file has no group that only reads."""
    groups = {
        "admin": _group(SCHEMA_RIGHTS, RECORD_RIGHTS),
        READER: _group([], ["readRecord"]),
        "*": _group([], []),
    }
    (folder / "config").mkdir(exist_ok=True)
    text = json.dumps({"databases": {"*": {"groups": groups}}, "version": 2})
    (folder / "config" / "server-groups.json").write_text(text)


def _group(schema_rights: list[str], record_rights: list[str]) -> dict[str, object]:
    types = {"*": {"access": record_rights}}
    return {"resultSetLimit": -1, "readTimeout": -1, "access": schema_rights, "types": types}


def _create_reader(server: Any, password: str) -> None:
    import jpype  # type: ignore[import-untyped]

    security = server._java_server.getSecurity()
    if security.existsUser(READER):
        return
    user = {"name": READER, "password": str(security.encodePassword(password)), "databases": {DATABASE: [READER]}}
    JSONObject: Any = jpype.JClass("com.arcadedb.serializer.json.JSONObject")
    security.createUser(JSONObject(json.dumps(user)))


def _start_jvm(folder: Path) -> None:
    """Start the Java machine if it does not run yet, and send what it prints to the folder's log."""
    import jpype  # type: ignore[import-untyped]
    from arcadedb_embedded.jvm import start_jvm  # type: ignore[import-untyped]

    log = folder / "log" / "engine.log"
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    if not cast(Any, jpype).isJVMStarted():
        os.environ.setdefault("ARCADEDB_JVM_ERROR_FILE", str(folder / "log" / "crash%p.log"))
        with _stdout_to(log):
            start_jvm(jvm_args=JVM_ARGS)
        _give_pages_half_of_the_heap()
        _part_the_collectors()
    java: Any = jpype.JPackage("java")
    stream = java.io.PrintStream(java.io.FileOutputStream(str(log), True), True)
    java.lang.System.setOut(stream)
    java.lang.System.setErr(stream)
    java.lang.System.setProperty("java.util.logging.config.file", str(folder / "log" / "logging.properties"))
    java.util.logging.LogManager.getLogManager().readConfiguration()


def _give_pages_half_of_the_heap() -> None:
    """Instead of the engine's quarter, so that more of a large store stays at hand; what the user sets is kept."""
    import jpype  # type: ignore[import-untyped]

    java: Any = jpype.JPackage("java")
    setting = cast(Any, jpype.JClass("com.arcadedb.GlobalConfiguration")).MAX_PAGE_RAM
    if not java.lang.System.getProperty(setting.getKey()):
        setting.setValue(java.lang.Runtime.getRuntime().maxMemory() // 2**21)  # in MB


def _part_the_collectors() -> None:
    """Let Java and Python collect garbage apart: nothing of ours is held by an object on the other side.

    JPype has each ask the other for a full collection, and where torch is loaded, those of Python take 0.3 seconds
    each, in an ingestion half of all time. Without the callback by which it hears of their end, it asks once.
    """
    import jpype  # type: ignore[import-untyped]

    collect = cast(Any, jpype)._jpype._collect
    gc.callbacks[:] = [callback for callback in gc.callbacks if callback is not collect]


@contextlib.contextmanager
def _stdout_to(log: Path) -> Generator[None]:
    """Send the process's own output streams to a file: a starting Java machine writes to them directly."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
