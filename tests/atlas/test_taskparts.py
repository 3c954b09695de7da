"""TaskPart after every writing, replacement, deletion and change of task, against pandas over the records."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from atlas.multitoken import write_multitoken
from atlas.records import CircuitRecord, PromptRecord
from atlas.schema import prepare
from atlas.store import Store
from atlas.taskparts import rebuild
from atlas.writer import delete_prompt, register, set_task, write_prompt
from tests.graph import verified
from tests.queries.expected import Tables, inside, tables
from tests.synthetic import synthetic_model, synthetic_multitoken, synthetic_prompt, synthetic_run

KEYS = ["task", "part", "source", "target", "via", "layer", "head"]
SUMS = ["n_circuits", "n_prompts", "n_prompts_as_root", "n_shares", "total_share"]
STORED = """
MATCH (t:TaskPart)
RETURN t.task AS task, t.part AS part, t.source AS source, t.target AS target, t.via AS via, t.layer AS layer,
       t.head AS head, t.n_circuits AS n_circuits, t.n_prompts AS n_prompts, t.n_prompts_as_root AS n_prompts_as_root,
       t.n_shares AS n_shares, t.total_share AS total_share, t.log2_circuits AS log2_circuits,
       t.log2_share AS log2_share, t.rules AS rules, t.n_circuits_by_rule AS n_circuits_by_rule,
       t.n_prompts_by_rule AS n_prompts_by_rule, t.n_prompts_as_root_by_rule AS n_prompts_as_root_by_rule,
       t.n_shares_by_rule AS n_shares_by_rule, t.total_share_by_rule AS total_share_by_rule
