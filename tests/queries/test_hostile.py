"""Quotes, backticks, Cypher, markup and control characters in every text field stay data, in every question."""

from dataclasses import replace

import pytest

import queries
from atlas.store import Store
from atlas.writer import register, write_prompt
from tests.synthetic import synthetic_model, synthetic_prompt, synthetic_run

HOSTILE = "'\"`}) DETACH DELETE n // $feature \\ {{x}} */\n</script><img src=x onerror=alert(1)>«é»\u2028\x1b[31m"


@pytest.fixture
def hostile(store: Store) -> Store:
    """Two prompts whose every text is hostile, and a hostile label on every feature."""
    register(store, synthetic_model(), synthetic_run())
    for seed in range(2):
        prompt = synthetic_prompt(seed, 4, 3, 0.4)
        write_prompt(
            store,
            replace(
                prompt,
                text=HOSTILE * 3,
                token_texts=("<|endoftext|>", *[HOSTILE] * 3),
                task=HOSTILE,
                source=HOSTILE,
                fields={HOSTILE: HOSTILE},
                nodes=tuple(node._replace(name=HOSTILE) for node in prompt.nodes),
                spans=replace(prompt.spans, text=(HOSTILE,) * len(prompt.spans)),
            ),
            "run-1",
        )
    store.change("MATCH (f:Feature) SET f.label = $label", label=HOSTILE)
    return store


def test_hostile_text_comes_back_as_it_went_in(hostile: Store) -> None:
    everything = "MATCH (n) OPTIONAL MATCH (n)-[r]->() RETURN count(DISTINCT n) AS nodes, count(r) AS edges"
    before = hostile.read(everything).to_dict("records")
    circuit = queries.circuits(hostile, task=HOSTILE)["circuit"][0]
    feature = queries.find_features(hostile, text=HOSTILE.upper())["feature"][0]
    pair = queries.motifs(hostile, min_prompts=1).iloc[0]
    assert queries.find_features(hostile)["label"].eq(HOSTILE).all()
    assert queries.feature(hostile, feature)["text"][0] == HOSTILE
    assert queries.prompts_of(hostile, feature)["text"][0].replace("«" + HOSTILE + "»", HOSTILE) == HOSTILE * 3
    assert queries.spans(hostile)["text"].eq(HOSTILE).all()
    assert queries.upstream(hostile, feature=pair["b"])["target_label"].eq(HOSTILE).all()
    assert queries.downstream(hostile, feature=pair["a"], hops=1)["source_label"].eq(HOSTILE).all()
    assert queries.edges_between(hostile, pair["a"], pair["b"])["source_token"].isin([HOSTILE, "<|endoftext|>"]).all()
    assert queries.circuit(hostile, circuit)["source_name"].eq(HOSTILE).all()
    assert queries.consensus(hostile, HOSTILE, min_share=0)["source_label"].eq(HOSTILE).all()
    assert queries.diff(hostile, circuit, HOSTILE)["source_label"].dropna().eq(HOSTILE).all()
    assert queries.similar_circuits(hostile, circuit)["text"].eq(HOSTILE * 3).all()
    assert queries.specificity(hostile, pair["a"], pair["b"])["task"].tolist() == [HOSTILE]
    assert queries.errors(hostile, task=HOSTILE)["task"].eq(HOSTILE).all()
    paths = queries.strongest_paths(hostile, circuit)["path"]
    assert all(path.startswith(HOSTILE) for path in paths)
    assert hostile.read(everything).to_dict("records") == before
