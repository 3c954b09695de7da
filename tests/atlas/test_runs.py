"""Runs that were killed, told from those that still run."""

import subprocess
import sys
from dataclasses import replace

import pytest

from atlas.runs import end_lost, lost, this_process
from atlas.store import Store
from atlas.writer import finish_run, register
from tests.synthetic import synthetic_model, synthetic_run


@pytest.fixture
def begun(store: Store) -> Store:
    """Runs of this process, of one that has ended, of one on another host, and two that have ended well."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, _, own = this_process().rpartition(":")
    processes = {
        "own": this_process(),
        "dead": f"{host}:{dead.pid}",
        "elsewhere": f"not-{host}:{own}",
        "unknown": None,
        "done": this_process(),
        "failed": f"{host}:{dead.pid}",
    }
    for id, process in processes.items():
        register(store, synthetic_model(), replace(synthetic_run(), id=id))
        store.change("MATCH (r:Run {id: $id}) SET r.process = $process", id=id, process=process)
    finish_run(store, "done", "finished")
    finish_run(store, "failed", "failed")
    return store


def test_only_runs_whose_process_is_gone_are_lost(begun: Store) -> None:
    gone = ["dead", "elsewhere", "unknown"] if begun.engine == "embedded" else ["dead"]
    assert lost(begun) == gone
    end_lost(begun)
    runs = begun.read("MATCH (r:Run) RETURN r.id AS id, r.status AS status")
    status = dict(zip(runs["id"], runs["status"], strict=True))
    still = {id: "running" for id in ("own", "dead", "elsewhere", "unknown")}
    assert status == {"done": "finished", "failed": "failed", **still, **dict.fromkeys(gone, "interrupted")}
    assert lost(begun) == []
