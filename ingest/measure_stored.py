"""Faithfulness of circuits that are stored already (METHOD 6): prompt by prompt, so that it can be stopped and resumed.

stored circuits without shares -> their prompt traced again -> shares -> one transaction a prompt.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from atlas.errors import AtlasError
from atlas.faithfulness import (
    StoredCircuit,
    circuits_without_shares,
    prompts_without_shares,
    some_prompts,
    traced_by_others,
    write_shares,
)
from atlas.store import Store
from ingest.faithfulness import KINDS, Claim, ablation, as_features, measure, root_of
from ingest.prompts import Complain
from ingest.setup import Setup

RESAMPLED_PROMPTS = 64  # prompts whose tokens are drawn from when resampling


@dataclass
class Progress:
    """How far it is: prompts in all and done, circuits measured, and those that changed meanwhile."""

    prompts: int = 0
    done: int = 0
    circuits: int = 0
    changed: int = 0


def measure_stored(
    store: Store,
    setup: Setup,
    kind: str,
    circuits: Sequence[str],
    complain: Complain,
    progress: Callable[[Progress], None],
) -> Progress:
    """Measure what has no shares by the ablation `kind` yet, of all circuits or only of `circuits`.

    Raises AtlasError where a named circuit cannot be measured, and where the dictionaries have no means.
    """
    if kind not in KINDS:
        raise AtlasError(f"There is no ablation {kind!r}; there are {', '.join(KINDS)}.")
    prompts = prompts_without_shares(store, setup.record.id, kind, circuits)
    if others := traced_by_others(store, setup.record.id):
        complain(f"{others} prompts were traced with another model or other dictionaries")
    state = Progress(prompts=len(prompts))
    if not prompts:
        return state
    texts = some_prompts(store, setup.record.id, RESAMPLED_PROMPTS) if kind == "resample" else {}
    by = ablation(setup, kind, list(texts.values()))
    for prompt, tokens in prompts.items():
        stored = circuits_without_shares(store, prompt, kind, circuits)
        shares = measure(setup, setup.replace(list(tokens)), _claims(setup, stored), by)
        written = write_shares(store, dict(zip(stored, shares, strict=True)))
        if written < len(stored):
            complain(f"{len(stored) - written} circuits of prompt {prompt} were replaced while they were measured")
        state.done += 1
        state.circuits += written
        state.changed += len(stored) - written
        progress(state)
    return state


def _claims(setup: Setup, stored: Iterable[StoredCircuit]) -> list[Claim]:
    number = {(d.record.layer, d.record.site): site for site, d in enumerate(setup.dictionaries)}
    return [
        Claim(
            c.id, root_of(c.id), as_features(setup, [(number[layer, site], t, i) for layer, site, t, i in c.features])
        )
        for c in stored
    ]
