"""A real Neo4j for the tests: a container where a Docker engine runs, else Maven's jars and a JDK.

The jars are kept in `.neo4j/` of the repository, which git ignores; every start gets an empty database,
random ports on localhost and Browser on the HTTP port.

    python -m tests.neo4j_server      runs one until Ctrl-C and prints how to reach it
"""

import contextlib
import hashlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import neo4j
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
POM = ROOT / "tests" / "neo4j" / "pom.xml"
CACHE = ROOT / ".neo4j"
IMAGE = "neo4j:5.26-community"
PASSWORD = "a password for tests"
START_SECONDS = 300
JAVA = [
    "java",
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-opens=java.base/java.util.concurrent=ALL-UNNAMED",
]
BRIEF = ["-XX:TieredStopAtLevel=1"]  # of minutes, in which the best code costs more time than it saves
CONFIGURATION = """\
server.bolt.listen_address=127.0.0.1:{bolt}
server.bolt.advertised_address=127.0.0.1:{bolt}
server.http.listen_address=127.0.0.1:{http}
server.http.advertised_address=127.0.0.1:{http}
server.memory.pagecache.size={page_cache}
dbms.usage_report.enabled=false
client.allow_telemetry=false
"""


@dataclass(frozen=True)
class Neo4jServer:
    """A running server: Bolt address, address of Browser, and the password of the user neo4j."""

    bolt: str
    http: str
    password: str


def missing() -> str | None:
    """What keeps a Neo4j from being started here, as a sentence; None if nothing does."""
    if _docker_runs() or (shutil.which("mvn") and shutil.which("java")):
        return None
    return "no Neo4j: neither a Docker engine nor Maven with a JDK is here"


@contextlib.contextmanager
def running(
    fill: Callable[[Path], None] | None = None,
    heap: str = "768m",
    page_cache: str = "128m",
    home: Path | None = None,
    options: Sequence[str] = (),
) -> Iterator[Neo4jServer]:
    """A server with an empty database, stopped at the end.

    `fill` is called with the home folder before the server starts, to import a database. With `home` the database
    is kept in this folder, and a folder that has one already is not filled again. Both need the jars, and so do `heap`
    and `page_cache`, the server's memory, and Java's `options`.
    """
    with contextlib.ExitStack() as stack:
        if _docker_runs() and fill is None and home is None:
            yield stack.enter_context(_in_container())
            return
        if home is None:
            temporary = tempfile.TemporaryDirectory(prefix="atlas-neo4j-", ignore_cleanup_errors=True)
            home = Path(stack.enter_context(temporary))
        yield stack.enter_context(_from_jars(home, fill, heap, page_cache, options))


def _docker_runs() -> bool:
    try:
        import docker

        return bool(docker.from_env(timeout=5).ping())
    except Exception:
        return False


@contextlib.contextmanager
def _in_container() -> Iterator[Neo4jServer]:
    from testcontainers.neo4j import Neo4jContainer

    with Neo4jContainer(IMAGE, password=PASSWORD) as container:
        http = f"http://{container.get_container_host_ip()}:{container.get_exposed_port(7474)}"
        yield Neo4jServer(container.get_connection_url(), http, PASSWORD)


@contextlib.contextmanager
def _from_jars(
    home: Path, fill: Callable[[Path], None] | None, heap: str, page_cache: str, options: Sequence[str]
) -> Iterator[Neo4jServer]:
    jars = _jars()
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        bolt, http = first.getsockname()[1], second.getsockname()[1]
    (home / "conf").mkdir(parents=True, exist_ok=True)
    (home / "conf" / "neo4j.conf").write_text(CONFIGURATION.format(bolt=bolt, http=http, page_cache=page_cache))
    if fill is not None and not (home / "data").exists():
        fill(home)
    log = home / "console.log"
    places = [f"--home-dir={home}", f"--config-dir={home}/conf"]
    command = [*JAVA, *options, f"-Xmx{heap}", "-cp", f"{jars}/*", "org.neo4j.server.CommunityEntryPoint", *places]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _set_password(f"bolt://127.0.0.1:{bolt}", process, log)
        yield Neo4jServer(f"bolt://127.0.0.1:{bolt}", f"http://127.0.0.1:{http}", PASSWORD)
    finally:
        process.terminate()
        process.wait()


def _jars() -> Path:
    """The folder of the server's jars, fetched when the pom changed, by one process while others wait."""
    stamp = CACHE / f"complete-{hashlib.sha256(POM.read_bytes()).hexdigest()[:12]}"
    with FileLock(f"{CACHE}.lock"):
        if not stamp.exists():
            shutil.rmtree(CACHE, ignore_errors=True)
            goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={CACHE / 'lib'}"]
            subprocess.run(["mvn", "-q", "-B", "-f", str(POM), *goal], check=True)
            stamp.touch()
    return CACHE / "lib"


def _set_password(bolt: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers, and change its first password, as it demands, unless that was done before."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with (
                neo4j.GraphDatabase.driver(bolt, auth=("neo4j", "neo4j")) as driver,
                driver.session(database="system") as session,
            ):
                session.run("ALTER CURRENT USER SET PASSWORD FROM 'neo4j' TO $new", new=PASSWORD).consume()
            return
        except neo4j.exceptions.AuthError:
            return
        except neo4j.exceptions.ServiceUnavailable as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Neo4j did not start:\n{log.read_text()[-2000:]}") from error
            time.sleep(0.5)


if __name__ == "__main__":
    with running() as neo4j_server, contextlib.suppress(KeyboardInterrupt):
        print(f"{neo4j_server.bolt}  Browser: {neo4j_server.http}  neo4j / {neo4j_server.password}", flush=True)
        while True:
            time.sleep(3600)
