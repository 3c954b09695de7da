"""Spans against a plain count over dense activations."""

import numpy as np
import pytest
import torch

from ingest.firings import firings, runs, spans
from ingest.setup import set_up
from tests.graph import firing_rows, span_rows
from tests.ingest.models import write_random
from tests.ingest.test_attribution import dense


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return set_up(str(write_random(tmp_path_factory.mktemp("model") / "little", "relu", "attn.hook_z", "jumprelu")))


def by_hand(replacement, model):
    """Every span, token by token."""
    tokens = replacement.trace.tokens.tolist()
    found = set()
    for site in (*replacement.attn, *replacement.mlp):
        values = dense(site, site.value)
        for index in range(values.shape[1]):
            start = None
            for t in range(1, len(tokens) + 1):
                fires = t < len(tokens) and bool(values[t, index] != 0)
                if fires and start is None:
                    start = t
                if not fires and start is not None:
                    if t - start > 1:
                        mean = round(float(values[start:t, index].mean()), 5)
                        feature = f"{site.dictionary.record.id}/{index}"
                        found.add((feature, start, t - 1, model.text(tokens[start:t]), mean))
                    start = None
    return found


def found_spans(replacement, model):
    fires = firings(replacement)
    return span_rows(fires, spans(fires, replacement.trace.tokens.tolist(), model))


@pytest.mark.parametrize("text", ["The capital of Texas is", "The old house", "é漢 said", "T"])
def test_every_run_of_two_and_more_is_a_span(setup, text):
    replacement = setup.replace(setup.model.tokens(text))
    found = found_spans(replacement, setup.model)
    assert {(*span[:4], round(span.mean, 5)) for span in found} == by_hand(replacement, setup.model)
    assert len({span[:2] for span in found}) == len(found)
    if text.startswith("The capital"):
        last = len(replacement.trace.tokens) - 1
        assert any(span.start == 1 for span in found), "some begin with the prompt"
        assert any(span.end == last for span in found), "some end with it"


def test_firings_are_the_activations_after_bos(setup):
    replacement = setup.replace(setup.model.tokens("The capital of Texas is"))
    expected = {}
    for site in (*replacement.attn, *replacement.mlp):
        values = dense(site, site.value)
        for index in torch.nonzero((values[1:] != 0).any(0))[:, 0].tolist():
            positions = [t for t in range(1, len(values)) if values[t, index] != 0]
            at = (positions, values[positions, index].tolist())
            expected[f"{site.dictionary.record.id}/{index}"] = at
    found = firing_rows(firings(replacement))
    assert {fires.feature: fires[1:] for fires in found} == expected
    assert len(found) == len(expected)


def test_one_token_has_no_span(setup):
    tokens = setup.model.tokens("T")
    assert len(tokens) == 2
    assert found_spans(setup.replace(tokens), setup.model) == []


def test_what_fires_everywhere_is_one_long_span(setup):
    replacement = setup.replace(setup.model.tokens("The capital of Texas is"))
    last = len(replacement.trace.tokens) - 1
    everywhere = {
        f"{site.dictionary.record.id}/{index}"
        for site in (*replacement.attn, *replacement.mlp)
        for index in torch.nonzero((dense(site, site.value)[1:] != 0).all(0))[:, 0].tolist()
    }
    assert everywhere
    found = [span for span in found_spans(replacement, setup.model) if span.feature in everywhere]
    assert {(span.start, span.end) for span in found} == {(1, last)}
    assert len(found) == len(everywhere)


def test_runs():
    first, last = runs(np.array([3, 4, 5, 9, 20, 21]))
    assert (first.tolist(), last.tolist()) == ([0, 3, 4], [2, 3, 5])
    assert [part.tolist() for part in runs(np.zeros(0, dtype=np.int64))] == [[], []]
