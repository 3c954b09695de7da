"""The store of the benchmark, a small one: both engines give every answer alike, row by row and in order."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from atlas.schema import prepare
from atlas.store import connect
from benchmarks import bench_queries, generated
from benchmarks.generated import Table, generate, load_embedded, load_neo4j
from queries.catalogue import questions
from tests import neo4j_server
from tests.graph import verified


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    """Six prompts of a small stock of features, so that they share some."""
    monkeypatch.setattr(generated, "D_SAE", 16)
    return generate(6 * generated.EDGES_PER_PROMPT)


def test_feeds_is_what_the_edges_give(tables: list[Table]) -> None:
    of = {t.name: t.rows for t in tables if t.name not in ("FEEDS", "VIRTUAL_WEIGHT")}
    nodes = pd.concat([t.rows for t in tables if t.labels.startswith("CircuitNode")]).set_index("#")
    feature = of["OF"].set_index("source")["target"]
    edges = pd.concat([of["OV"].assign(via="OV"), of["DIRECT"].assign(via="DIRECT")])
    edges["share"] = edges["weight"] / nodes["pre_activation"].reindex(edges["target"]).to_numpy()
    edges["prompt"] = nodes["prompt"].reindex(edges["target"]).to_numpy()
    edges["source"], edges["target"] = (feature.reindex(edges[end]).to_numpy() for end in ("source", "target"))
    keys = ["source", "target", "via", "layer", "head"]
    wanted = edges.dropna(subset=["source", "target"]).groupby(keys, dropna=False)
    wanted = wanted.agg(
        n_prompts=("prompt", "nunique"),
        n_edges=("weight", "size"),
        mean_weight=("weight", "mean"),
        mean_share=("share", "mean"),
    )
    feeds = pd.concat([t.rows for t in tables if t.name == "FEEDS"]).groupby(keys, dropna=False)[wanted.columns].sum()
    pd.testing.assert_frame_equal(feeds, wanted, check_index_type=False, check_dtype=False)
    assert (wanted["n_prompts"] > 1).any()


def test_task_parts_are_what_the_circuits_give(tables: list[Table], tmp_path: Path) -> None:
    parts = pd.concat([t.rows for t in tables if t.name == "TaskPart"])
    assert (parts.groupby("part")["n_circuits"].max() > 1).all()
    assert parts["n_prompts_as_root"].max() > 0
    load_embedded(tmp_path / "store", tables)
    with connect(tmp_path / "store") as store:
        assert verified(store, "task parts") == (len(parts), 0)


def test_alike_are_things_that_are_nodes_as_often(tables: list[Table]) -> None:
    drawn = bench_queries.things(tables, None)
    again = bench_queries.things(tables, drawn)
    n_nodes = next(t.rows for t in tables if t.name == "OF")["target"].value_counts()
    number = {id: i for i, id in enumerate(next(t.rows for t in tables if t.name == "Feature")["id"])}
    for name in ("features", "pairs", "looks"):
        often = [min(n_nodes[number[id]] for id in thing) for thing in again[f"alike {name}"]]
        assert often == drawn[f"nodes of {name}"]
        assert again[f"alike {name}"] != drawn[name]


@pytest.mark.neo4j
def test_both_engines_answer_alike(tables: list[Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shutil.which("mvn") and shutil.which("java")):
        pytest.skip("neo4j-admin is in the jars, which need Maven and a JDK")
    drawn = bench_queries.things(tables, None, 2)
    about_one = bench_queries.about_one_thing(drawn, 2)
    asks = [(name, call) for name, calls in about_one.items() for call in calls]
    asks += [*bench_queries.about_hubs(drawn).items(), *bench_queries.WHOLE_STORE.items()]
    assert {name.split()[0].strip(",") for name, _ in asks} == set(questions())
    load_embedded(tmp_path / "store", tables)
    with neo4j_server.running(lambda home: load_neo4j(home, tables), options=neo4j_server.BRIEF) as server:
        monkeypatch.setenv("NEO4J_PASSWORD", server.password)
        with connect(tmp_path / "store") as embedded, connect(server.bolt) as neo4j:
            prepare(neo4j)
            for name, call in asks:
                a, b = call(embedded), call(neo4j)
                assert bench_queries.same(a, b), f"{name}:\n{a}\n{b}"
