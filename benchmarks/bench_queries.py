"""How fast every question is answered on a large store, made by `benchmarks.generated`, on both engines.

    python -m benchmarks.bench_queries both|embedded|neo4j [OV_EDGES] [SAMPLES] [SMALLER_OV_EDGES]

Milliseconds, the way through the driver into a DataFrame included. Of a question about one thing: p50 / p99 over
SAMPLES things, drawn at random from those that occur (features and pairs evenly, so few of them are hubs). In brackets
stands how p50 grows from a smaller store, which is asked in turn with the larger: first of things drawn there in the
same way, then of things that are nodes as often there as those of the larger store are here. The two stores have the
same features, so that a feature drawn at random occurs in ten times as many prompts of the larger: the first figure
grows with what there is to answer, the second alone tells what the size of the store costs. `hub` is the same asked of
the feature that is a node most often, and of a question over the whole store, the median of three. Before that come
WARM calls about other things, or one of a question over the whole store, which are not counted: the Java machines
compile what is asked often. No more things are asked than SECONDS allow, and a call that takes longer is not made
again: its first time is the figure.

Each engine runs alone, in a process of its own, with 4 GB of heap (Neo4j: for each of the two stores) and room for the
pages of its stores beside it. Before anything is asked, all files of the stores are read once, and every node and edge
by a query, so that the pages are in that room. Every answer of the one engine is compared with the other's, row by row
and in order. Loaded stores are kept in the folder BENCH_STORES of the environment for the next time; without it they
are temporary. The last line printed is JSON, one object for each engine.
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
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

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
SECONDS = 20  # for the calls of one question
HEAP = 4096  # MB, of either engine
BYTES_PER_EDGE = 500  # that an OV edge, with all that is stored with it, takes at most on the embedded engine
GOALS = 20, 200, 2000  # milliseconds: p50 and p99 of a question about one thing, a question over the whole store
GROWTH = 1.5  # of p50 from the smaller store, for things that are nodes as often
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


EVERYTHING: LiteralString = """
CALL () {
  MATCH (n)
  RETURN count(n.id) AS n
  UNION ALL
  MATCH ()-[r]->()
  RETURN count(r.weight) AS n
}
RETURN sum(n) AS n
"""
BESIDE = "motifs from the OV edges"  # not a question, and without a goal


def motifs_from_edges(store: Store) -> pd.DataFrame:
    """The motifs that most prompts show, from every OV edge: a layer at a time, as all at once are too many groups."""
    layers = [store.read(MOTIFS_FROM_EDGES, layer=layer) for layer in range(N_LAYERS)]
    order = ["n_prompts", "a", "b", "head"]
    rows = pd.concat(layers).sort_values(order, ascending=[False, True, True, True])
    return rows.head(50).reset_index(drop=True)


def things(tables: list[Table], like: Things | None, n: int = DRAWN) -> Things:
    """Ids of `n` things of every kind that a question can be about, and of the hub.

    `features`, `pairs` and `looks` come with how often they are nodes, of two the one that is less often. With the
    things of another store, also those that are nodes here as often as they are there, under `alike`, and more
    circuits, prompts and nodes, as nothing is asked a second time.
    """
    rng = np.random.default_rng(1)
    of = {table.name: table.rows for table in tables}
    ids = of["Feature"]["id"].to_numpy()
    node_of = of["OF"].set_index("source")["target"]
    n_nodes = np.bincount(of["OF"]["target"], minlength=len(ids))
    feeds = pd.concat([table.rows[["source", "target"]] for table in tables if table.name == "FEEDS"])
    qk = of["QK"][of["QK"]["source"].isin(node_of.index) & of["QK"]["target"].isin(node_of.index)]
    all_of_others = {
        "circuits": of["Circuit"]["id"].to_numpy(),
        "prompts": of["Prompt"]["id"].to_numpy(),
        "nodes": pd.concat([of["Attn"], of["MLP"]])["id"].to_numpy(),
    }
    all_of_features = {
        "features": np.flatnonzero(n_nodes)[:, None],
        "pairs": feeds.to_numpy(),
        "looks": np.stack([node_of[qk["source"]], node_of[qk["target"]]], 1),
    }
    drawn: Things = {"hubs": [[ids[n_nodes.argmax()]]]}
    for name, rows in all_of_others.items():
        drawn[name] = rows[rng.integers(0, len(rows), n)].tolist()
        if like:
            drawn[f"alike {name}"] = rows[rng.integers(0, len(rows), n)].tolist()
    for name, rows in all_of_features.items():
        often = n_nodes[rows].min(1)
        picked = rng.integers(0, len(rows), n)
        drawn |= {name: ids[rows[picked]].tolist(), f"nodes of {name}": often[picked].tolist()}
        if like:
            order, wanted = often.argsort(kind="stable"), like[f"nodes of {name}"]
            first, last = (often[order].searchsorted(wanted, side) for side in ("left", "right"))
            place = (first + rng.random(n) * (last - first)).astype(int).clip(max=len(rows) - 1)
            drawn[f"alike {name}"] = ids[rows[order[place]]].tolist()
    return drawn


OF_FEATURE: dict[str, Callable[..., pd.DataFrame]] = {
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


def about_one_thing(drawn: Things, n: int, alike: str = "") -> dict[str, list[Ask]]:
    """For every question about one thing, `n` calls about things that occur; `alike ` those like another store's."""
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
    circuits, prompts, nodes = (drawn[f"{alike}{name}"][:n] for name in ("circuits", "prompts", "nodes"))
    kinds: list[tuple[dict[str, Callable[..., pd.DataFrame]], list[list[str]]]] = [
        (OF_FEATURE, drawn[f"{alike}features"][:n]),
        (of_circuit, [[c] for c in circuits]),
        (of_pair, drawn[f"{alike}pairs"][:n]),
        ({"qk_between": queries.qk_between}, drawn[f"{alike}looks"][:n]),
        (of_node, [[node] for node in nodes]),
        (of_prompt, [[p] for p in prompts]),
        ({"diff of two circuits": queries.diff}, _two_of(circuits)),
        ({"diff of two prompts": queries.diff}, _two_of(prompts)),
    ]
    return {
        name: [partial(_ask_of, ask, ids) for ids in all_ids] for asks, all_ids in kinds for name, ask in asks.items()
    }


