"""--memory: the same records, with no more matrices open than there is room for."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from atlas.errors import AtlasError
from atlas.records import PromptRecord
from ingest.circuits import prompt_record
from ingest.cli import ingest, parse_memory
from ingest.dictionaries import load_dictionaries, places_in
from ingest.job import circuit_requests
from ingest.prompts import Prompt
from ingest.setup import Setup, set_up
from ingest.shelf import Matrices, Shelf, resident, shelf_within
from tests.ingest.models import write_random

TEXT = "The capital of Texas is"


def _record(setup: Setup) -> PromptRecord:
    requests = circuit_requests(setup, ["default"], "support", 0.05)
    replacement = setup.replace(setup.model.tokens(TEXT))
    return prompt_record(Prompt(TEXT, "test"), "p", setup.model, "r", replacement, requests)


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if is_dataclass(a):
        return all(_same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return a == b


@pytest.mark.parametrize(
    "kinds", [("topk", "attn.hook_z", "jumprelu"), ("layer_norm", "hook_attn_out", "skip", (1, 2))]
)
def test_with_room_for_one_dictionary_the_record_is_the_same(tmp_path: Path, kinds: tuple) -> None:
    setup = set_up(str(write_random(tmp_path / "little", *kinds)))
    largest = max(dictionary.matrices().size for dictionary in setup.dictionaries)
    shelf = Shelf(float(largest))
    small = load_dictionaries(places_in(tmp_path / "little" / "dictionaries"), setup.model, shelf)
    expected = _record(setup)
    assert _same(_record(replace(setup, dictionaries=small)), expected)
    assert expected.circuits
    assert sum(matrices.size for matrices in shelf._held.values()) <= largest


def test_what_was_asked_for_longest_ago_is_closed_first() -> None:
    opened: list[str] = []

    def take(name: str) -> None:
        def open() -> Matrices:
            opened.append(name)
            return Matrices(torch.zeros(2, 5), torch.zeros(5, 2))  # 80 bytes

        shelf.take(Path(name), open)

    shelf = Shelf(160.0)
    for name in "abacab":
        take(name)
    assert opened == ["a", "b", "c", "b"]
    shelf = Shelf(79.0)
    with pytest.raises(AtlasError, match=r"--memory is too small: 0.00 MB are left .* and a takes 0.00 MB"):
        take("a")


def test_half_of_what_the_model_leaves_is_for_dictionaries() -> None:
    assert [parse_memory(text) for text in ("6GB", "1.5 gb", "800MB")] == [6 * 10**9, 15 * 10**8, 8 * 10**8]
    assert shelf_within(resident() + 10**9)._limit == pytest.approx(5e8, rel=0.2)
    assert shelf_within(None)._limit == float("inf")


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("1MB", "--memory is too small: 0.00 MB are left"),
        ("6", "'6' is no size; give one such as 6GB"),
        ("-6GB", "is no size"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, size: str, sentence: str) -> None:
    directory, store = write_random(tmp_path / "little"), tmp_path / "none"
    done = CliRunner().invoke(
        ingest, ["--model", str(directory), "--text", TEXT, "--store", str(store), "--memory", size]
    )
    assert isinstance(done.exception, AtlasError), done.output
    assert sentence in str(done.exception)
    assert not store.exists(), "nothing was written"
