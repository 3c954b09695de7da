"""FEEDS after every writing, replacement and deletion, against the same sums taken over the records in pandas."""

from dataclasses import replace

import pandas as pd
import pytest

from atlas.feeds import rebuild
from atlas.records import PromptRecord
from atlas.schema import prepare
from atlas.store import Store
from atlas.writer import delete_prompt, write_prompt
from tests.graph import verified
from tests.synthetic import synthetic_prompt

KEYS = ["source", "target", "via", "layer", "head"]
STORED = """
MATCH (a:Feature)-[r:FEEDS]->(b:Feature)
RETURN a.id AS source, b.id AS target, r.via AS via, r.layer AS layer, r.head AS head,
       r.n_prompts AS n_prompts, r.n_edges AS n_edges, r.mean_weight AS mean_weight, r.mean_share AS mean_share,
       r.log2_prompts AS log2_prompts
"""


def expected(prompts: list[PromptRecord]) -> pd.DataFrame:
    rows = []
    for p in prompts:
        features = [f"{n.dictionary}/{n.index}" if n.dictionary else None for n in p.nodes]
        d, o = p.direct, p.ov
        edges = [(s, t, "DIRECT", None, None, w) for s, t, w in zip(d.source, d.target, d.weight, strict=True)]
        columns = (o.source, o.target, o.layer, o.head, o.weight)
        edges += [(s, t, "OV", layer, head, w) for s, t, layer, head, w in zip(*columns, strict=True)]
        for s, t, via, layer, head, weight in edges:
            row = {"source": features[s], "target": features[t], "via": via, "layer": layer, "head": head}
            rows.append(row | {"weight": weight, "share": weight / (p.nodes[t].pre_activation or 1), "prompt": p.id})
    frame = pd.DataFrame(rows).dropna(subset=["source", "target"])
    feeds = frame.groupby(KEYS, dropna=False, as_index=False).agg(
        n_prompts=("prompt", "nunique"),
        n_edges=("weight", "size"),
        mean_weight=("weight", "mean"),
        mean_share=("share", "mean"),
    )
    return feeds.assign(log2_prompts=[int(n).bit_length() - 1 for n in feeds["n_prompts"]])


def assert_counted(store: Store, prompts: list[PromptRecord]) -> None:
    """Every feature knows in how many prompts it fires."""
    stored = store.read("MATCH (f:Feature) RETURN f.id AS id, coalesce(f.n_prompts, 0) AS n").set_index("id")["n"]
    fired = pd.Series([f"{d}/{index}" for prompt in prompts for d, index in prompt.firings.features], dtype=object)
    wanted = fired.value_counts().reindex(stored.index, fill_value=0)
    pd.testing.assert_series_equal(stored, wanted, check_names=False, check_dtype=False)


def assert_feeds(store: Store, prompts: list[PromptRecord]) -> None:
    stored = _sorted(store.read(STORED))
    wanted = _sorted(expected(prompts))
    pd.testing.assert_frame_equal(stored, wanted, check_dtype=False, check_column_type=False, rtol=1e-9)


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = {"layer": "float64", "head": "float64"}
    return frame.astype(numbers).sort_values(KEYS, na_position="first").reset_index(drop=True)


@pytest.fixture
def prompts() -> list[PromptRecord]:
    return [synthetic_prompt(seed, n_tokens=4, n_active=4, density=0.3) for seed in range(3)]


def test_feeds_follow_writing_replacement_and_deletion(filled: Store, prompts: list[PromptRecord]) -> None:
    assert_feeds(filled, prompts)
    assert expected(prompts)["n_prompts"].max() > 1, "features must meet again, or nothing is added up"
    first = prompts[0]
    fewer = replace(first, direct=type(first.direct)(*(a[::2] for a in vars(first.direct).values())))
    write_prompt(filled, fewer, "run-1")
    assert_feeds(filled, [fewer, *prompts[1:]])
    assert_counted(filled, prompts)
    write_prompt(filled, first, "run-1")
    write_prompt(filled, first, "run-1")
    assert_feeds(filled, prompts)
    delete_prompt(filled, prompts[1].id)
    assert_feeds(filled, [prompts[0], prompts[2]])
    assert_counted(filled, [prompts[0], prompts[2]])
    assert delete_prompt(filled, "no such prompt") is False
    delete_prompt(filled, prompts[0].id)
    delete_prompt(filled, prompts[2].id)
    assert filled.read("MATCH ()-[r:FEEDS]->() RETURN count(r) AS n")["n"][0] == 0


def test_a_failed_writing_leaves_feeds_alone(filled: Store, prompts: list[PromptRecord]) -> None:
    with pytest.raises(Exception, match="refer to what is not in the store"):
        write_prompt(filled, synthetic_prompt(7), "no such run")
    assert_feeds(filled, prompts)


def test_verify_finds_what_is_wrong_in_feeds(filled: Store) -> None:
    n = int(filled.read("MATCH ()-[r:FEEDS]->() RETURN count(r) AS n")["n"][0])
    assert verified(filled, "feeds") == (n, 0)
    pick = "MATCH (a)-[r:FEEDS]->(b) WITH a, b, r ORDER BY a.id, b.id, r.head LIMIT 1 "
    for spoil in (
        "SET r.mean_weight = r.mean_weight + 1",
        "SET r.n_prompts = r.n_prompts + 1",
        "SET r.log2_prompts = r.log2_prompts + 1",
        "CREATE (a)-[:FEEDS {via: r.via, layer: r.layer, head: r.head, n_prompts: 0, n_edges: 0, mean_weight: 0.0, "
        "mean_share: 0.0, log2_prompts: 0}]->(b)",
        "DELETE r",
    ):
        filled.write(lambda transaction, spoil=spoil: transaction.run(pick + spoil).consume())
        assert verified(filled, "feeds") == (n, 1), spoil
        rebuild(filled)
        assert verified(filled, "feeds") == (n, 0)


def test_a_store_from_before_feeds_gets_them(filled: Store, prompts: list[PromptRecord]) -> None:
    filled.write(lambda transaction: transaction.run("MATCH ()-[r:FEEDS]->() DELETE r").consume())
    filled.write(lambda transaction: transaction.run("MATCH (s:Schema {id: 'atlas'}) SET s.version = 1").consume())
    prepare(filled)
    assert_feeds(filled, prompts)


def test_a_store_without_numbers_of_prompts_gets_them(filled: Store, prompts: list[PromptRecord]) -> None:
    filled.change("MATCH ()-[r:FEEDS]->() REMOVE r.log2_prompts")
    filled.change("MATCH (f:Feature) REMOVE f.n_prompts")
    assert verified(filled, "features")[1] == len(
        {feature for prompt in prompts for feature in prompt.firings.features}
    )
    filled.change("MATCH (s:Schema {id: 'atlas'}) SET s.version = 3")
    prepare(filled)
    assert_feeds(filled, prompts)
    assert_counted(filled, prompts)
