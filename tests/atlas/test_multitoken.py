"""Multi-token circuits in the store: unions of what they join, kept when their prompt is written anew."""

from dataclasses import asdict, replace

import pytest

from atlas import AtlasError
from atlas.multitoken import frequencies, read_prompts, root_table, span_table, write_multitoken
from atlas.records import MultiTokenRecord, PromptRecord
from atlas.store import Store
from atlas.verify import verify
from atlas.writer import delete_prompt, register, write_prompt
from tests.graph import firing_rows, span_rows
from tests.synthetic import synthetic_model, synthetic_multitoken, synthetic_prompt, synthetic_run


@pytest.fixture
def written(store: Store) -> tuple[Store, PromptRecord, MultiTokenRecord]:
    register(store, synthetic_model(), synthetic_run())
    record = synthetic_prompt(1, n_tokens=4, n_active=2)
    write_prompt(store, record, "run-1")
    joined = synthetic_multitoken(record)
    write_multitoken(store, [joined])
    return store, record, joined


def _read(store: Store) -> list[tuple[dict[str, object], list[str], list[str], dict[str, float]]]:
    rows = store.read(
        "MATCH (m:MultiToken)-[j:JOINS]->(c) WITH m, j, c ORDER BY j.order WITH m, collect(c.id) AS joins "
        "MATCH (m)-[r:ROOT]->(root) WITH m, joins, r, root ORDER BY r.order "
        "WITH m, joins, collect(root.id) AS roots MATCH (m)-[e:INCLUDES]->(n) "
        "RETURN properties(m) AS m, joins, roots, collect([n.id, e.attribution]) AS members"
    )
    return [
        (row.m, row.joins, row.roots, {node: attribution for node, attribution in row.members})
        for row in rows.itertuples(index=False)
    ]


def test_it_is_the_union_of_what_it_joins(written: tuple[Store, PromptRecord, MultiTokenRecord]) -> None:
    store, record, joined = written
    ((properties, joins, roots, members),) = _read(store)
    first, second = (next(c for c in record.circuits if c.id == id) for id in joined.joins)
    expected: dict[str, float] = {}
    for circuit in (first, second):
        for member, attribution in zip(circuit.members.tolist(), circuit.attribution.tolist(), strict=True):
            node = record.nodes[member].id
            expected[node] = expected.get(node, 0.0) + attribution
    assert members == pytest.approx(expected)
    assert joins == list(joined.joins)
    assert roots == [record.nodes[circuit.root].id for circuit in (first, second)]
    inside = {i for i, node in enumerate(record.nodes) if node.id in expected}
    ends = [*zip(record.direct.source, record.direct.target, strict=True)]
    ends += [*zip(record.ov.source, record.ov.target, strict=True)]
    total = first.root_value + second.root_value
    measured = {k: v for k, v in asdict(joined).items() if v is not None and k != "joins"}
    assert properties == pytest.approx(
        measured
        | {
            "rule": "relative",
            "threshold": first.threshold,
            "n_nodes": len(expected),
            "n_shared": len(set(first.members.tolist()) & set(second.members.tolist())),
            "n_edges": sum(s in inside and t in inside for s, t in ends),
            "root_value": total,
            "completeness": sum(c.completeness * c.root_value for c in (first, second)) / total,
            "error_share": sum(c.error_share * c.root_value for c in (first, second)) / total,
            "pruned_share": sum(c.pruned_share * c.root_value for c in (first, second)) / total,
        }
    )
    assert [check.name for check in verify(store) if check.violations] == []


def test_written_again_it_is_replaced(written: tuple[Store, PromptRecord, MultiTokenRecord]) -> None:
    store, _, joined = written
    write_multitoken(store, [replace(joined, crossing_weight=0.9)])
    ((properties, joins, _, _),) = _read(store)
    assert properties["crossing_weight"] == 0.9
    assert len(joins) == 2


def test_it_stays_when_its_prompt_is_written_anew(written: tuple[Store, PromptRecord, MultiTokenRecord]) -> None:
    store, record, _ = written
    before = _read(store)
    write_prompt(store, replace(record, requests=("more",)), "run-1")
    assert _read(store) == before


def test_under_another_threshold_the_ablation_is_not_measured(
    written: tuple[Store, PromptRecord, MultiTokenRecord],
) -> None:
    store, record, _ = written
    circuits = tuple(replace(c, threshold=0.5, members=c.members[-3:], attribution=c.attribution[-3:], n_edges=0,
                             root=int(c.members[-1])) for c in record.circuits)  # fmt: skip
    write_prompt(store, replace(record, circuits=circuits), "run-1")
    ((properties, _, _, members),) = _read(store)
    assert properties["threshold"] == 0.5
    assert properties["crossing_weight"] == 0.4
    assert "lost" not in properties
    assert 3 <= len(members) <= 6


def test_it_goes_with_its_prompt_or_its_circuits(written: tuple[Store, PromptRecord, MultiTokenRecord]) -> None:
    store, record, joined = written
    write_prompt(store, replace(record, circuits=record.circuits[:-1]), "run-1")
    assert _read(store) == []
    write_prompt(store, record, "run-1")
    write_multitoken(store, [joined])
    assert delete_prompt(store, record.id)
    assert store.read("MATCH (c:Circuit) RETURN count(c) AS n")["n"][0] == 0


def test_what_it_joins_must_be_there(written: tuple[Store, PromptRecord, MultiTokenRecord]) -> None:
    store, _, joined = written
    before = _read(store)
    for change in ({"joins": (*joined.joins[:1], "nothing")}, {"prompt": "nobody"}):
        broken = replace(joined, id="broken", **change)
        with pytest.raises(AtlasError, match="not in the store"):
            write_multitoken(store, [joined, broken])
    assert _read(store) == before


def test_what_finding_reads(written: tuple[Store, PromptRecord, MultiTokenRecord]) -> None:
    store, record, _ = written
    spans = span_table(store, record.replacement_model, 2)
    expected = {s[:4] for s in span_rows(record.firings, record.spans) if s.feature[4] > "0"}
    assert set(spans[["feature", "start", "end", "text"]].itertuples(index=False, name=None)) == expected
    assert len(span_table(store, record.replacement_model, 9)) == len(span_table(store, "another", 2)) == 0
    roots = root_table(store, record.replacement_model, "relative")
    mlp = [record.nodes[c.root] for c in record.circuits if record.nodes[c.root].index is not None]
    found = set(roots[["position", "layer", "site", "index"]].itertuples(index=False, name=None))
    assert found == {(n.position, n.layer, n.site, n.index) for n in mlp}
    assert frequencies(store) == pytest.approx(
        {f.feature: len(f.positions) / (len(record.token_ids) - 1) for f in firing_rows(record.firings)}
    )
    (prompt,) = read_prompts(store, ["gone", record.id])
    assert (prompt.text, prompt.token_ids, prompt.fields) == (record.text, list(record.token_ids), record.fields)