def about_hubs(drawn: Things) -> dict[str, Ask]:
    """The questions about a feature, about the one that is a node most often."""
    (hub,) = drawn["hubs"]
    return {f"{name}, hub": partial(_ask_of, ask, hub) for name, ask in OF_FEATURE.items()}


def _ask_of(ask: Callable[..., pd.DataFrame], ids: list[str], store: Store) -> pd.DataFrame:
    return ask(store, *ids)


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
    BESIDE: motifs_from_edges,
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


@dataclass
class Side:
    """A store, the calls of every question about one thing that are made there, and what was found."""

    store: Store
    calls: dict[str, list[Ask]]
    found: Measured = field(default_factory=Measured)


def measure(sides: list[Side], once: list[dict[str, Ask]]) -> None:
    """Ask everything about one thing of all sides in turn, then what is asked `once` of each."""
    for name in sides[0].calls:
        _ask_in_turn(name, sides)
    for side, asks in zip(sides, once, strict=True):
        for name, ask in asks.items():
            _ask(side.found, name, side.store, ask)


def _ask_in_turn(name: str, sides: list[Side]) -> None:
    for side in sides:
        side.found.times[name], side.found.answers[name] = [], []
        list(_within(SECONDS / len(sides), (_timed(call, side.store) for call in side.calls[name][:WARM])))
    rounds = zip(*(side.calls[name][WARM:] for side in sides), strict=True)
    turns = ([_timed(call, side.store) for side, call in zip(sides, calls, strict=True)] for calls in rounds)
    for turn in _within(SECONDS, turns):
        for side, (milliseconds, answer) in zip(sides, turn, strict=True):
            side.found.times[name].append(milliseconds)
            side.found.answers[name].append(answer)
    print(name, *(_cell(side.found.figures(name)) for side in sides), file=sys.stderr, flush=True)


def _ask(found: Measured, name: str, store: Store, call: Ask) -> None:
    """Three times after a first; a question that the engine refuses has no times, and is told."""
    found.times[name], found.answers[name] = [], []
    try:
        first = _timed(call, store)
        slow = first[0] > 1000 * SECONDS
        taken = [first] if slow else list(_within(SECONDS, (_timed(call, store) for _ in range(3))))
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


