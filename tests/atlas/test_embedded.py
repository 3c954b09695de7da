"""The embedded engine as processes see it: one at a time, clean output, and nothing lost to kill -9."""

import gc
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jpype
import pytest

from atlas import AtlasError, connect

HOLD = """
import sys, atlas
store = atlas.connect(sys.argv[1])
store.write(lambda t: t.run("CREATE (:Run {id: 'committed'})").consume())
print("ready", flush=True)
sys.stdin.read()
"""
FORGET = """
import sys, atlas
store = atlas.connect(sys.argv[1])
print(store.read("RETURN 1 AS one")["one"][0])
"""


def _python(code: str, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=cwd)


def test_a_held_folder_is_refused_and_a_killed_holder_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    holder = _python(HOLD, folder, cwd=tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    with pytest.raises(AtlasError, match=rf"held by another process \(id {holder.pid}\)"):
        connect(folder)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with connect(folder) as store:
        assert store.read("MATCH (n:Run) RETURN n.id AS id")["id"].to_list() == ["committed"]
        with pytest.raises(AtlasError, match="held by this process"):
            connect(folder)


def test_a_process_prints_only_its_own_words_and_ends(tmp_path: Path) -> None:
    process = _python(FORGET, "store", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (out, err, process.returncode) == ("1\n", "", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert "ArcadeDB Server is down" in (tmp_path / "store" / "log" / "engine.log").read_text()


def test_half_of_the_heap_is_for_pages(tmp_path: Path) -> None:
    import jpype  # type: ignore[import-untyped]

    with connect(tmp_path / "store"):
        heap = jpype.JPackage("java").lang.Runtime.getRuntime().maxMemory()
        assert jpype.JClass("com.arcadedb.engine.PageManager").INSTANCE.getStats().maxRAM == heap // 2


@pytest.mark.usefixtures("embedded_store")
def test_no_query_is_refused_for_what_others_have_reserved() -> None:
    assert jpype.JClass("com.arcadedb.query.sql.executor.QueryHeapBudget").getLimitBytes() == 0


@pytest.mark.usefixtures("embedded_store")
def test_collections_of_garbage_in_java_bring_none_in_python() -> None:
    full: list[int] = []

    def seen(phase: str, info: dict[str, int]) -> None:
        full[-1] += phase == "start" and info["generation"] == 2

    gc.callbacks.append(seen)
    for _ in range(3):
        full.append(0)
        jpype.JClass("java.lang.System").gc()
        time.sleep(0.6)
        gc.collect(0)
    gc.callbacks.remove(seen)
    assert full[-2:] == [0, 0]  # it may ask once


def test_a_folder_opens_again_also_without_its_password(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with connect(folder) as store:
        store.write(lambda transaction: transaction.run("CREATE (:Run {id: 'kept'})").consume())
        assert store.engine == "embedded"
        assert store.address == str(folder)
    password = folder / "password"
    assert stat.S_IMODE(os.stat(password).st_mode) == 0o600
    assert password.read_text() not in repr(store) + (folder / "log" / "engine.log").read_text()
    password.unlink()
    (folder / "password").write_text("")
    with connect(folder) as store:
        assert store.read("MATCH (n:Run) RETURN n.id AS id")["id"].to_list() == ["kept"]


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(AtlasError, match="holds other files"):
        connect(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AtlasError, match="is a file"):
        connect(tmp_path / "file")
    with pytest.raises(AtlasError, match="cannot be written"):
        connect(tmp_path / "file" / "below")


def test_reading_commands_do_not_make_a_store(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="There is no store in"):
        connect(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()
