"""Runs whose process is gone: they end as 'interrupted', which a process that is killed cannot write itself.

A run notes its process as `host:id`. The embedded engine lets one process in at a time, so that every other
process is gone; on a Neo4j only those of this host can be told.
"""

import os
import platform

from atlas.store import Store

_RUNNING = "MATCH (r:Run {status: 'running'}) RETURN r.id AS id, coalesce(r.process, '') AS process ORDER BY id"


def this_process() -> str:
    """The host and the id of this process, as a Run keeps them."""
    return f"{platform.node()}:{os.getpid()}"


def lost(store: Store) -> list[str]:
    """The ids of the runs with status 'running' that no process runs any more."""
    found = store.read(_RUNNING)
    return [str(id) for id, process in zip(found["id"], found["process"], strict=True) if _is_gone(store, process)]


def end_lost(store: Store) -> None:
    """Give the lost runs the status 'interrupted'."""
    if ids := lost(store):
        store.change("UNWIND $ids AS id MATCH (r:Run {id: id}) SET r.status = 'interrupted'", ids=ids)


def _is_gone(store: Store, process: str) -> bool:
    if process == this_process():
        return False
    if store.engine == "embedded":
        return True
    host, _, id = process.rpartition(":")
    return host == platform.node() and not _is_alive(int(id))


def _is_alive(id: int) -> bool:
    try:
        os.kill(id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
