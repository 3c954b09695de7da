"""The questions about features, paths, motifs and differences against pandas over the records, on both engines."""

import json
from functools import partial

import pandas as pd
import pytest

import queries
from atlas.errors import AtlasError
from atlas.multitoken import write_multitoken
from atlas.store import Store
from queries.ask import ask, typed
from queries.catalogue import question
from tests.queries import expected
from tests.queries.conftest import Filled, write_some_wires
from tests.queries.scans import SCANS
from tests.queries.test_answers import ALL, assert_answer, assert_falls, assert_limits
from tests.synthetic import synthetic_multitoken, synthetic_prompt


def most_common(filled: Filled, layer: int) -> str:
    nodes = filled.tables.nodes
    return nodes.loc[nodes["layer"] == layer].groupby("feature")["prompt"].nunique().idxmax()


def largest_circuit(filled: Filled) -> str:
    circuits = filled.tables.circuits
    return circuits.loc[circuits["n_edges"].idxmax(), "circuit"]


def test_find_features(filled: Filled) -> None:
    asked = [
        {},
        {"text": "STONE"},
        {"layer": 1, "site": "attn"},
        {"site": "mlp", "min_prompts": 2},
        {"min_prompts": 1, "max_prompts": 1},
    ]
    for given in asked:
        answer = queries.find_features(filled.store, **given, limit=ALL)
        assert_answer(answer, "find_features", expected.find_features(filled.tables, **given), ["feature"])
        assert_falls(answer["n_prompts"])


