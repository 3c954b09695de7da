"""A store with the prompts of the test's own module."""

import pytest

from atlas.records import PromptRecord
from atlas.store import Store
from atlas.writer import register, write_prompt
from tests.synthetic import synthetic_model, synthetic_run


@pytest.fixture
def filled(store: Store, prompts: list[PromptRecord]) -> Store:
    """Each engine in turn, with `prompts`."""
    register(store, synthetic_model(), synthetic_run())
    for prompt in prompts:
        write_prompt(store, prompt, "run-1")
    return store
