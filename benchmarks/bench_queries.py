"""How fast every question is answered on a large store, made by `benchmarks.generated`, on both engines.

    python -m benchmarks.bench_queries both [OV_EDGES] [SAMPLES] [SMALLER_OV_EDGES]

Of a question about one thing the median and the 99th percentile over SAMPLES things, drawn at random from those that
occur (features and pairs evenly, so few of them are hubs), after twenty others that are not counted; of a question over
the whole store the median of three after one that is not counted, or that one where it takes over ten seconds. `hub`
is the same asked of the feature that is a node most often. Times include the way through the driver into a DataFrame.
Both engines hold the same store, and every answer of the one is compared with the other's, row by row and in order.
Growth is the ratio of the medians on both sizes. Loaded stores are kept in the folder BENCH_STORES of the environment
for the next time; without it they are temporary. The last line printed is JSON, one object for each engine.
"""

import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

import queries
from atlas.schema import prepare
from atlas.store import Store, connect
from benchmarks.generated import N_LAYERS, Table, generate, load_embedded, load_neo4j
from tests import neo4j_server

WARM = 20  # calls of a question before its time is taken
HEAP = "4g"  # of either engine
SLOW = 10  # seconds
Ask = Callable[[Store], pd.DataFrame]

# The two full aggregations side by side: motifs from the edges themselves, and from FEEDS (the question motifs).
MOTIFS_FROM_EDGES = """
MATCH (b:Feature {layer: $layer, site: 'attn'})
MATCH (b)<-[:OF]-(v:CircuitNode)
MATCH (v)<-[e:OV]-(u:CircuitNode)
MATCH (u)-[:OF]->(a:Feature)
WITH a, b, e.layer AS layer, e.head AS head, count(DISTINCT v.prompt) AS n_prompts, count(*) AS n_edges
ORDER BY n_prompts DESC, a.id, b.id, head
LIMIT 50
RETURN a.id AS a, b.id AS b, layer, head, n_prompts, n_edges
"""


def motifs_from_edges(store: Store) -> pd.DataFrame:
    """The motifs that most prompts show, from every OV edge: a layer at a time, as all at once are too many groups."""
    layers = [store.read(MOTIFS_FROM_EDGES, layer=layer) for layer in range(N_LAYERS)]
    order = ["n_prompts", "a", "b", "head"]
    rows = pd.concat(layers).sort_values(order, ascending=[False, True, True, True])
    return rows.head(50).reset_index(drop=True)


