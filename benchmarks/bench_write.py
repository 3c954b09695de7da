"""How fast prompts are written, as a share of what a bare UNWIND of the same rows reaches.

Both sides write the same prompts into the same engine, one managed transaction a prompt, in turns within
one run. The bare side has its rows ready and only sends them: the statements that `write_prompt` sent for
that prompt, recorded beforehand, without the look-ups that make writing safe (is there an earlier version,
which features are known). So the ratio is the price of turning records into rows and of these look-ups.

    python -m benchmarks.bench_write [--prompts N] [--store DIR|URI]

A store is made in a temporary folder unless one is named, and what was written to it is deleted.
"""

import argparse
import contextlib
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
def _opened(where: str | None) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="atlas-bench-") as folder, connect(where or f"{folder}/store") as store:
        yield store


def main() -> None:
    parser = argparse.ArgumentParser(description="Writing, as a share of a bare UNWIND of the same rows.")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--store", help="Bolt address or folder; a temporary folder if not given")
    arguments = parser.parse_args()
    with _opened(arguments.store) as store:
        ours, bare, rows = measure(store, arguments.prompts)
        engine = store.engine
    print("engine    prompts      rows   rows/s   bare rows/s   ratio   goal")
    print(
        f"{engine:<10}{arguments.prompts:>7}{rows:>10,}{rows / ours:>9,.0f}{rows / bare:>14,.0f}"
        f"{bare / ours:>8.2f}   >= {GOAL}"
    )


if __name__ == "__main__":
    main()
