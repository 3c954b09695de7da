"""crossing_weight: what reaches the later roots through activations at earlier tokens of their span (METHOD 8).

For a root r at t in a span that begins at s, let C be all activations at s .. t-1. In the frozen graph p_r
is linear in what is not C: its leaves (embeddings, errors, biases) and constants. The sweep that keeps
everything but C counts what gets to r past C, so that what went through C is the difference

    crossing(r) = p_r - (leaves + constants of the sweep with C taken out)
                = sum over u in C of a_u dp_r/da_u, each path cut at its last node in C

and crossing_weight = sum_r crossing(r) / sum_r p_r over the roots after the first. No threshold has part in it.
What comes straight from embeddings, errors and biases at s .. t-1, through no activation there, is not
in it; it is `leaves`.

Two nulls. The same quantity for other features: for each later root those of its dictionary that fire on the
same token, of a frequency within a factor NEAR of its own. And for the same roots where the span's tokens are
shuffled: p_r is a linear read and exists where the feature is silent; both are shares of the unshuffled p_r.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int

from ingest.attribution import Roots, attribute
from ingest.replacement import ReplacementModel, Site, centre
from ingest.roots import Root
from ingest.setup import Setup

NEAR = 8.0
N_DRAWS = 999  # null draws where several later roots can be combined
N_SHUFFLES = 5


@dataclass(frozen=True)
class Crossing:
    """The crossing weight of a multi-token circuit beside its nulls; a null of size 0 has no mean.

    `null` [n_null] are draws of other features on the same positions, `shuffled` [n_shuffled] are the
    same roots with the span's tokens in another order.
    """

    weight: float
    leaves: float
    null: Float[np.ndarray, " n_null"]
    shuffled: Float[np.ndarray, " n_shuffled"]

    @property
    def p_value(self) -> float:
        """How often a null draw crosses as much, the observed one counted among them."""
        return float((1 + (self.null >= self.weight).sum()) / (1 + len(self.null)))


@dataclass(frozen=True)
class Flow:
    """Per feature asked for: its pre-activation, and what of it crosses and comes from earlier leaves; all [n]."""

    value: Float[np.ndarray, " n"]
    crossing: Float[np.ndarray, " n"]
    leaves: Float[np.ndarray, " n"]


def measure(
    setup: Setup, replacement: ReplacementModel, roots: Sequence[Root], frequency: Mapping[str, float]
) -> Crossing:
    """The crossing weight of `roots`, one on each token of a span in order, two or more.

    `frequency` says on which share of tokens a feature fires, by its id; one that is missing fires nowhere.
    """
    start = roots[0].position
    flows: list[Flow] = []
    for root in roots[1:]:
        index = replacement.trace.tokens.new_tensor([root.index, *_alike(replacement, root, frequency)])
        flows.append(flow(replacement, root, index, start))
    total = sum(f.value[0] for f in flows)
    return Crossing(
        weight=float(sum(f.crossing[0] for f in flows) / total),
        leaves=float(sum(f.leaves[0] for f in flows) / total),
        null=_draws(flows, seed=f"{replacement.trace.tokens.tolist()} {roots}"),
        shuffled=np.array([_crossed(setup.replace(tokens), roots) / total for tokens in _shuffles(replacement, roots)]),
    )


def flow(replacement: ReplacementModel, root: Root, index: Int[torch.Tensor, " n"], start: int) -> Flow:
    """The flow into features `index` of the root's dictionary at its position, over the tokens from `start` on."""
    stop = root.position
    reads = feature_reads(replacement, root, index)
    found = attribute(_without(replacement, start, stop), reads, lambda attr, value: attr != 0)
    past = found.embeddings + found.biases + found.errors + found.constant
    between = [found.embedding, found.position]
    between += [part for site in (*found.attn, *found.mlp) for part in (site.error, site.bias)]
    leaves = torch.stack(between)[:, :, start:stop].sum((0, 2))
    return Flow(*(x.double().numpy(force=True) for x in (reads.value, reads.value - past, leaves)))


