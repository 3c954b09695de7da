"""How fast every question is answered on a large store, made by `benchmarks.generated`, on both engines.

    python -m benchmarks.bench_queries both|embedded|neo4j [OV_EDGES] [SAMPLES] [SMALLER_OV_EDGES]

Milliseconds, the way through the driver into a DataFrame included. Of a question about one thing: p50 / p99 over
SAMPLES things, drawn at random from those that occur (features and pairs evenly, so few of them are hubs), and in
brackets the median over that on the smaller store. `hub` is the same asked of the feature that is a node most often,
and of a question over the whole store, the median of three. Before that come WARM calls about other things, or one of
a question over the whole store, which are not counted: the Java machines compile what is asked often. No more things
are asked than SECONDS allow, and a call that takes longer is not made again: its first time is the figure.

Each engine runs alone, in a process of its own, with the files of its store read once beforehand, 4 GB of heap and
room for the pages of its whole store beside it. Every answer of the one is compared with the other's, row by row and in
order. Loaded stores are kept in the folder BENCH_STORES of the environment for the next time; without it they are
temporary. The last line printed is JSON, one object for each engine.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import queries
from atlas.errors import AtlasError
from atlas.schema import prepare
from atlas.store import Store, connect
from benchmarks.generated import N_LAYERS, Table, generate, load_embedded, load_neo4j
from tests import neo4j_server

ENGINES = ["embedded", "neo4j"]
WARM = 100  # calls of a question about one thing before its time is taken
DRAWN = 400  # things of each kind; a run takes the first of them
SECONDS = 10  # for the calls of one question
HEAP = 4096  # MB, of either engine
BYTES_PER_EDGE = 500  # that an OV edge, with all that is stored with it, takes at most on the embedded engine
GOALS = 20, 200, 2000  # milliseconds: p50 and p99 of a question about one thing, a question over the whole store
Ask = Callable[[Store], pd.DataFrame]
Things = dict[str, list[Any]]

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


def things(tables: list[Table], n: int = DRAWN) -> Things:
    """Ids of `n` things of every kind that a question can be about, and of the hub."""
    rng = np.random.default_rng(1)
    of = {table.name: table.rows for table in tables}
    ids = of["Feature"]["id"].to_numpy()
    node_of = of["OF"].set_index("source")["target"]
    feeds = pd.concat([table.rows[["source", "target"]] for table in tables if table.name == "FEEDS"])
    feeds = feeds.iloc[rng.integers(0, len(feeds), n)]
    qk = of["QK"][of["QK"]["source"].isin(node_of.index) & of["QK"]["target"].isin(node_of.index)]
    qk = qk.iloc[rng.integers(0, len(qk), n)]
    nodes = pd.concat([of["Attn"], of["MLP"]])["id"].to_numpy()
    drawn = {
        "features": ids[rng.choice(of["OF"]["target"].unique(), n)],
        "circuits": rng.choice(of["Circuit"]["id"].to_numpy(), n),
        "prompts": rng.choice(of["Prompt"]["id"].to_numpy(), n),
        "nodes": nodes[rng.integers(0, len(nodes), n)],
        "pairs": np.stack([ids[feeds["source"]], ids[feeds["target"]]], 1),
        "looks": np.stack([ids[node_of[qk["source"]]], ids[node_of[qk["target"]]]], 1),
        "hubs": ids[[of["OF"]["target"].value_counts().idxmax()]],
    }
    return {name: found.tolist() for name, found in drawn.items()}


def about_one_thing(drawn: Things, n: int) -> dict[str, list[Ask]]:
    """For every question about one thing, `n` calls about things that occur, and of some one about a hub."""
    of_feature: dict[str, Callable[..., pd.DataFrame]] = {
        "prompts_of": queries.prompts_of,
        "feature": queries.feature,
        "coactive": queries.coactive,
        "spans of a feature": queries.spans,
        "circuits of a feature": lambda s, f: queries.circuits(s, feature=f),
        "upstream": queries.upstream,
        "downstream": queries.downstream,
        "motifs of a feature": lambda s, f: queries.motifs(s, feature=f),
        "motifs of length 3 of a feature": lambda s, f: queries.motifs(s, feature=f, length=3, min_prompts=1),
        "wired of a feature": lambda s, f: queries.wired(s, feature=f, show="all"),
        "used of a feature": lambda s, f: queries.used(s, feature=f, show="all"),
    }
    of_circuit: dict[str, Callable[..., pd.DataFrame]] = {
        "circuit": queries.circuit,
        "circuit_nodes": queries.circuit_nodes,
        "attention": queries.attention,
        "strongest_paths": queries.strongest_paths,
        "similar_circuits": queries.similar_circuits,
    }
    of_pair: dict[str, Callable[..., pd.DataFrame]] = {
        "edges_between": queries.edges_between,
        "specificity": queries.specificity,
    }
    of_prompt: dict[str, Callable[..., pd.DataFrame]] = {
        "circuits of a prompt": lambda s, p: queries.circuits(s, prompt=p),
        "spans of a prompt": lambda s, p: queries.spans(s, prompt=p),
    }
    of_node = {"upstream of a node": lambda s, n: queries.upstream(s, node=n, hops=3)}
    circuits, prompts = drawn["circuits"][:n], drawn["prompts"][:n]
    kinds: list[tuple[dict[str, Callable[..., pd.DataFrame]], list[list[str]]]] = [
        (of_feature, [[f] for f in drawn["features"][:n]]),
        (of_circuit, [[c] for c in circuits]),
        (of_pair, drawn["pairs"][:n]),
        ({"qk_between": queries.qk_between}, drawn["looks"][:n]),
        (of_node, [[node] for node in drawn["nodes"][:n]]),
        (of_prompt, [[p] for p in prompts]),
        ({"diff of two circuits": queries.diff}, _two_of(circuits)),
        ({"diff of two prompts": queries.diff}, _two_of(prompts)),
        ({f"{name}, hub": ask for name, ask in of_feature.items()}, [[hub] for hub in drawn["hubs"]]),
    ]
    return {
        name: [lambda s, ask=ask, ids=ids: ask(s, *ids) for ids in all_ids]
        for asks, all_ids in kinds
        for name, ask in asks.items()
    }


def _two_of(ids: list[str]) -> list[list[str]]:
    return [[a, b] for a, b in zip(ids, ids[1:] + ids[:1], strict=True)]


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
    """Of every question the milliseconds of its calls and their answers, in the order of asking."""

    times: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[pd.DataFrame]] = field(default_factory=dict)

    def figures(self, name: str) -> list[float]:
        """p50 and p99 of a question about many things, the median alone of one asked of a hub or the whole store."""
        times = self.times[name]
        shares = [0.5] if name in WHOLE_STORE or name.endswith("hub") else [0.5, 0.99]
        return [float(np.quantile(times, share)) for share in shares] if times else []


def measure(store: Store, about_one: dict[str, list[Ask]]) -> Measured:
    """Ask everything of one store; a question that the engine refuses has no times, and is told."""
    found = Measured()
    for name, calls in about_one.items():
        several = len(calls) > 1
        _ask(found, name, store, calls[:WARM] if several else calls, calls[WARM:] if several else 3 * calls)
    for name, call in WHOLE_STORE.items():
        _ask(found, name, store, [call], 3 * [call])
    return found


def _ask(found: Measured, name: str, store: Store, warm: list[Ask], calls: list[Ask]) -> None:
    found.times[name], found.answers[name] = [], []
    try:
        warmed = list(_within(SECONDS, (_timed(call, store) for call in warm)))
        slow = warmed[0][0] > 1000 * SECONDS
        taken = warmed if slow else list(_within(SECONDS, (_timed(call, store) for call in calls)))
        found.times[name] = [milliseconds for milliseconds, _ in taken]
        found.answers[name] = [answer for _, answer in taken]
    except AtlasError as error:
        print(error, file=sys.stderr)
    print(name, _cell(found.figures(name)), file=sys.stderr, flush=True)


def _timed(call: Ask, store: Store) -> tuple[float, pd.DataFrame]:
    start = time.perf_counter()
    answer = call(store)
    return 1000 * (time.perf_counter() - start), answer


def _within(seconds: float, items: Iterator[Any]) -> Iterator[Any]:
    """The items, as long as the time is not over when one is asked for."""
    end = time.monotonic() + seconds
    for item in items:
        yield item
        if time.monotonic() > end:
            return


def compared(a: Measured, b: Measured) -> tuple[int, list[str]]:
    """How many answers both gave, and the questions with one that is not alike, row by row and in order."""
    pairs = [(name, x, y) for name in a.answers for x, y in zip(a.answers[name], b.answers[name], strict=False)]
    return len(pairs), sorted({name for name, x, y in pairs if not same(x, y)})


def same(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Equal, but for the last digits of sums that were taken in another order."""
    try:
        pd.testing.assert_frame_equal(a, b, rtol=1e-9, atol=1e-12)
    except AssertionError:
        return False
    return True


