"""The test of a multi-token circuit in the real model: without its first token's activations, what goes? (METHOD 8)

With the interventions of METHOD 6, the features that the later roots' circuits have at the span's first token
are set to their means in the real model (to zero where no means were measured), and the later roots read:

    lost = 1 - sum_r v'_r / sum_r v_r

Beside it the mean of N_RANDOM runs in which as many other features are ablated, site by site drawn from those
that fire at that token and are not in the circuits.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ingest.attribution import RULES, attribute
from ingest.faithfulness import Intervention, ablation, as_features, root_values
from ingest.replacement import ReplacementModel
from ingest.roots import Root, from_the_top, root_table
from ingest.setup import Setup

N_RANDOM = 5

Sites = list[list[int]]  # features, by the number of their dictionary in Setup.dictionaries


@dataclass(frozen=True)
class FirstToken:
    """What of the later roots' values goes with `n` features, and with as many others; `kind` is mean or zero."""

    kind: str
    n: int
    lost: float
    lost_random: float


def ablate_first_token(
    setup: Setup, replacement: ReplacementModel, roots: Sequence[Root], rule: str, threshold: float
) -> FirstToken:
    """Ablate at the first root's token what the later roots' circuits under `rule` have there."""
    start, later, tokens = roots[0].position, roots[1:], replacement.trace.tokens.tolist()
    chosen, others = _at_token(setup, replacement, start, later, rule, threshold)
    rng = random.Random(f"{tokens} {roots}")
    sets = [[], chosen, *(_draw(chosen, others, rng) for _ in range(N_RANDOM))]
    rows = [as_features(setup, [(site, start, i) for site, some in enumerate(each) for i in some]) for each in sets]
    kind = "zero" if any(dictionary.mean is None for dictionary in setup.dictionaries) else "mean"
    interventions = [Intervention(root, features, outside=False) for features in rows for root in later]
    values = root_values(setup, tokens, interventions, ablation(setup, kind)).view(len(sets), len(later)).sum(1)
    lost = (1 - values / values[0]).tolist()
    return FirstToken(kind, sum(map(len, chosen)), lost[1], sum(lost[2:]) / N_RANDOM)


def _at_token(
    setup: Setup, replacement: ReplacementModel, position: int, roots: Sequence[Root], rule: str, threshold: float
) -> tuple[Sites, Sites]:
    """The features at a token that are in a root's circuit, and the others that fire there."""
    table = root_table(from_the_top(roots), replacement)
    found = attribute(replacement, table, RULES[rule](threshold))
    chosen: Sites = []
    others: Sites = []
    for dictionary in setup.dictionaries:
        at = (dictionary.record.layer, dictionary.record.site)
        site, kept = replacement.site(*at), found.site(*at).kept.any(0)
        chosen.append(site.index[(site.position == position) & kept].tolist())
        others.append(site.index[(site.position == position) & ~kept].tolist())
    return chosen, others


def _draw(chosen: Sites, others: Sites, rng: random.Random) -> Sites:
    return [rng.sample(rest, min(len(some), len(rest))) for some, rest in zip(chosen, others, strict=True)]
