"""How fast labels are imported: into an empty store, and the same file again.

    python -m benchmarks.bench_labels embedded|neo4j [LABELS]

300,000 labels by default. The embedded engine runs in this process, Neo4j in another. The last line printed is a JSON
object.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from atlas.labels import import_labels
from benchmarks.bench_write import opened

FEATURES_PER_LAYER = 24_576


def write_export(file: Path, n_labels: int) -> None:
    """An export of `n_labels` features, one label each, as long as labels usually are."""
    with file.open("w", encoding="utf-8") as out:
        for i in range(n_labels):
            row = {
                "id": f"c{i}",
                "modelId": "gpt2-small",
                "layer": f"{i // FEATURES_PER_LAYER}-tres-dc",
                "index": str(i % FEATURES_PER_LAYER),
                "description": f"phrases that mention thing {i} and what is done with it",
                "explanationModelName": "gpt-4o-mini",
            }
            out.write(json.dumps(row) + "\n")


def main(engine: str, n_labels: int = 300_000) -> None:
    """Measure and print what was found."""
    seconds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="atlas-bench-") as folder, opened(engine) as store:
        file = Path(folder) / "labels.jsonl"
        write_export(file, n_labels)
        for _ in range(2):
            start, processor = time.perf_counter(), time.process_time()
            summary = import_labels(store, [file], print)
            seconds.append((time.perf_counter() - start, time.process_time() - processor))
            assert summary.labels == n_labels
        stored = store.read("MATCH (f:Feature) RETURN count(f.label) AS n")["n"].iloc[0]
    assert stored == n_labels
    (first, processor), (again, _) = seconds
    found = {
        "engine": engine,
        "labels": n_labels,
        "seconds (goal: under 60)": round(first, 1),
        "of this process's processor, s": round(processor, 1),
        "labels a second": round(n_labels / first),
        "seconds, the same file again": round(again, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