"""


def expected(prompts: list[PromptRecord]) -> pd.DataFrame:
    t = tables(prompts)
    rows = _parts(t)
    whole = _summed(rows, KEYS)
    by_rule = _summed(rows, [*KEYS, "rule"]).reset_index().sort_values("rule")
    lists = by_rule.groupby(KEYS, dropna=False).agg(rules=("rule", list), **{f"{n}_by_rule": (n, list) for n in SUMS})
    size = whole["total_share"].abs().clip(2.0**-30)
    logs = {name: np.floor(np.log2(values)) for name, values in (("circuits", whole["n_circuits"]), ("share", size))}
    return whole.join(lists).assign(log2_circuits=logs["circuits"], log2_share=logs["share"]).reset_index()


def _parts(t: Tables) -> pd.DataFrame:
    """Every circuit, node of one and edge within one, with what it gives: one row each."""
    chosen = t.circuits[t.circuits["task"].notna()]
    rows = inside(t, chosen).drop(columns="task", errors="ignore")
    other = {"Error": "error", "Bias": "bias"}
    names = {
        id: feature if isinstance(feature, str) else f"L{layer} {site} {other[kind]}" if kind in other else name
        for id, feature, layer, site, kind, name in t.nodes[
            ["id", "feature", "layer", "site", "kind", "name"]
        ].itertuples(index=False)
    }
    rows["source"], rows["target"] = rows["source_id"].map(names), rows["target_id"].map(names)
    rows = pd.concat([rows, chosen[["circuit"]].assign(part="circuit")])
    rows = rows.merge(chosen[["circuit", "prompt", "task", "rule"]], on="circuit", validate="m:1")
    return rows.assign(root_prompt=rows["prompt"].where(rows["is_root"].eq(True)))


def _summed(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return rows.groupby(keys, dropna=False).agg(
        n_circuits=("circuit", "nunique"),
        n_prompts=("prompt", "nunique"),
        n_prompts_as_root=("root_prompt", "nunique"),
        n_shares=("share", "count"),
        total_share=("share", "sum"),
    )


def assert_parts(store: Store, prompts: list[PromptRecord]) -> None:
    stored, wanted = (_sorted(frame) for frame in (store.read(STORED), expected(prompts)))
    listed = [name for name in stored if name.endswith("_by_rule")]
    for name in listed:
        for ours, theirs in zip(stored[name], wanted[name], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    stored, wanted = stored.drop(columns=listed), wanted[stored.columns].drop(columns=listed)
    pd.testing.assert_frame_equal(stored, wanted, check_dtype=False, check_column_type=False, rtol=1e-9, atol=1e-12)


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = {"layer": "float64", "head": "float64"}
    texts = {name: frame[name].astype("string") for name in ("source", "target", "via")}
    return frame.assign(**texts).astype(numbers).sort_values(KEYS, na_position="first").reset_index(drop=True)


def under(rule: str, circuit: CircuitRecord) -> CircuitRecord:
    """The same circuit under another rule, with half its members."""
    kept = sorted({0, *range(0, len(circuit.members), 2), int(np.flatnonzero(circuit.members == circuit.root)[0])})
    id = circuit.id.replace("/relative", f"/{rule}")
    return replace(circuit, id=id, rule=rule, members=circuit.members[kept], attribution=circuit.attribution[kept])


@pytest.fixture
def prompts() -> list[PromptRecord]:
    """Two prompts of a task, one of them by two rules; one of another; one of none."""
    tasks = ["stones", "stones", "rivers/node", None]
    found = [replace(synthetic_prompt(seed, 4, 3, 0.4), task=task) for seed, task in enumerate(tasks)]
    circuits = found[0].circuits
    found[0] = replace(found[0], circuits=(*circuits, *(under("paper", circuit) for circuit in circuits)))
    return found


def test_parts_follow_writing_replacement_and_deletion(filled: Store, prompts: list[PromptRecord]) -> None:
    wanted = expected(prompts)
    assert_parts(filled, prompts)
    assert wanted["n_prompts"].max() == 2, "circuits must meet again, or nothing is added up"
    assert wanted["n_prompts_as_root"].max() > 0
    assert wanted["rules"].map(len).max() == 2
    assert (wanted["n_circuits"] > wanted["n_prompts"]).any()
    first = prompts[0]
    fewer = replace(first, circuits=first.circuits[2:], task="rivers/node")
    write_prompt(filled, fewer, "run-1")
    assert_parts(filled, [fewer, *prompts[1:]])
    write_prompt(filled, first, "run-1")
    before = filled.read(STORED)
    write_prompt(filled, first, "run-1")
    assert_parts(filled, prompts)
    pd.testing.assert_frame_equal(_sorted(filled.read(STORED)), _sorted(before))
    write_multitoken(filled, [synthetic_multitoken(first)])
    assert_parts(filled, prompts)
    write_prompt(filled, first, "run-1")
    assert_parts(filled, prompts)
    delete_prompt(filled, prompts[1].id)
    assert_parts(filled, [prompts[0], *prompts[2:]])
    for prompt in prompts:
        delete_prompt(filled, prompt.id)
    assert filled.read("MATCH (t:TaskPart) RETURN count(t) AS n")["n"][0] == 0


def test_parts_follow_a_change_of_task(filled: Store, prompts: list[PromptRecord]) -> None:
    for place, task in ((0, "rivers/node"), (3, "stones"), (3, "stones"), (2, "hills")):
        set_task(filled, prompts[place].id, task)
        prompts[place] = replace(prompts[place], task=task)
        assert_parts(filled, prompts)
    set_task(filled, "no such prompt", "stones")
    assert_parts(filled, prompts)


def test_a_failed_writing_leaves_parts_alone(filled: Store, prompts: list[PromptRecord]) -> None:
    with pytest.raises(Exception, match="refer to what is not in the store"):
        write_prompt(filled, replace(synthetic_prompt(7), task="stones"), "no such run")
    assert_parts(filled, prompts)


def test_a_root_of_value_0_gives_no_share(store: Store) -> None:
    register(store, synthetic_model(), synthetic_run())
    prompt = replace(synthetic_prompt(1), task="stones")
    zero = replace(prompt.circuits[0], root_value=0.0)
    write_prompt(store, replace(prompt, circuits=(zero,)), "run-1")
    found = store.read("MATCH (t:TaskPart {part: 'node'}) RETURN t.n_shares AS n, t.total_share AS share")
    assert found["n"].sum() == found["share"].abs().sum() == 0
    checked, violations = verified(store, "task parts")
    assert (violations, checked > len(found)) == (0, True)


def test_a_store_from_before_parts_gets_them(filled: Store, prompts: list[PromptRecord]) -> None:
    filled.change("MATCH (t:TaskPart) DELETE t")
    assert verified(filled, "task parts") == (len(expected(prompts)),) * 2
    filled.change("MATCH (s:Schema {id: 'atlas'}) SET s.version = 4")
    prepare(filled)
    assert_parts(filled, prompts)
    assert verified(filled, "task parts") == (len(expected(prompts)), 0)


def test_names_with_anything_in_them_stay_apart(store: Store) -> None:
    """A token may hold quotes, slashes and arrows, and a task too."""
    register(store, synthetic_model(), synthetic_run())
    prompts = [
        replace(synthetic_prompt(seed, 4, 3, 0.4), task=task)
        for seed, task in enumerate(['a" in b', "a", 'x" -> "y" L1.H0 in a'])
    ]
    for i, prompt in enumerate(prompts):
        nodes = tuple(node._replace(name=node.name + ('" -> "', '"', " in a")[i]) for node in prompt.nodes)
        prompts[i] = replace(prompt, nodes=nodes)
        write_prompt(store, prompts[i], "run-1")
    assert_parts(store, prompts)
    rebuild(store)
    assert_parts(store, prompts)