def about_one_thing(tables: list[Table], samples: int) -> dict[str, list[Ask]]:
    """For every question about one thing, `samples` calls about things that occur, and of some one about a hub."""
    rng = np.random.default_rng(1)
    of = {table.name: table.rows for table in tables}
    ids = of["Feature"]["id"].to_numpy()
    node_of = of["OF"].set_index("source")["target"]
    features = ids[rng.choice(of["OF"]["target"].unique(), samples)]
    hub = ids[of["OF"]["target"].value_counts().idxmax()]
    circuits = rng.choice(of["Circuit"]["id"].to_numpy(), (2, samples))
    prompts = rng.choice(of["Prompt"]["id"].to_numpy(), samples)
    feeds = pd.concat([table.rows[["source", "target"]] for table in tables if table.name == "FEEDS"])
    feeds = feeds.iloc[rng.integers(0, len(feeds), samples)]
    pairs = list(zip(ids[feeds["source"]], ids[feeds["target"]], strict=True))
    qk = of["QK"][of["QK"]["source"].isin(node_of.index) & of["QK"]["target"].isin(node_of.index)]
    qk = qk.iloc[rng.integers(0, len(qk), samples)]
    looks = list(zip(ids[node_of[qk["source"]]], ids[node_of[qk["target"]]], strict=True))
    nodes = pd.concat([of["Attn"], of["MLP"]])["id"].to_numpy()[rng.integers(0, len(of["OF"]), samples)]
    of_feature: dict[str, Callable[[Store, str], pd.DataFrame]] = {
        "prompts_of": lambda s, f: queries.prompts_of(s, f),
        "feature": lambda s, f: queries.feature(s, f),
        "coactive": lambda s, f: queries.coactive(s, f),
        "spans of a feature": lambda s, f: queries.spans(s, f),
        "circuits of a feature": lambda s, f: queries.circuits(s, feature=f),
        "upstream": lambda s, f: queries.upstream(s, f),
        "downstream": lambda s, f: queries.downstream(s, f),
        "motifs of a feature": lambda s, f: queries.motifs(s, feature=f),
        "motifs of length 3 of a feature": lambda s, f: queries.motifs(s, feature=f, length=3, min_prompts=1),
        "wired of a feature": lambda s, f: queries.wired(s, feature=f, show="all"),
        "used of a feature": lambda s, f: queries.used(s, feature=f, show="all"),
    }
    of_circuit: dict[str, Callable[[Store, str], pd.DataFrame]] = {
        "circuit": lambda s, c: queries.circuit(s, c),
        "circuit_nodes": lambda s, c: queries.circuit_nodes(s, c),
        "attention": lambda s, c: queries.attention(s, c),
        "strongest_paths": lambda s, c: queries.strongest_paths(s, c),
        "similar_circuits": lambda s, c: queries.similar_circuits(s, c),
    }
    calls: dict[str, list[Ask]] = {}
    for name, ask in of_feature.items():
        calls[name] = [lambda s, f=f, ask=ask: ask(s, f) for f in features]
    for name, ask in of_circuit.items():
        calls[name] = [lambda s, c=c, ask=ask: ask(s, c) for c in circuits[0]]
    calls |= {
        "upstream of a node": [lambda s, n=n: queries.upstream(s, node=n, hops=3) for n in nodes],
        "edges_between": [lambda s, p=p: queries.edges_between(s, *p) for p in pairs],
        "qk_between": [lambda s, p=p: queries.qk_between(s, *p) for p in looks],
        "specificity": [lambda s, p=p: queries.specificity(s, *p) for p in pairs],
        "diff of two circuits": [lambda s, a=a, b=b: queries.diff(s, a, b) for a, b in circuits.T],
        "diff of two prompts": [
            lambda s, a=a, b=b: queries.diff(s, a, b) for a, b in zip(prompts, prompts[::-1], strict=True)
        ],
        "circuits of a prompt": [lambda s, p=p: queries.circuits(s, prompt=p) for p in prompts],
        "spans of a prompt": [lambda s, p=p: queries.spans(s, prompt=p) for p in prompts],
    }
    return calls | {f"{name}, hub": [lambda s, ask=ask: ask(s, hub)] for name, ask in of_feature.items()}


WHOLE_STORE: dict[str, Ask] = {
    "find_features": lambda s: queries.find_features(s),
    "find_features by label": lambda s: queries.find_features(s, "quotes"),
    "circuits": lambda s: queries.circuits(s),
    "circuits of a task": lambda s: queries.circuits(s, task="capitals"),
    "spans": lambda s: queries.spans(s),
    "motifs (from FEEDS)": lambda s: queries.motifs(s),
    "motifs of length 3": lambda s: queries.motifs(s, length=3),
    "drivers_of_head": lambda s: queries.drivers_of_head(s, 5, 3),
    "shared_features": lambda s: queries.shared_features(s, "capitals", min_share_of_prompts=0.01),
    "consensus": lambda s: queries.consensus(s, "capitals", min_share=0.01),
    "diff of two tasks": lambda s: queries.diff(s, "capitals", "states"),
    "errors": lambda s: queries.errors(s),
    "faithful": lambda s: queries.faithful(s),
    "wired": lambda s: queries.wired(s),
    "used": lambda s: queries.used(s),
    "motifs from the OV edges": motifs_from_edges,
}


@dataclass
class Measured:
    """Milliseconds by question and figure, and every answer in the order in which it was asked for."""

    figures: dict[str, float] = field(default_factory=dict)
    answers: list[tuple[str, pd.DataFrame]] = field(default_factory=list)