def feature_reads(replacement: ReplacementModel, root: Root, index: Int[torch.Tensor, " n"]) -> Roots:
    """Features of the root's dictionary at its position as roots of a sweep, whether they fire there or not."""
    trace, layer, position = replacement.trace, root.layer, root.position
    dictionary = replacement.site(layer, root.site).dictionary
    encoder = dictionary.encoder(index)
    if root.site == "mlp":
        x, read = trace.mlp_in[layer, position], centre(encoder) / trace.sigma_mid[layer, position]
    else:
        on_z = replacement.attn[layer].on_z
        x = trace.z[layer, position].flatten() if on_z else trace.attn_out[layer, position]
        encoder = replacement.attn[layer].reads(encoder, torch.full_like(index, position))
        read = x.new_zeros(len(index), trace.embed.shape[1])
    return Roots(
        layer=(layer,) * len(index),
        site=(root.site,) * len(index),
        position=torch.full_like(index, position),
        index=index,
        read=read,
        value=encoder @ x + dictionary.constant[index],
        constant=replacement.constants(layer, root.site, index, torch.full_like(index, position)),
    )


def _without(replacement: ReplacementModel, start: int, stop: int) -> ReplacementModel:
    """The replacement model with no activation at the positions from `start` to before `stop`."""

    def cut(site: Site) -> Site:
        left = (site.position < start) | (site.position >= stop)
        counts = tuple(0 if start <= t < stop else n for t, n in enumerate(site.counts))
        return replace(
            site, position=site.position[left], index=site.index[left], value=site.value[left], counts=counts
        )

    return replace(
        replacement,
        attn=tuple(cut(site) for site in replacement.attn),
        mlp=tuple(cut(site) for site in replacement.mlp),
    )


def _alike(replacement: ReplacementModel, root: Root, frequency: Mapping[str, float]) -> list[int]:
    """The other features of the root's dictionary that fire where it does and about as often as it."""
    site = replacement.site(root.layer, root.site)
    dictionary = site.dictionary.record.id
    own = frequency.get(f"{dictionary}/{root.index}", 0.0)
    here = site.index[site.position == root.position].tolist()
    near = [i for i in here if own / NEAR <= frequency.get(f"{dictionary}/{i}", 0.0) <= own * NEAR]
    return [i for i in near if i != root.index]


def _draws(flows: Sequence[Flow], seed: str) -> Float[np.ndarray, " n_null"]:
    """Crossing weights of other features, one of each later position; every combination once where they are few."""
    counts = [len(f.value) - 1 for f in flows]
    n_all = int(np.prod(counts))
    rng = random.Random(seed)
    drawn = range(n_all) if n_all <= N_DRAWS else rng.sample(range(n_all), N_DRAWS)
    choice = np.stack(np.unravel_index(np.array(drawn, dtype=np.int64), counts)) + 1
    crossing, value = (
        sum(getattr(f, name)[of] for f, of in zip(flows, choice, strict=True)) for name in ("crossing", "value")
    )
    return np.asarray(crossing / value, dtype=np.float64)


def _shuffles(replacement: ReplacementModel, roots: Sequence[Root]) -> list[list[int]]:
    """The prompt with the span's tokens in another order, up to N_SHUFFLES orders; none where all are one token."""
    tokens = replacement.trace.tokens.tolist()
    start, stop = roots[0].position, roots[-1].position + 1
    span = tokens[start:stop]
    if len(span) <= 5:
        orders = sorted(set(itertools.permutations(span)) - {tuple(span)})
        orders = random.Random(str(span)).sample(orders, min(N_SHUFFLES, len(orders)))
    else:
        rng = random.Random(str(span))
        orders = sorted({tuple(rng.sample(span, len(span))) for _ in range(N_SHUFFLES)} - {tuple(span)})
    return [[*tokens[:start], *order, *tokens[stop:]] for order in orders]


def _crossed(replacement: ReplacementModel, roots: Sequence[Root]) -> float:
    """What crosses into the later roots in all."""
    start = roots[0].position
    flows = [flow(replacement, root, replacement.trace.tokens.new_tensor([root.index]), start) for root in roots[1:]]
    return float(sum(f.crossing[0] for f in flows))
