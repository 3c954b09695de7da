"""How fast prompts are written, as a share of what a bare UNWIND of the same rows reaches.

Both sides write the same prompts into the same engine, one managed transaction a prompt, in turns within
one run. The bare side has its rows ready and only sends them: the statements that `write_prompt` sent for
that prompt, recorded beforehand, without the look-ups that make writing safe (is there an earlier version,
which features are known). So the ratio is the price of turning records into rows and of these look-ups.

    python -m benchmarks.bench_write embedded|neo4j [PROMPTS]

Either engine starts empty. The last line printed is a JSON object.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import neo4j

from atlas.records import PromptRecord
from atlas.schema import prepare
from atlas.store import Store, connect
from atlas.writer import delete_prompt, register, write_prompt
from tests import neo4j_server
from tests.synthetic import synthetic_model, synthetic_prompt, synthetic_run

Statement = tuple[str, dict[str, Any]]
GOAL = 0.8


@dataclass
class _Recorder:
    """Stands before a transaction and keeps the statements that write rows."""

    transaction: neo4j.ManagedTransaction
    statements: list[Statement] = field(default_factory=list)

    def run(self, cypher: str, parameters: dict[str, Any]) -> neo4j.Result:
        if "rows" in parameters:
            self.statements.append((cypher, parameters))
        return self.transaction.run(cypher, parameters)  # type: ignore[arg-type]


@dataclass
class _RecordingStore:
    """Stands before a store and keeps what one `write_prompt` sends."""

    store: Store
    statements: list[Statement] = field(default_factory=list)

    def write(self, work: Any) -> Any:
        def recorded(transaction: neo4j.ManagedTransaction) -> Any:
            recorder = _Recorder(transaction)
            result = work(recorder)
            self.statements = recorder.statements
            return result

        return self.store.write(recorded)


def measure(store: Store, n_prompts: int) -> tuple[float, float, int]:
    """Seconds of `write_prompt`, seconds of the bare UNWIND, and rows written on each side."""
    prepare(store)
    register(store, synthetic_model(), synthetic_run())
    # As many nodes and edges as a prompt of the demo, and a first few to warm both sides.
    prompts = [synthetic_prompt(seed, n_tokens=10, n_active=3, density=0.35) for seed in range(n_prompts + 3)]
    ours = bare = 0.0
    rows = 0
    for i, prompt in enumerate(prompts):
        statements = _statements(store, prompt)
        delete_prompt(store, prompt.id)
        first, second = (_bare, _ours) if i % 2 else (_ours, _bare)
        seconds: dict[object, float] = {}
        for side in (first, second):
            start = time.perf_counter()
            side(store, prompt, statements)
            seconds[side] = time.perf_counter() - start
            delete_prompt(store, prompt.id)
        if i >= 3:
            ours, bare = ours + seconds[_ours], bare + seconds[_bare]
            rows += sum(len(parameters["rows"]) for _, parameters in statements)
    return ours, bare, rows


def _statements(store: Store, prompt: PromptRecord) -> list[Statement]:
    """What is sent for this prompt once its features are known, as in a store that is in use."""
    write_prompt(store, prompt, "run-1")
    delete_prompt(store, prompt.id)
    recording = _RecordingStore(store)
    write_prompt(recording, prompt, "run-1")  # type: ignore[arg-type]
    return recording.statements


def _ours(store: Store, prompt: PromptRecord, statements: list[Statement]) -> None:
    write_prompt(store, prompt, "run-1")


def _bare(store: Store, prompt: PromptRecord, statements: list[Statement]) -> None:
    def work(transaction: neo4j.ManagedTransaction) -> None:
        for cypher, parameters in statements:
            transaction.run(cypher, parameters).consume()  # type: ignore[arg-type]

    store.write(work)


@contextlib.contextmanager
def opened(engine: str) -> Iterator[Store]:
    """An empty store on an engine."""
    with contextlib.ExitStack() as stack:
        if engine == "neo4j":
            server = stack.enter_context(neo4j_server.running())
            os.environ["NEO4J_PASSWORD"] = server.password
            yield stack.enter_context(connect(server.bolt))
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-bench-"))
            yield stack.enter_context(connect(f"{folder}/store"))


def main(engine: str, n_prompts: int = 40) -> None:
    """Measure one engine and print what was found."""
    with opened(engine) as store:
        ours, bare, rows = measure(store, n_prompts)
    found = {
        "engine": engine,
        "prompts": n_prompts,
        "rows": rows,
        "rows a second": round(rows / ours),
        "bare UNWIND, rows a second": round(rows / bare),
        f"ratio (goal: at least {GOAL})": round(bare / ours, 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