def measure(store: Store, about_one: dict[str, list[Ask]]) -> Measured:
    """Ask everything of one store."""
    found = Measured()
    for name, calls in about_one.items():
        for call in calls[:WARM]:
            call(store)
        times = [_ask(found, name, call, store) for call in calls[WARM:] or calls]
        figures = {f"{name}, p50 ms": 0.5, f"{name}, p99 ms": 0.99} if len(calls) > 1 else {f"{name}, ms": 0.5}
        found.figures |= {figure: round(float(np.quantile(times, q)), 1) for figure, q in figures.items()}
        print(name, [found.figures[figure] for figure in figures], file=sys.stderr, flush=True)
    for name, call in WHOLE_STORE.items():
        times = [_ask(found, name, call, store)]
        if times[0] < 1000 * SLOW:
            times = [_ask(Measured(), name, call, store) for _ in range(3)]
        found.figures[f"{name}, ms"] = round(statistics.median(times), 1)
        print(name, found.figures[f"{name}, ms"], file=sys.stderr, flush=True)
    return found


def _ask(found: Measured, name: str, call: Ask, store: Store) -> float:
    start = time.perf_counter()
    answer = call(store)
    milliseconds = 1000 * (time.perf_counter() - start)
    found.answers.append((name, answer))
    return milliseconds


def differing(a: Measured, b: Measured) -> list[str]:
    """The questions with an answer that the two did not give alike, row by row and in order."""
    return sorted({name for (name, x), (_, y) in zip(a.answers, b.answers, strict=True) if not same(x, y)})


def same(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Equal, but for the last digits of sums that were taken in another order."""
    try:
        pd.testing.assert_frame_equal(a, b, rtol=1e-9, atol=1e-12)
    except AssertionError:
        return False
    return True


@contextlib.contextmanager
def loaded(engine: str, n_edges: int, tables: list[Table]) -> Iterator[Store]:
    """A store of the engine that holds the tables, in a folder of its own, or as it was kept from an earlier time."""
    with contextlib.ExitStack() as stack:
        start = time.perf_counter()
        kept = os.environ.get("BENCH_STORES")
        folder = Path(kept or stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-bench-")))
        folder = folder / str(n_edges) / engine
        if engine == "neo4j":
            fill = lambda home: load_neo4j(home, tables)  # noqa: E731
            server = neo4j_server.running(fill, heap=HEAP, page_cache="2g", home=folder)
            running = stack.enter_context(server)
            os.environ["NEO4J_PASSWORD"] = running.password
            store = stack.enter_context(connect(running.bolt))
            prepare(store)
            store.change("CALL db.awaitIndexes(3600)")
        else:
            if not folder.exists():
                load_embedded(folder, tables)
            store = stack.enter_context(connect(folder))
        print(f"{engine} ready after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        yield store


def compare(n_edges: int, samples: int) -> dict[str, Measured]:
    """Both engines with the same store, each measured while the other rests."""
    tables = generate(n_edges)
    about_one = about_one_thing(tables, WARM + samples)
    with loaded("embedded", n_edges, tables) as embedded, loaded("neo4j", n_edges, tables) as neo4j:
        tables.clear()
        gc.collect()
        return {store.engine: measure(store, about_one) for store in (embedded, neo4j)}


def main(n_edges: int = 10_000_000, samples: int = 50, n_smaller: int = 1_000_000) -> None:
    """Measure both engines at both sizes and print one column for each engine."""
    os.environ["ARCADEDB_JVM_ARGS"] = f"-Xmx{HEAP}"
    small, large = compare(n_smaller, samples), compare(n_edges, samples)
    different = differing(large["embedded"], large["neo4j"]) + differing(small["embedded"], small["neo4j"])
    n_answers = sum(len(found.answers) for found in (small["neo4j"], large["neo4j"]))
    columns: list[dict[str, object]] = []
    for engine in ("embedded", "neo4j"):
        figures, before = large[engine].figures, small[engine].figures
        column: dict[str, object] = {"engine": engine, "OV edges": n_edges, "samples": samples}
        for name, figure in figures.items():
            column[name] = figure
            if name.endswith("p50 ms"):
                column[name.replace("p50 ms", f"growth of the median from {n_smaller:,}")] = round(
                    figure / before[name], 2
                )
        column["answers compared with the other engine's"] = n_answers
        column["questions with an answer that differs"] = len(set(different))
        columns.append(column)
    print("differing:", different, file=sys.stderr)
    print(json.dumps(columns))


if __name__ == "__main__":
    main(*map(int, sys.argv[2:5]))
