"""Prompts into the store and back: whole, once, and only if everything of them is sound."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atlas import AtlasError
from atlas.multitoken import write_multitoken
from atlas.records import DirectEdges, Firings, PromptRecord, Spans
from atlas.store import Store
from atlas.verify import verify
from atlas.writer import Asked, WriteCounts, asked_before, delete_prompt, finish_run, register, write_prompt
from tests.graph import graph_in, graph_of
from tests.synthetic import synthetic_model, synthetic_multitoken, synthetic_prompt, synthetic_run

HOSTILE = "it's \"quoted\" `ticked` \\ {$x} '}) DETACH DELETE n // \n\t\r \x00 é 漢 😀 \u2028 ' OR 1=1"


@pytest.fixture
def ready(store: Store) -> Store:
    """A store that knows the model and the run, and holds no prompt."""
    register(store, synthetic_model(), synthetic_run())
    return store


def _small(seed: int) -> PromptRecord:
    return synthetic_prompt(seed, n_tokens=3, n_active=1)


def _counts(store: Store) -> dict[str, int]:
    nodes = store.read("MATCH (n) UNWIND labels(n) AS label RETURN label AS name, count(*) AS n")
    edges = store.read("MATCH ()-[e]->() RETURN type(e) AS name, count(*) AS n")
    return {str(name): int(n) for frame in (nodes, edges) for name, n in zip(frame["name"], frame["n"], strict=True)}


def test_a_prompt_comes_back_equal(ready: Store) -> None:
    record = synthetic_prompt(1)
    counts = write_prompt(ready, record, "run-1")
    assert graph_in(ready, record.id) == graph_of(record)
    edges = len(record.direct.weight) + len(record.ov.weight)
    assert counts == WriteCounts(len(record.nodes), edges, len(record.circuits), len(record.firings), replaced=False)


def test_what_is_not_measured_is_absent(ready: Store) -> None:
    write_prompt(ready, _small(2), "run-1")
    keys = ready.read("MATCH (n:Logit) WHERE n.versus IS NULL RETURN keys(n) AS keys")["keys"]
    assert len(keys) == 2
    assert all("versus" not in key and "value" not in key for key in keys)
    assert "task" not in ready.read("MATCH (p:Prompt) RETURN keys(p) AS keys")["keys"][0]


def test_writing_again_replaces(ready: Store) -> None:
    first, other = _small(1), _small(2)
    write_prompt(ready, other, "run-1")
    write_prompt(ready, first, "run-1")
    before = _counts(ready)
    assert write_prompt(ready, first, "run-1").replaced
    assert _counts(ready) == before
    changed = replace(first, circuits=first.circuits[:1], requests=("other",), **_firings(first, [0, 1]))
    write_prompt(ready, changed, "run-1")
    assert graph_in(ready, first.id) == graph_of(changed)
    assert graph_in(ready, other.id) == graph_of(other)


def test_deleting_leaves_the_rest(ready: Store) -> None:
    first, other = _small(1), _small(2)
    write_prompt(ready, first, "run-1")
    before = _counts(ready)
    write_prompt(ready, other, "run-1")
    assert delete_prompt(ready, other.id)
    assert not delete_prompt(ready, other.id)
    after = _counts(ready)
    assert after.pop("Feature") >= before.pop("Feature")
    assert after.pop("IN") >= before.pop("IN")
    assert after == before
    assert graph_in(ready, first.id) == graph_of(first)


def _appended(arrays: Any, **changed: float) -> Any:
    """The same arrays with their last row once more, changed."""
    return replace(arrays, **{name: np.append(a, changed.get(name, a[-1])) for name, a in vars(arrays).items()})


def _firings(record: PromptRecord, features: list[int]) -> dict[str, Any]:
    """The firings of these features alone, and no spans."""
    f, none = record.firings, np.zeros(0, dtype=np.int64)
    places = [np.arange(f.start[i], f.start[i + 1]) for i in features]
    here = np.concatenate(places)
    start = np.cumsum([0, *map(len, places)])
    firings = Firings(f.dictionaries, f.dictionary[features], f.index[features], start, f.position[here], f.value[here])
    return {"firings": firings, "spans": Spans(none, none, none, (), np.zeros(0))}


def _twice() -> Spans:
    """The span of feature 0 on the tokens 1 and 2, twice."""
    zero, one, two = (np.full(2, i) for i in range(3))
    return Spans(zero, one, two, (" a b",) * 2, np.ones(2))


def _edge_to(record: PromptRecord, weight: float) -> PromptRecord:
    edges = DirectEdges(*(np.append(a, x) for a, x in zip(vars(record.direct).values(), (0, 1, weight), strict=True)))
    return replace(record, direct=edges)


@pytest.mark.parametrize(
    "broken",
    [
        lambda record: replace(record, nodes=(*record.nodes, record.nodes[0])),
        lambda record: replace(record, nodes=(*record.nodes, record.nodes[0]._replace(id="x", position=99))),
        lambda record: replace(record, circuits=(*record.circuits, record.circuits[0])),
        lambda record: replace(record, **_firings(record, [0, 0])),
        lambda record: _edge_to(_edge_to(record, 1.0), 2.0),
        lambda record: replace(record, replacement_model="nobody's"),
        lambda record: replace(record, firings=replace(record.firings, dictionaries=("nobody's",) * 4)),
        lambda record: _edge_to(record, float("nan")),
        lambda record: replace(record, scores=_appended(record.scores, score=0.0)),
        lambda record: replace(record, qk=_appended(record.qk, score=0.0)),
        lambda record: replace(record, qk=_appended(record.qk, head=7, lift=float("inf"))),
        lambda record: replace(record, circuits=(replace(record.circuits[0], completeness=float("inf")),)),
        lambda record: replace(record, firings=replace(record.firings, value=record.firings.value * float("nan"))),
        lambda record: replace(record, spans=_twice()),
    ],
    ids=[
        "node twice",
        "no such token",
        "circuit twice",
        "firing twice",
        "edge twice",
        "model",
        "dictionary",
        "nan edge",
        "score twice",
        "QK edge twice",
        "infinite lift",
        "infinite share",
        "nan firing",
        "span twice",
    ],
)
def test_a_broken_prompt_changes_nothing(ready: Store, broken) -> None:  # type: ignore[no-untyped-def]
    record = _small(1)
    write_prompt(ready, record, "run-1")
    before = _counts(ready)
    for version in (broken(record), broken(_small(3))):
        with pytest.raises(AtlasError):
            write_prompt(ready, version, "run-1")
    assert _counts(ready) == before
    assert graph_in(ready, record.id) == graph_of(record)


def test_a_run_that_is_not_there(ready: Store) -> None:
    with pytest.raises(AtlasError):
        write_prompt(ready, _small(1), "run-2")
    assert asked_before(ready, [_small(1).id]) == {}


def test_hostile_text_is_only_text(ready: Store) -> None:
    record = _small(1)
    nodes = tuple(
        n._replace(id=n.id + HOSTILE, name=HOSTILE, token=n.token and HOSTILE, versus=n.versus and HOSTILE)
        for n in record.nodes
    )
    hostile = replace(
        record,
        id=record.id + HOSTILE,
        text=HOSTILE,
        token_texts=(HOSTILE,) * len(record.token_texts),
        requests=(HOSTILE, ""),
        nodes=nodes,
        circuits=tuple(replace(c, id=c.id + HOSTILE, rule=HOSTILE) for c in record.circuits),
        task=HOSTILE,
        source=HOSTILE,
        fields={HOSTILE: [HOSTILE, None, {"": 1.5}]},
    )
    write_prompt(ready, hostile, "run-1")
    assert graph_in(ready, hostile.id) == graph_of(hostile)
    assert asked_before(ready, [hostile.id]) == {hostile.id: Asked(hostile.task, hostile.requests)}
    assert delete_prompt(ready, hostile.id)
    assert _counts(ready).keys() & {"Prompt", "Token", "CircuitNode", "Circuit"} == set()


def test_requests_of_complete_prompts_only(ready: Store) -> None:
    first, second = _small(1), _small(2)
    write_prompt(ready, first, "run-1")
    write_prompt(ready, second, "run-1")
    query = "MATCH (p:Prompt {id: $id}) SET p.complete = false"
    ready.write(lambda transaction: transaction.run(query, id=second.id).consume())
    assert asked_before(ready, [second.id, "unknown", first.id]) == {first.id: Asked(first.task, first.requests)}
    assert asked_before(ready, []) == {}


def test_registering_again_changes_nothing(ready: Store) -> None:
    before = _counts(ready)
    register(ready, synthetic_model(), synthetic_run())
    assert _counts(ready) == before
    register(ready, synthetic_model(), synthetic_run("run-2"))
    assert _counts(ready) == before | {"Run": 2}
    dictionary = ready.read("MATCH (d:Dictionary {id: 'toy/1/attn'}) RETURN d")["d"][0]
    given = {k: v for k, v in vars(synthetic_model().dictionaries[2]).items() if v is not None}
    assert dictionary == given


def test_other_weights_under_the_same_name_are_refused(ready: Store) -> None:
    model = synthetic_model()
    retrained = replace(model.dictionaries[0], sha256="f" * 64)
    for other in (
        replace(model, id="other", dictionaries=(retrained,)),
        replace(model, id="other", model=replace(model.model, revision="other")),
    ):
        with pytest.raises(AtlasError, match="other weights"):
            register(ready, other, synthetic_run("run-2"))
    assert _counts(ready)["Run"] == 1


def test_a_run_is_finished(ready: Store) -> None:
    finish_run(ready, "run-1", "complete")
    run = ready.read("MATCH (r:Run) RETURN r")["r"][0]
    assert run["status"] == "complete"
    assert run["finished_at"] > run["started_at"]


def test_what_is_written_verifies(ready: Store) -> None:
    for seed in range(2):
        write_prompt(ready, _small(seed), "run-1")
        write_multitoken(ready, [synthetic_multitoken(_small(seed))])
    checks = verify(ready)
    assert all(check.checked > 0 and check.violations == 0 for check in checks), checks
