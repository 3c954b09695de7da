"""How fast every question is answered on a large store, made by `benchmarks.generated`.

    python -m benchmarks.bench_queries embedded|neo4j [OV_EDGES] [SAMPLES] [SMALLER_OV_EDGES]

Of a question about one thing the median and the 99th percentile over SAMPLES things, drawn at random from those that
occur (features evenly, so few of them are hubs), after two rounds that are not counted; of a question over the whole
store the median of three. With a smaller store the ratio of both medians is what growth costs. Times include the way
through the driver into a DataFrame. The last line printed is a JSON object.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

import queries
from atlas.schema import prepare
from atlas.store import Store, connect
from benchmarks.generated import Table, generate, load_by_import, load_by_rows
from tests import neo4j_server

Ask = Callable[[Store], object]

# The two full aggregations side by side: motifs from the edges themselves, and from FEEDS (the question motifs).
MOTIFS_FROM_EDGES = """
MATCH (a:Feature)<-[:OF]-(u:CircuitNode)-[e:OV]->(v:CircuitNode)-[:OF]->(b:Feature)
WITH a, b, e.layer AS layer, e.head AS head, count(DISTINCT v.prompt) AS n_prompts, count(*) AS n_edges
ORDER BY n_prompts DESC
LIMIT 50
RETURN a.id AS a, b.id AS b, layer, head, n_prompts, n_edges
"""


def about_one_thing(tables: dict[str, pd.DataFrame], samples: int) -> dict[str, list[Ask]]:
    """For every question about one feature, circuit or prompt, `samples` calls about things that occur."""
    rng = np.random.default_rng(1)
    features = rng.choice(tables["OF"]["target"].unique(), samples)
    circuits = rng.choice(tables["Circuit"]["id"], (2, samples))
    prompts = rng.choice(tables["Prompt"]["id"], samples)
    feeds = tables["FEEDS"].iloc[rng.integers(0, len(tables["FEEDS"]), samples)]
    pairs = list(zip(feeds["source"], feeds["target"], strict=True))
    return {
        "prompts_of": [lambda s, f=f: queries.prompts_of(s, f) for f in features],
        "feature": [lambda s, f=f: queries.feature(s, f) for f in features],
        "coactive": [lambda s, f=f: queries.coactive(s, f) for f in features],
        "circuits of a feature": [lambda s, f=f: queries.circuits(s, feature=f) for f in features],
        "upstream": [lambda s, f=f: queries.upstream(s, f) for f in features],
        "downstream": [lambda s, f=f: queries.downstream(s, f) for f in features],
        "motifs of a feature": [lambda s, f=f: queries.motifs(s, feature=f) for f in features],
        "edges_between": [lambda s, p=p: queries.edges_between(s, *p) for p in pairs],
        "specificity": [lambda s, p=p: queries.specificity(s, *p) for p in pairs],
        "circuit": [lambda s, c=c: queries.circuit(s, c) for c in circuits[0]],
        "strongest_paths": [lambda s, c=c: queries.strongest_paths(s, c) for c in circuits[0]],
        "similar_circuits": [lambda s, c=c: queries.similar_circuits(s, c) for c in circuits[0]],
        "diff of two circuits": [lambda s, a=a, b=b: queries.diff(s, a, b) for a, b in circuits.T],
        "circuits of a prompt": [lambda s, p=p: queries.circuits(s, prompt=p) for p in prompts],
    }


WHOLE_STORE: dict[str, Ask] = {
    "find_features": lambda s: queries.find_features(s),
    "motifs (from FEEDS)": lambda s: queries.motifs(s),
    "motifs of length 3": lambda s: queries.motifs(s, length=3, limit=20),
    "motifs from the OV edges": lambda s: s.read(MOTIFS_FROM_EDGES),
    "drivers_of_head": lambda s: queries.drivers_of_head(s, 5, 3),
    "shared_features": lambda s: queries.shared_features(s, "capitals"),
    "consensus": lambda s: queries.consensus(s, "capitals"),
    "diff of two tasks": lambda s: queries.diff(s, "capitals", "states"),
    "errors": lambda s: queries.errors(s),
    "faithful": lambda s: queries.faithful(s),
}


def measure(store: Store, tables: dict[str, pd.DataFrame], samples: int) -> dict[str, float]:
    """Milliseconds by question."""
    found: dict[str, float] = {}
    for name, calls in about_one_thing(tables, samples).items():
        for call in calls[:2]:
            call(store)
        times = [_milliseconds(call, store) for call in calls]
        found[f"{name}, p50 ms"] = round(float(np.quantile(times, 0.5)), 1)
        found[f"{name}, p99 ms"] = round(float(np.quantile(times, 0.99)), 1)
        print(name, found[f"{name}, p50 ms"], found[f"{name}, p99 ms"], file=sys.stderr, flush=True)
    for name, call in WHOLE_STORE.items():
        found[f"{name}, ms"] = round(float(np.median([_milliseconds(call, store) for _ in range(3)])), 1)
        print(name, found[f"{name}, ms"], file=sys.stderr, flush=True)
    return found


def _milliseconds(call: Ask, store: Store) -> float:
    start = time.perf_counter()
    call(store)
    return 1000 * (time.perf_counter() - start)


@contextlib.contextmanager
def loaded(engine: str, tables: list[Table]) -> Iterator[Store]:
    """A store of the engine that holds the tables, in a folder of its own."""
    with contextlib.ExitStack() as stack:
        start = time.perf_counter()
        if engine == "neo4j":
            server = stack.enter_context(neo4j_server.running(lambda home: load_by_import(Path(home), tables)))
            os.environ["NEO4J_PASSWORD"] = server.password
            store = stack.enter_context(connect(server.bolt))
            prepare(store)
            store.change("CALL db.awaitIndexes(600)")
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-bench-"))
            store = stack.enter_context(connect(f"{folder}/store"))
            load_by_rows(store, tables)
        print(f"loaded in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        yield store


def main(engine: str, n_edges: int = 1_000_000, samples: int = 100, n_smaller: int = 0) -> None:
    """Measure one engine and print what was found."""
    found: dict[str, object] = {"engine": engine, "OV edges": n_edges, "samples": samples}
    results: list[dict[str, float]] = []
    for n in (n_edges, n_smaller) if n_smaller else (n_edges,):
        tables = generate(n)
        with loaded(engine, tables) as store:
            results.append(measure(store, {table.name: table.rows for table in tables}, samples))
    found |= results[0]
    if n_smaller:
        medians = [name for name in results[0] if "p50" in name]
        growth = {name: results[0][name] / results[1][name] for name in medians}
        found["OV edges of the smaller store"] = n_smaller
        found["largest growth of a median"] = round(max(growth.values()), 2)
        print({name: round(ratio, 2) for name, ratio in growth.items()}, file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
