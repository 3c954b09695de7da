"""The identities of METHOD in float32 on the model that comes with the package."""

import json

import numpy as np
import pytest
import torch

from ingest.attribution import RULES, attribute
from ingest.circuits import CircuitRequest, prompt_record
from ingest.cli import THRESHOLDS
from ingest.model import MINI
from ingest.prompts import Prompt
from ingest.roots import parse_root, resolve, root_table
from ingest.setup import set_up
from tests.ingest.test_attribution import Frozen, everything, incoming

PROMPTS = [json.loads(line)["prompt"] for line in (MINI.parent / "prompts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mini():
    return set_up("mini")


def default_requests(setup):
    root = parse_root("default", setup.model, setup.dictionaries)
    return [CircuitRequest(rule, threshold, root) for rule, threshold in THRESHOLDS.items()]


@pytest.mark.parametrize("text", PROMPTS[::8])
def test_stored_edges_constants_and_the_rest_are_the_pre_activations(mini, text):
    """I1 as it is stored, for every feature and logit of every rule's circuits."""
    replacement = mini.replace(mini.model.tokens(text))
    record = prompt_record(Prompt(text, "test"), "p", mini.model, "r", replacement, default_requests(mini))
    assert len(record.circuits) == 11 * len(RULES)
    total = incoming(record)
    for number, node in enumerate(record.nodes):
        if node.pre_activation is not None:
            found = total[number] + node.constant + node.unstored
            assert abs(found - node.pre_activation) <= 1e-4 * abs(node.pre_activation), node.id
    for circuit in record.circuits:
        assert circuit.completeness + circuit.error_share + circuit.pruned_share == pytest.approx(1, abs=1e-4)


def test_logits_may_have_a_threshold_of_their_own(mini):
    replacement = mini.replace(mini.model.tokens(PROMPTS[0]))
    root = parse_root("default", mini.model, mini.dictionaries)

    def circuits(rule, threshold, logit_threshold):
        request = CircuitRequest(rule, threshold, root, logit_threshold=logit_threshold)
        record = prompt_record(Prompt(PROMPTS[0], "test"), "p", mini.model, "r", replacement, [request])
        ids = [node.id for node in record.nodes]
        return {c.id: (c.threshold, {ids[n] for n in c.members}, c.pruned_share) for c in record.circuits}

    for rule, (coarse, fine) in {"support": (0.05, 0.01), "top_mass": (0.3, 0.6)}.items():
        both, all_coarse, all_fine = (
            circuits(rule, coarse, fine), circuits(rule, coarse, None), circuits(rule, fine, None)
        )  # fmt: skip
        logits = [id for id in both if "/logit/" in id]
        assert (len(logits), len(both)) == (3, 11)
        assert {id: both[id] for id in logits} == {id: all_fine[id] for id in logits}
        assert {id: c for id, c in both.items() if id not in logits} == {
            id: c for id, c in all_coarse.items() if id not in logits
        }
        assert all(both[id] != all_coarse[id] for id in logits)


def test_all_edges_sum_to_the_pre_activations(mini, monkeypatch):
    """I1 with nothing left out: every node of a short prompt, every edge."""
    record = everything(mini, mini.replace(mini.model.tokens("New York")), monkeypatch)
    total = incoming(record)
    checked = 0
    for number, node in enumerate(record.nodes):
        if node.pre_activation is not None:
            found = total[number] + node.constant
            assert abs(found - node.pre_activation) <= 1e-4 * abs(node.pre_activation), node.id
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("rule", RULES)
def test_flow_is_conserved(mini, rule):
    """I2, for the default roots of several prompts."""
    for text in PROMPTS[::16]:
        replacement = mini.replace(mini.model.tokens(text))
        (roots,) = resolve([parse_root("default", mini.model, mini.dictionaries)], replacement)
        table = root_table(roots, replacement)
        found = attribute(replacement, table, RULES[rule](THRESHOLDS[rule]))
        total = found.embeddings + found.biases + found.errors + found.pruned + found.constant
        assert ((total - table.value).abs() <= 1e-4 * table.value.abs()).all()


def test_replacement_with_its_errors_is_the_real_model(mini):
    for text in PROMPTS[::16]:
        replacement = mini.replace(mini.model.tokens(text))
        _, logits = Frozen(mini, replacement).run()
        torch.testing.assert_close(logits.detach(), replacement.trace.logits, rtol=0, atol=1e-4)


def test_encoding_is_saelens_own(mini):
    """The features that fire, and their values, are those of SAELens' encode on the same inputs."""
    from sae_lens import SAE

    replacement = mini.replace(mini.model.tokens(PROMPTS[0]))
    for layer in range(mini.model.record.n_layers):
        for site, name, x in (
            (replacement.attn[layer], "attn", replacement.trace.z[layer]),
            (replacement.mlp[layer], "mlp", replacement.trace.mlp_in[layer]),
        ):
            sae = SAE.load_from_disk(MINI / "dictionaries" / f"{layer}.{name}", dtype="float32")
            want = sae.encode(x).detach()
            found = torch.zeros_like(want)
            found[site.position, site.index] = site.value
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
            assert np.count_nonzero(want[1:]) > 0


def test_stretches_of_tokens_are_what_the_tokenizer_decodes(mini):
    tokens = mini.model.tokens("The naïve cat 🐈 wrote “日本” in Zürich.")
    bounds = [(a, b) for a in range(1, len(tokens)) for b in range(a, len(tokens))]
    found = mini.model.stretches(tokens, bounds)
    assert found == [mini.model.text(tokens[a : b + 1]) for a, b in bounds]
    assert any("\ufffd" in text for text in found)
    assert "日本" in "".join(found)