def test_feature(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    sums = expected.feeds(t)
    middle = sums.loc[sums["source_feature"].isin(sums["target_feature"]), "source_feature"].value_counts().idxmax()
    asked = [(middle, 5), (most_common(filled, 1), 2), (next(iter(t.labels)), 1)]
    for feature, top in asked:
        answer = queries.feature(store, feature, top=top)
        assert_answer(answer, "feature", expected.feature(t, feature, top), ["part", "rank"])
        assert list(dict.fromkeys(answer["part"]))[:2] == ["feature", "prompt"]
    assert set(queries.feature(store, asked[0][0])["part"]) == {"feature", "prompt", "driver", "driven"}


def test_coactive(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    feature = t.firings["feature"].value_counts().idxmax()
    for given in ({}, {"task": filled.tasks[0]}, {"prompts": 1}):
        answer = queries.coactive(store, feature, **given, limit=ALL)
        assert_answer(answer, "coactive", expected.coactive(t, feature, **given), ["feature"])
        assert_falls(answer["overlap"])
        assert feature not in set(answer["feature"])


def test_spans(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    whole = expected.spans(t)
    prompt, feature = whole["prompt"].iloc[0], whole["feature"].value_counts().idxmax()
    for given in ({}, {"prompt": prompt}, {"feature": feature}):
        answer = queries.spans(store, **given, limit=ALL)
        assert_answer(answer, "spans", expected.spans(t, **given), ["span"])
        assert_falls(answer["length"])
    assert len(queries.spans(store, min_length=3, limit=ALL)) == len(expected.spans(t, min_length=3))
    both = whole.iloc[0]
    answer = queries.spans(store, both["feature"], prompt=both["prompt"])
    assert set(answer["span"]) == set(expected.spans(t, both["feature"], both["prompt"])["span"])


def test_downstream(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    edges = expected.ends(t)
    strong = edges[edges["share"].abs() >= 0.3]
    feature = strong.loc[strong["via"] == "OV", "source_feature"].value_counts().idxmax()
    embedding = strong.loc[strong["source_kind"] == "Embedding", "source"].value_counts().idxmax()
    asked = [
        {"feature": feature},
        {"feature": feature, "hops": 4, "min_share": 0.3},
        {"feature": feature, "hops": 1, "min_share": 0.0, "via": "OV"},
        {"node": embedding, "hops": 3, "min_share": 0.2},
    ]
    for given in asked:
        answer = queries.downstream(store, **given, limit=ALL)
        keys = ["hop", "source", "target", "via", "layer", "head"]
        assert_answer(answer, "downstream", expected.downstream(t, **given), keys)
        assert answer["hop"].is_monotonic_increasing
        assert_limits(partial(queries.downstream, store, **given), answer)
    for given in ({}, {"feature": feature, "node": embedding}):
        with pytest.raises(AtlasError, match="give one of the two"):
            queries.downstream(store, **given)
        with pytest.raises(AtlasError, match="give one of the two"):
            queries.batches(store, "downstream", **given)


def test_strongest_paths(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    circuit = largest_circuit(filled)
    edges, root = expected.circuit(t, circuit), t.circuits.set_index("circuit").loc[circuit, "root"]
    into_root = edges[(edges["target"] == root) & (edges["source_layer"] == 0) & edges["source_feature"].notna()]
    inner = into_root.loc[into_root["share"].abs().idxmax(), "source_feature"]
    for given in ({}, {"hops": 3, "min_product": 0.05}, {"hops": 8, "min_product": 0.1}, {"source": inner}):
        wanted = expected.strongest_paths(t, circuit, **given)
        keys = zip(wanted["nodes"], wanted["heads"], strict=True)
        wanted["key"] = [json.dumps([*nodes, *heads]) for nodes, heads in keys]
        answer = queries.strongest_paths(store, circuit, **given, limit=ALL)
        assert_falls(answer["product"].abs())
        sizes = wanted["product"].abs().sort_values(ascending=False).head(3).tolist()
        top = queries.strongest_paths(store, circuit, **given, limit=3)
        assert top["product"].abs().tolist() == pytest.approx(sizes, rel=1e-9)
        answer = answer.assign(
            key=[json.dumps([*n, *h]) for n, h in zip(answer["nodes"], answer["heads"], strict=True)]
        )
        answer, wanted = (frame.sort_values("key").reset_index(drop=True) for frame in (answer, wanted))
        assert len(answer) == len(wanted) > 0
        for column in ("n_hops", "path", "key"):
            assert answer[column].tolist() == wanted[column].tolist()
        assert answer["product"].tolist() == pytest.approx(wanted["product"].tolist(), rel=1e-9)
        for ours, theirs in zip(answer["shares"], wanted["shares"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


def test_drivers_of_head(filled: Filled) -> None:
    for given in ({"layer": 1, "head": 0}, {"layer": 1, "head": 1, "via": "OV"}, {"layer": 1, "head": 1, "via": "QK"}):
        answer = queries.drivers_of_head(filled.store, **given, limit=ALL)
        wanted = expected.drivers_of_head(filled.tables, **given)
        assert_answer(answer, "drivers_of_head", wanted, ["via", "source", "target"])
        assert_falls(answer["n_prompts"])
    few = queries.drivers_of_head(filled.store, 1, 1, min_prompts=2, limit=ALL)
    assert len(few) == len(expected.drivers_of_head(filled.tables, 1, 1, min_prompts=2))


def test_motifs(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    keys = ["a", "ab", "b", "bc", "c"]
    for given in ({}, {"min_prompts": 1}, {"min_prompts": 1, "feature": most_common(filled, 0)}, {"via": "OV"}):
        answer = queries.motifs(store, **given, limit=ALL)
        assert_answer(answer, "motifs", expected.motifs(t, **given), keys)
        assert_falls(answer["n_prompts"])
    middle = expected.chains(t, min_prompts=1)["b"].value_counts().idxmax()
    often = {"min_prompts": filled.often}
    for given in (often, {"min_prompts": 1, "feature": middle}, {**often, "via": "DIRECT"}):
        answer = queries.motifs(store, length=3, **given, among=10_000, limit=ALL)
        assert_answer(answer, "motifs", expected.chains(t, **given), keys)
        assert_falls(answer["n_prompts"])


def test_consensus(filled: Filled) -> None:
    task = filled.tasks[0]
    for given in ({"min_share": 0.3, "rule": filled.rules[0]}, {"min_share": 0.05}):
        answer = queries.consensus(filled.store, task, **given, limit=ALL)
        wanted = expected.consensus(filled.tables, task, **given)
        assert_answer(answer, "consensus", wanted, ["part", "source", "target", "via", "head"])
        for _, part in answer.groupby("part"):
            assert_falls(part["n_circuits"])
    assert set(answer["part"]) == {"node", "edge"}


def test_diff(filled: Filled) -> None:
    store, circuits = filled.store, filled.tables.circuits
    first, last = circuits["circuit"].iloc[0], circuits["circuit"].iloc[-1]
    pairs = [(first, last), (circuits["prompt"].iloc[0], circuits["prompt"].iloc[-1]), filled.tasks]
    for a, b in pairs:
        answer = queries.diff(store, a, b, limit=ALL)
        wanted = expected.diff(filled.tables, a, b)
        assert_answer(answer, "diff", wanted, ["part", "source", "target", "via", "head"])
        assert_falls(answer["change"].abs())
    same = queries.diff(store, first, first, limit=ALL)
    assert set(same["found"]) == {"both"}
    assert (same["change"] == 0).all()
    task, other = filled.tasks
    refused = f"There is no circuit, prompt or task '{task}x' in the store; nearest: {task}"
    with pytest.raises(AtlasError, match=refused):
        queries.diff(store, other, task + "x")


def assert_scan(store: Store, name: str, **given: object) -> int:
    """The answer is that of a scan of the circuits, row by row and in order; returns how many rows."""
    answer = ask(store, name, given)
    asked = question(name)
    scanned = typed(store.read(SCANS[name], **asked.check(given)), asked)
    pd.testing.assert_frame_equal(answer, scanned, rtol=1e-9, atol=1e-12)
    return len(answer)


def test_questions_about_tasks_are_a_scan_of_their_circuits(filled: Filled) -> None:
    store, (task, other), rules = filled.store, filled.tasks, filled.rules
    paired = store.read("MATCH (:Prompt {task: $task})-[:HAS_CIRCUIT]->(c:Circuit) RETURN c.id AS id", task=task)
    write_multitoken(store, [synthetic_multitoken(synthetic_prompt(0, 4, 3, 0.4))])
    after = store.read("MATCH (:Prompt {task: $task})-[:HAS_CIRCUIT]->(c:Circuit) RETURN c.id AS id", task=task)
    assert len(after) == len(paired) + 1, "a multi-token circuit, which must not count"
    for rule in (None, *rules, "top_mass"):
        for share in (0.0, 0.2, 0.5, 1.0):
            n_rows = assert_scan(store, "consensus", task=task, min_share=share, rule=rule, limit=ALL)
            assert_scan(store, "consensus", task=task, min_share=share, rule=rule, limit=7)
            n_rows += assert_scan(
                store, "shared_features", task=task, min_share_of_prompts=share, rule=rule, layer=1, limit=ALL
            )
            assert (n_rows > 0) == (rule != "top_mass") or share == 1.0
    prompt, circuit = filled.tables.circuits[["prompt", "circuit"]].iloc[0]
    for a, b in ((task, other), (other, task), (task, task), (task, prompt), (circuit, other)):
        for limit in (1, 5, 60, ALL):
            assert assert_scan(store, "diff", a=a, b=b, limit=limit) > 0


def test_similar_circuits(filled: Filled) -> None:
    circuit = largest_circuit(filled)
    found: list[int] = []
    for among in (ALL, 3):
        answer = queries.similar_circuits(filled.store, circuit, among=among, limit=ALL)
        wanted = expected.similar_circuits(filled.tables, circuit, among)
        assert_answer(answer, "similar_circuits", wanted, ["circuit"])
        assert_falls(answer["similarity"])
        found.append(len(answer))
    assert found[1] < found[0]


def test_specificity(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    tasked = expected.ends(t).dropna(subset=["source_feature", "target_feature", "source_task"])
    a, b = tasked.groupby(["source_feature", "target_feature"])["source_prompt"].nunique().idxmax()
    chain = expected.chains(t, min_prompts=1)
    chain = chain[chain["a"].isin(tasked["source_feature"])].iloc[0]
    asked = [
        {"a": a, "b": b},
        {"a": a, "b": b, "task": filled.tasks[1]},
        {"a": a, "b": b, "task": filled.tasks[0]},
        {"a": chain["a"], "b": chain["b"], "c": chain["c"], "task": filled.tasks[0]},
    ]
    for given in asked:
        answer = queries.specificity(store, **given)
        assert_answer(answer, "specificity", expected.specificity(t, **given), ["task"])


def test_errors(filled: Filled) -> None:
    for given in ({}, {"task": filled.tasks[0]}, {"rule": filled.rules[0]}):
        answer = queries.errors(filled.store, **given)
        assert_answer(answer, "errors", expected.errors(filled.tables, **given), ["task", "layer", "site"])
        assert_falls(answer["mean_size"])


def test_faithful(filled: Filled) -> None:
    middle = filled.tables.circuits["faithfulness"].median()
    for given in ({}, {"task": filled.tasks[0]}, {"rule": filled.rules[0], "min_faithfulness": max(0.0, middle)}):
        answer = queries.faithful(filled.store, **given, limit=ALL)
        assert_answer(answer, "faithful", expected.faithful(filled.tables, **given), ["circuit"])
        assert_falls(answer["faithfulness"])


def test_wired(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    wires = write_some_wires(store, t)
    target = wires["target"].iloc[0]
    for given in ({}, {"show": "all"}, {"show": "all", "via": "OV"}, {"show": "all", "feature": target}):
        answer = queries.wired(store, **given, limit=ALL)
        assert_answer(answer, "wired", expected.wired(t, wires, **given), ["source", "target", "via", "head"])
        assert_falls(answer["weight"].abs())
    assert (queries.wired(store, show="all")["n_prompts"] > 0).any()


def test_used(filled: Filled) -> None:
    store, t = filled.store, filled.tables
    wires = write_some_wires(store, t)
    target = wires["target"].iloc[0]
    some = ({}, {"show": "all"}, {"show": "all", "via": "DIRECT"}, {"show": "all", "feature": target})
    # Features on either side of a wire, and those that feed others past all wires.
    ends = sorted({*wires["target"], *wires["source"], *expected.feeds(t)["source_feature"]})
    of_features = [{"show": show, "feature": feature} for feature in ends[::8] for show in ("all", "weak")]
    for given in (*some, *of_features):
        answer, rows = queries.used(store, **given, among=ALL, limit=ALL), expected.used(t, wires, **given)
        if len(rows) or given in some:
            assert_answer(answer, "used", rows, ["source", "target", "via", "head"])
        assert len(answer) == len(rows)
        assert_falls(answer["n_prompts"])
    assert queries.used(store, show="all", among=ALL)["weight"].notna().any()


def test_questions_leave_no_trace(filled_embedded: Filled) -> None:
    store = filled_embedded.store
    count = "MATCH (n) OPTIONAL MATCH (n)-[r]->() RETURN count(DISTINCT n) AS nodes, count(r) AS edges"
    before = store.read(count)
    queries.motifs(store, length=3, min_prompts=1)
    queries.diff(store, "stones", "rivers")
    pd.testing.assert_frame_equal(store.read(count), before)