def prepared(engine: str, n_edges: int, folder: Path, like: Things | None = None) -> Things:
    """Load the store into `folder`/`engine`, unless it is there, and keep beside it what to ask about."""
    kept = folder / "things.json"
    if not kept.exists() or not (folder / engine).exists():
        tables = generate(n_edges)
        if not (folder / engine).exists():
            _load(engine, folder / engine, tables)
        kept.write_text(json.dumps(things(tables, like)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def _load(engine: str, folder: Path, tables: list[Table]) -> None:
    if engine == "embedded":
        load_embedded(folder, tables)
    else:
        with neo4j_server.running(lambda home: load_neo4j(home, tables), heap=f"{HEAP}m", home=folder):
            pass


@contextlib.contextmanager
def opened(engine: str, folder: Path) -> Iterator[Store]:
    """The engine on its store, all of which was read once, so that no answer waits for the disk or for a page."""
    size = sum(_read_through(path) for path in sorted(folder.rglob("*")) if path.is_file())
    if engine == "embedded":
        with connect(folder) as store:
            store.read(EVERYTHING)
            yield store
        return
    with neo4j_server.running(heap=f"{HEAP}m", page_cache=f"{size // 2**20 + 256}m", home=folder) as server:
        os.environ["NEO4J_PASSWORD"] = server.password
        with connect(server.bolt) as store:
            prepare(store)
            store.change("CALL db.awaitIndexes(3600)")
            store.read(EVERYTHING)
            yield store


def _read_through(path: Path) -> int:
    size = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            size += len(part)
    return size


def run(engine: str, n_edges: int, n_smaller: int, samples: int) -> list[Measured]:
    """One engine on the larger store, and on the smaller about things drawn there and about those alike."""
    pages = (n_edges + n_smaller) * BYTES_PER_EDGE // 2**20 + 256
    os.environ["ARCADEDB_JVM_ARGS"] = f"-Xmx{HEAP + pages}m -Darcadedb.maxPageRAM={pages}"
    with contextlib.ExitStack() as stack:
        place = os.environ.get("BENCH_STORES")
        stores = Path(place or stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-bench-")))
        drawn = prepared(engine, n_edges, stores / str(n_edges))
        fewer = prepared(engine, n_smaller, stores / str(n_smaller), drawn)
        large, small = (stack.enter_context(opened(engine, stores / str(n) / engine)) for n in (n_edges, n_smaller))
        print(f"{engine}, {n_edges:,} and {n_smaller:,} OV edges", file=sys.stderr, flush=True)
        n = WARM + samples
        sides = [
            Side(large, about_one_thing(drawn, n)),
            Side(small, about_one_thing(fewer, n)),
            Side(small, about_one_thing(fewer, n, "alike ")),
            # Not told: either store, and so either server's Java machine, is asked equally often.
            Side(large, about_one_thing(drawn, n)),
        ]
        measure(sides, [about_hubs(drawn) | WHOLE_STORE, WHOLE_STORE, {}, {}])
        return [side.found for side in sides[:3]]


def run_apart(engine: str, n_edges: int, n_smaller: int, samples: int) -> list[Measured]:
    """The same in a process of its own."""
    with tempfile.NamedTemporaryFile(prefix="atlas-bench-") as file:
        arguments = [engine, str(n_edges), str(n_smaller), str(samples), file.name]
        subprocess.run([sys.executable, "-m", "benchmarks.bench_queries", "one", *arguments], check=True)
        return pickle.load(file)


def column(engine: str, n_edges: int, samples: int, found: list[Measured]) -> dict[str, object]:
    """What the table tells of one engine."""
    large, small, alike = found
    made: dict[str, object] = {"engine": engine, "OV edges": n_edges, "samples": samples}
    over: list[str] = []
    for name in large.times:
        figures, goals, growth = large.figures(name), GOALS[2:], ""
        if name in small.times and name not in WHOLE_STORE:
            drawn, same_often = (figures[0] / side.figures(name)[0] for side in (small, alike))
            growth, goals = f" ({drawn:.2f}, {same_often:.2f})", (*GOALS[:2], GROWTH)
            figures = [*figures, same_often]
        elif name.endswith("hub"):
            goals = GOALS[1:2]
        made[name] = _cell(large.figures(name)) + growth
        if name != BESIDE and (not figures or any(f > goal for f, goal in zip(figures, goals, strict=True))):
            over.append(name)
    made["questions over their goal"] = ", ".join(over) or "none"
    return made


def _cell(figures: list[float]) -> str:
    return " / ".join(f"{figure:,.1f}" if figure < 100 else f"{figure:,.0f}" for figure in figures) or "failed"


def main(which: str, n_edges: int = 10_000_000, samples: int = 200, n_smaller: int = 1_000_000) -> None:
    """Measure both engines, or one, at both sizes and print one column for each."""
    engines = ENGINES if which == "both" else [which]
    found = {engine: run_apart(engine, n_edges, n_smaller, samples) for engine in engines}
    columns = [column(engine, n_edges, samples, found[engine]) for engine in engines]
    if which == "both":
        told = [compared(a, b) for a, b in zip(found["embedded"], found["neo4j"], strict=True)]
        for made in columns:
            made["answers compared with the other engine's"] = sum(n for n, _ in told)
            made["questions with an answer that differs"] = (
                ", ".join(sorted({x for _, xs in told for x in xs})) or "none"
            )
    print(json.dumps(columns))


if __name__ == "__main__":
    if sys.argv[1] == "one":
        with open(sys.argv[6], "wb") as output:
            pickle.dump(run(sys.argv[2], *map(int, sys.argv[3:6])), output)
    else:
        main(sys.argv[1], *map(int, sys.argv[2:5]))