def prepared(engine: str, n_edges: int, folder: Path) -> Things:
    """Load the store into `folder`/`engine`, unless it is there, and keep beside it what to ask about."""
    kept = folder / "things.json"
    if not kept.exists() or not (folder / engine).exists():
        tables = generate(n_edges)
        if engine == "embedded":
            load_embedded(folder / engine, tables)
        else:
            with neo4j_server.running(lambda home: load_neo4j(home, tables), heap=f"{HEAP}m", home=folder / engine):
                pass
        kept.write_text(json.dumps(things(tables)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


@contextlib.contextmanager
def opened(engine: str, folder: Path) -> Iterator[Store]:
    """The engine on its store, all files of which were read once, so that no answer waits for the disk."""
    size = sum(_read_through(path) for path in sorted(folder.rglob("*")) if path.is_file())
    if engine == "embedded":
        with connect(folder) as store:
            yield store
        return
    with neo4j_server.running(heap=f"{HEAP}m", page_cache=f"{size // 2**20 + 256}m", home=folder) as server:
        os.environ["NEO4J_PASSWORD"] = server.password
        with connect(server.bolt) as store:
            prepare(store)
            store.change("CALL db.awaitIndexes(3600)")
            yield store


def _read_through(path: Path) -> int:
    size = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            size += len(part)
    return size


def run(engine: str, n_edges: int, samples: int) -> Measured:
    """One engine on a store of its own, kept or temporary."""
    pages = n_edges * BYTES_PER_EDGE // 2**20 + 256
    os.environ["ARCADEDB_JVM_ARGS"] = f"-Xmx{HEAP + pages}m -Darcadedb.maxPageRAM={pages}"
    with contextlib.ExitStack() as stack:
        place = os.environ.get("BENCH_STORES")
        folder = Path(place or stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-bench-"))) / str(n_edges)
        drawn = prepared(engine, n_edges, folder)
        store = stack.enter_context(opened(engine, folder / engine))
        print(f"{engine}, {n_edges:,} OV edges", file=sys.stderr, flush=True)
        return measure(store, about_one_thing(drawn, WARM + samples))


def run_apart(engine: str, n_edges: int, samples: int) -> Measured:
    """The same in a process of its own."""
    with tempfile.NamedTemporaryFile(prefix="atlas-bench-") as file:
        arguments = [engine, str(n_edges), str(samples), file.name]
        subprocess.run([sys.executable, "-m", "benchmarks.bench_queries", "one", *arguments], check=True)
        return pickle.load(file)


def column(engine: str, samples: int, small: tuple[int, Measured], large: tuple[int, Measured]) -> dict[str, object]:
    """What the table tells of one engine."""
    n_edges, found = large
    made: dict[str, object] = {"engine": engine, "OV edges": n_edges, "samples": samples}
    over: list[str] = []
    for name in found.times:
        figures, before = found.figures(name), small[1].figures(name)
        about_one = len(figures) == 2
        growth = f" ({figures[0] / before[0]:.2f})" if about_one and before else ""
        made[name] = _cell(figures) + growth
        goals = GOALS[:2] if about_one else GOALS[1:2] if name.endswith("hub") else GOALS[2:]
        if not figures or any(figure > goal for figure, goal in zip(figures, goals, strict=True)):
            over.append(name)
    made["questions over their goal"] = ", ".join(over) or "none"
    return made


def _cell(figures: list[float]) -> str:
    return " / ".join(f"{figure:,.1f}" if figure < 100 else f"{figure:,.0f}" for figure in figures) or "failed"


def main(which: str, n_edges: int = 10_000_000, samples: int = 200, n_smaller: int = 1_000_000) -> None:
    """Measure both engines, or one, at both sizes and print one column for each."""
    engines = ENGINES if which == "both" else [which]
    found = {(engine, n): run_apart(engine, n, samples) for engine in engines for n in (n_smaller, n_edges)}
    columns = [
        column(engine, samples, (n_smaller, found[engine, n_smaller]), (n_edges, found[engine, n_edges]))
        for engine in engines
    ]
    if which == "both":
        told = [compared(found["embedded", n], found["neo4j", n]) for n in (n_smaller, n_edges)]
        for made in columns:
            made["answers compared with the other engine's"] = sum(n for n, _ in told)
            made["questions with an answer that differs"] = (
                ", ".join(sorted({x for _, xs in told for x in xs})) or "none"
            )
    print(json.dumps(columns))


if __name__ == "__main__":
    if sys.argv[1] == "one":
        with open(sys.argv[5], "wb") as output:
            pickle.dump(run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])), output)
    else:
        main(sys.argv[1], *map(int, sys.argv[2:5]))
