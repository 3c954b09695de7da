"""Means of features against sums over tokens one by one, and files that cannot be used."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from atlas.errors import AtlasError
from ingest.dictionaries import MEANS, load_dictionary
from ingest.means import corpus_windows, feature_means, measure_means, write_means
from ingest.setup import set_up
from tests.ingest.models import N_CTX, TEXT, write_random


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model") / "little", "topk", "attn.hook_z", "jumprelu")


@pytest.fixture(scope="module")
def setup(directory):
    return set_up(str(directory))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(TEXT * 30)
    return folder


def test_means_are_sums_over_tokens(setup, corpus, monkeypatch):
    windows = corpus_windows(setup.model, [corpus / "a.txt"], 200)
    assert windows.shape == (200 // (N_CTX - 1), N_CTX)
    monkeypatch.setattr("ingest.means.BATCH", 3 * N_CTX)
    found = feature_means(setup.model, setup.dictionaries, windows, lambda n: None)
    total = [torch.zeros(d.record.d_sae) for d in setup.dictionaries]
    for window in windows.tolist():
        replacement = setup.replace(window)
        for d, sum_ in zip(setup.dictionaries, total, strict=True):
            site = replacement.site(d.record.layer, d.record.site)
            for t, i, a in zip(site.position.tolist(), site.index.tolist(), site.value.tolist(), strict=True):
                sum_[i] += a if t > 0 else 0
    for mean, sum_ in zip(found, total, strict=True):
        torch.testing.assert_close(mean.float(), sum_ / windows[:, 1:].numel(), rtol=1e-4, atol=1e-5)


def test_written_means_are_loaded_and_belong_to_their_weights(directory, corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    measured = measure_means(str(copy), [corpus], 200, lambda n: lambda done: None)
    assert (measured.n_tokens, measured.n_features) == (8 * (N_CTX - 1), 96 + 96)
    setup = set_up(str(copy))
    for d in setup.dictionaries:
        stored = load_file(copy / "dictionaries" / f"{d.record.layer}.{d.record.site}" / MEANS)["mean"]
        assert torch.equal(d.mean, stored)
    folder = copy / "dictionaries" / "0.attn"
    write_means(folder, replace(setup.dictionaries[0], record=setup.dictionaries[1].record), stored, {})
    assert load_dictionary(folder, setup.model).mean is None, "means of other weights are not used"
    (folder / MEANS).write_bytes(b"nothing")
    with pytest.raises(AtlasError, match="holds no feature means"):
        load_dictionary(folder, setup.model)


def test_a_corpus_that_cannot_be_read_is_said(directory, setup, tmp_path):
    with pytest.raises(AtlasError, match="There is no corpus"):
        measure_means(str(directory), [tmp_path], 200, lambda n: lambda done: None)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd" * 100)
    with pytest.raises(AtlasError, match="UTF-8"):
        corpus_windows(setup.model, [tmp_path / "bytes.txt"], 200)
    (tmp_path / "short.txt").write_text("The house")
    with pytest.raises(AtlasError, match="at least"):
        corpus_windows(setup.model, [tmp_path / "short.txt"], 200)
