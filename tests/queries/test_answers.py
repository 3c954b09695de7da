"""Every question's answer against the same question asked of the records in pandas, on both engines."""

from collections.abc import Callable
from functools import partial

import pandas as pd
import pytest

import queries
from atlas.errors import AtlasError
from atlas.store import Store
from queries.ask import typed
from queries.catalogue import question, questions
from tests.queries import expected
from tests.queries.conftest import Filled, write_some_wires

ALL = 100_000


def assert_answer(answer: pd.DataFrame, name: str, wanted: pd.DataFrame, keys: list[str]) -> None:
    """The same rows, and in the order of `keys`' values where the caller has put those first."""
    wanted = typed(wanted.astype(object), question(name))
    assert len(wanted) > 0, "a comparison of nothing proves nothing"
    pd.testing.assert_frame_equal(_sorted(answer, keys), _sorted(wanted, keys), rtol=1e-9)


def _sorted(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return frame.sort_values(keys, na_position="first").reset_index(drop=True)


def assert_limits(ask: Callable[..., pd.DataFrame], answer: pd.DataFrame) -> None:
    """Limits around what the first step gives answer with the first rows of the whole answer."""
    first = int((answer["hop"] == 1).sum())
    for limit in {1, first, first + 1}:
        pd.testing.assert_frame_equal(ask(limit=limit), answer.head(limit))


def assert_falls(values: pd.Series) -> None:
    assert values.is_monotonic_decreasing


def test_circuits(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    (task, other), (rule, rare) = filled.tasks, filled.rules
    prompt = t.circuits.loc[t.circuits["task"] == task, "prompt"].iloc[0]
    feature = t.nodes.loc[t.nodes["id"].isin(t.members["node"]), "feature"].dropna().iloc[0]
    asked = [
        {},
        {"prompt": prompt},
        {"feature": feature},
        {"task": task},
        {"rule": rare},
        {"prompt": prompt, "rule": rule},
        {"prompt": prompt, "feature": feature, "task": task},
    ]
    for given in asked:
        answer = queries.circuits(store, **given, limit=ALL)
        assert_answer(answer, "circuits", expected.circuits(t, **given), ["circuit"])
        assert_falls(-(1 - answer["completeness"]).abs())
    assert len(queries.circuits(store, prompt=prompt, task=other)) == 0
    whole = queries.circuits(store)
    pd.testing.assert_frame_equal(queries.circuits(store, limit=3), whole.head(3))


def test_circuit(filled: Filled) -> None:
    for name in filled.tables.circuits["circuit"]:
        wanted = expected.circuit(filled.tables, name)
        answer = queries.circuit(filled.store, name)
        if len(wanted):
            assert_answer(answer, "circuit", wanted, ["source", "target", "head"])
        else:
            assert answer.empty
        assert answer["target_layer"].is_monotonic_decreasing


def test_circuit_nodes(filled: Filled) -> None:
    for name in filled.tables.circuits["circuit"]:
        answer = queries.circuit_nodes(filled.store, name)
        assert_answer(answer, "circuit_nodes", expected.circuit_nodes(filled.tables, name), ["node"])
        assert_falls(answer["attribution"].abs())


def test_upstream(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    edges = expected.ends(t)
    strong = edges[edges["share"].abs() >= 0.5]
    feature = strong.loc[strong["target_layer"] == 1, "target_feature"].value_counts().idxmax()
    logits = edges[edges["target_kind"] == "Logit"]
    node, share = logits.loc[logits["share"].abs().idxmax(), ["target", "share"]]
    asked = [
        {"feature": feature},
        {"feature": feature, "hops": 1, "min_share": 0.0},
        {"feature": feature, "hops": 4, "min_share": 0.5},
        {"node": node, "hops": 6, "min_share": min(0.2, 0.9 * abs(share))},
        {"node": node, "via": "DIRECT", "hops": 3, "min_share": min(0.05, 0.9 * abs(share))},
    ]
    keys = ["hop", "source", "target", "via", "layer", "head"]
    for given in asked:
        answer = queries.upstream(store, **given, limit=ALL)
        assert_answer(answer, "upstream", expected.upstream(t, **given), keys)
        assert answer["hop"].is_monotonic_increasing
        for _, step in answer.groupby("hop"):
            assert_falls(step["n_prompts"])
        assert_limits(partial(queries.upstream, store, **given), answer)
    assert set(queries.upstream(store, feature=feature, hops=1)["target"]) == {feature}


def test_prompts_of(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    feature = t.firings["feature"].value_counts().idxmax()
    for given in ({}, {"task": filled.tasks[0]}):
        answer = queries.prompts_of(store, feature, **given)
        assert_answer(answer, "prompts_of", expected.prompts_of(t, feature, **given), ["prompt"])
        assert_falls(answer["max"])


def test_edges_between(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    pairs = expected.ends(t).dropna(subset=["source_feature", "target_feature"])
    for via in ("OV", "DIRECT"):
        a, b = pairs.loc[pairs["via"] == via].groupby(["source_feature", "target_feature"]).size().idxmax()
        heads = pairs.loc[(pairs["source_feature"] == a) & (pairs["target_feature"] == b), "head"]
        asked = [{}, {"via": via}, {"head": int(heads.max())}] if via == "OV" else [{}]
        for given in asked:
            answer = queries.edges_between(store, a, b, **given)
            wanted = expected.edges_between(t, a, b, **given)
            assert_answer(answer, "edges_between", wanted, ["source", "target", "head"])
            assert_falls(answer["share"].abs())


def test_shared_features(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    task, rule = filled.tasks[0], filled.rules[0]
    asked = [
        {"min_share_of_prompts": 0.0},
        {"min_share_of_prompts": 0.6},
        {"min_share_of_prompts": 0.3, "layer": 1},
        {"min_share_of_prompts": 0.3, "site": "attn", "rule": rule},
    ]
    for given in asked:
        answer = queries.shared_features(store, task, **given, limit=ALL)
        assert_answer(answer, "shared_features", expected.shared_features(t, task, **given), ["feature"])
        assert_falls(answer["n_prompts"])


def test_attention(filled: Filled) -> None:
    answered = 0
    for name in filled.tables.circuits["circuit"]:
        wanted = expected.attention(filled.tables, name)
        answer = queries.attention(filled.store, name, limit=ALL)
        answered += len(wanted) > 0
        if len(wanted):
            assert_answer(answer, "attention", wanted, ["layer", "head", "query", "key", "query_node", "key_node"])
        else:
            assert answer.empty
        assert_falls(answer["share"])
        for _, pairs in answer.groupby(["layer", "head", "query", "key"], sort=False):
            assert_falls(pairs["qk"].abs())
        pd.testing.assert_frame_equal(queries.attention(filled.store, name, limit=7), answer.head(7))
    assert answered > 3
    assert (filled.tables.pairs["query_node"] == filled.tables.pairs["key_node"]).any(), "with a node and itself"


def test_qk_between(filled: Filled) -> None:
    store, pairs = filled.store, expected.pairs(filled.tables)
    both = pairs.dropna(subset=["key_feature", "query_feature"])
    itself = both[both["query_node"] == both["key_node"]]
    for a, b in (
        both.groupby(["key_feature", "query_feature"]).size().idxmax(),
        itself[["key_feature", "query_feature"]].iloc[0],
    ):
        answer = queries.qk_between(store, a, b, limit=ALL)
        wanted = expected.qk_between(filled.tables, a, b)
        assert_answer(answer, "qk_between", wanted, ["key_node", "query_node", "layer", "head"])
        assert_falls(answer["qk"].abs())


GIVEN = {
    "attention": {"circuit": "a"},
    "circuit": {"circuit": "a"},
    "circuit_nodes": {"circuit": "a"},
    "circuits": {},
    "coactive": {"feature": "a"},
    "consensus": {"task": "a"},
    "diff": {"a": "a", "b": "b"},
    "downstream": {"feature": "a"},
    "drivers_of_head": {"layer": 0, "head": 0},
    "edges_between": {"a": "a", "b": "b"},
    "errors": {},
    "faithful": {},
    "feature": {"feature": "a"},
    "find_features": {},
    "motifs": {},
    "prompts_of": {"feature": "a"},
    "qk_between": {"a": "a", "b": "b"},
    "shared_features": {"task": "a"},
    "similar_circuits": {"circuit": "a"},
    "spans": {},
    "specificity": {"a": "a", "b": "b"},
    "strongest_paths": {"circuit": "a"},
    "upstream": {"feature": "a"},
    "used": {},
    "wired": {},
}


def test_an_empty_store_answers_with_typed_empty_tables(store: Store) -> None:
    dtypes = {"string": "string", "integer": "Int64", "float": "float64", "boolean": "boolean", "list": "object"}
    assert set(GIVEN) == set(questions())
    for name, given in GIVEN.items():
        answer = getattr(queries, name)(store, **given)
        assert len(answer) == 0
        wanted = {column.name: dtypes[column.type] for column in question(name).columns}
        assert {str(c): str(d) for c, d in answer.dtypes.items()} == wanted


def test_dtypes_do_not_depend_on_the_rows(filled_embedded: Filled) -> None:
    store = filled_embedded.store
    full = queries.circuits(store)
    assert full.dtypes.equals(queries.circuits(store, rule="top_mass").dtypes)


def test_what_is_not_in_the_store_is_named_with_the_nearest(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    feature = t.firings["feature"].iloc[0]
    with pytest.raises(AtlasError, match="There is no feature") as error:
        queries.prompts_of(store, feature + "0000")
    assert feature in str(error.value)
    with pytest.raises(AtlasError, match=r"There is no task 'stone' in the store; nearest: stones"):
        queries.shared_features(store, "stone")
    with pytest.raises(AtlasError, match="There is no circuit"):
        queries.circuit(store, t.circuits["circuit"][0] + "x")


HOSTILE = [
    "' OR 1=1 //",
    '"}) DETACH DELETE n //',
    "`",
    "$feature",
    "\\",
    "{{}}",
    "\n",
    "«é»",
    "*/ RETURN 1",
    "\x1b[31m",
]


def test_hostile_parameters_stay_data(filled: Filled) -> None:
    before = filled.store.read("MATCH (n) RETURN count(n) AS n")["n"][0]
    for text in HOSTILE:
        with pytest.raises(AtlasError, match="There is no"):
            queries.prompts_of(filled.store, text)
        with pytest.raises(AtlasError, match="There is no"):
            queries.circuits(filled.store, task=text)
    assert filled.store.read("MATCH (n) RETURN count(n) AS n")["n"][0] == before


@pytest.mark.neo4j
def test_each_file_runs_as_pasted_into_browser(filled_neo4j: Filled) -> None:
    """The header's :param line gives every parameter; Browser sends its numbers as floats."""
    store, t = filled_neo4j.store, filled_neo4j.tables
    circuit = t.circuits["circuit"][0]
    pairs = expected.ends(t).dropna(subset=["source_feature", "target_feature"])
    fires = pairs["source_feature"].isin(set(t.firings["feature"]))
    a, b = pairs.loc[fires, ["source_feature", "target_feature"]].iloc[0]
    looked = expected.pairs(t).dropna(subset=["key_feature", "query_feature"]).iloc[0]
    real = {
        "attention": {"circuit": circuit},
        "circuit": {"circuit": circuit},
        "circuit_nodes": {"circuit": circuit},
        "circuits": {"task": "stones"},
        "coactive": {"feature": a},
        "consensus": {"task": "stones"},
        "diff": {"a": "stones", "b": "rivers"},
        "downstream": {"feature": a},
        "drivers_of_head": {"layer": 1, "head": 0},
        "edges_between": {"a": a, "b": b},
        "errors": {"task": "stones"},
        "faithful": {"task": "stones"},
        "feature": {"feature": a},
        "find_features": {"text": "stones", "layer": None, "site": None},
        "motifs": {"min_prompts": 1},
        "prompts_of": {"feature": a},
        "qk_between": {"a": looked["key_feature"], "b": looked["query_feature"]},
        "shared_features": {"task": "stones"},
        "similar_circuits": {"circuit": circuit},
        "spans": {"feature": None},
        "specificity": {"a": a, "b": b, "c": None, "task": None, "via": None, "head": None},
        "strongest_paths": {"circuit": circuit, "source": None},
        "upstream": {"feature": b},
        "used": {"show": "all", "feature": None},
        "wired": {"show": "all", "feature": None},
    }
    write_some_wires(store, t)
    for name, asked in questions().items():
        literal = asked.browser.removeprefix(":param ")
        parameters = store.read(f"RETURN {literal} AS parameters")["parameters"][0]
        checked = asked.check(parameters)
        assert set(parameters) == set(checked)
        as_sent = {k: float(v) if isinstance(v, int) else v for k, v in (checked | real[name]).items()}
        pasted = store.read(asked.cypher, **as_sent)
        assert list(pasted.columns) == [column.name for column in asked.columns]
        answer = getattr(queries, name)(store, **(checked | real[name]))
        assert len(answer) > 0
        pd.testing.assert_frame_equal(answer, typed(pasted, asked))
