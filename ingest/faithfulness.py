"""Faithfulness: does the real, unfrozen model agree with a circuit? (METHOD 6)

The model runs again, and at every dictionary's site below the root some features are ablated,

    out'[t] = out[t] + sum over ablated i of (fill_i - a_i[t]) dec_i

where a_i[t] is what feature i is in this very run, after the ablations further down, so that what the
dictionary leaves over stays as it is in this run. `fill_i` is the feature's mean over a corpus, zero, or,
to resample, what the feature is on a token of another text, one token for all features of a position. BOS
is left alone, and so are errors and biases. With v the root's value on the prompt,

    faithfulness = v' / v      with every feature but the circuit's ablated, silent ones too
    necessity    = 1 - v' / v  with the circuit's features ablated

The same two are measured for as many random features that are active on the prompt, layer by layer and site
by site (the mean of `DRAWS` draws), and for the top-N of direct attribution: equally many features with the
largest |attribution| when nothing is pruned. Only sites, positions and features that can reach the root count.

All sets of all circuits of a prompt share forward passes: roots of one layer and site are stacked into a
batch, which ends at the last root's position and stops where the roots are read.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from atlas.errors import AtlasError
from atlas.records import PromptRecord, SharesRecord
from ingest.attribution import attribute
from ingest.dictionaries import Dictionary
from ingest.edges import depth_of
from ingest.means import activations
from ingest.replacement import ReplacementModel
from ingest.roots import Root, from_the_top, root_table
from ingest.setup import Setup

KINDS = ("mean", "zero", "resample")
DRAWS = 5  # random sets a circuit
RESAMPLED = 128  # tokens that resampling draws from
BATCH = 1024  # tokens that go through the model at once
CELLS = 2**23  # activations that are held at once, tokens times d_sae

Features = Int[torch.Tensor, "_ 3"]  # rows of (site, position, index); a site is a number in Setup.dictionaries


@dataclass(frozen=True)
class Ablation:
    """What ablated features are set to: per dictionary, one row or several to choose from at every position."""

    kind: str
    fill: tuple[Float[torch.Tensor, "choice _"], ...]


@dataclass(frozen=True)
class Intervention:
    """Ablate `features`, or with `outside` all others, and read `root`; `seed` decides what is resampled."""

    root: Root
    features: Features
    outside: bool
    seed: int = 0


@dataclass(frozen=True)
class Claim:
    """A circuit as the real model can judge it: these features give this root its value."""

    id: str
    root: Root
    features: Features


def ablation(setup: Setup, kind: str, texts: Sequence[Sequence[int]] = ()) -> Ablation:
    """What `kind` (mean, zero or resample) sets features to; resampling draws from tokens of `texts`.

    Raises AtlasError for another kind, where a dictionary has no means, and where there is no text to resample from.
    """
    if kind == "mean":
        return Ablation(kind, tuple(_mean(setup, dictionary)[None] for dictionary in setup.dictionaries))
    if kind == "zero":
        return Ablation(kind, tuple(torch.zeros_like(d.b_enc)[None] for d in setup.dictionaries))
    if kind != "resample":
        raise AtlasError(f"There is no ablation {kind!r}; there are {', '.join(KINDS)}.")
    if not texts:
        raise AtlasError("Resampling needs other prompts to draw from, and there are none; ablate to the mean instead.")
    found = [
        activations(setup.model, setup.dictionaries, torch.tensor([list(tokens)], device="cpu")) for tokens in texts
    ]
    stacked = [torch.cat(parts) for parts in zip(*found, strict=True)]
    chosen = torch.randperm(len(stacked[0]), generator=torch.Generator().manual_seed(0), device="cpu")[:RESAMPLED]
    return Ablation(kind, tuple(part[chosen] for part in stacked))


def measured(setup: Setup, replacement: ReplacementModel, record: PromptRecord, by: Ablation) -> PromptRecord:
    """The record with the shares of every circuit that has none yet filled in."""
    number = {dictionary.record.id: site for site, dictionary in enumerate(setup.dictionaries)}
    claims: list[Claim] = []
    for circuit in record.circuits:
        if circuit.shares is None:
            nodes = [record.nodes[i] for i in circuit.members.tolist()]
            rows = [(number[n.dictionary], n.position, n.index) for n in nodes if n.dictionary is not None]
            claims.append(Claim(circuit.id, root_of(circuit.id), as_features(setup, rows)))
    found = dict(zip((claim.id for claim in claims), measure(setup, replacement, claims, by), strict=True))
    return replace(record, circuits=tuple(replace(c, shares=found.get(c.id, c.shares)) for c in record.circuits))


def as_features(setup: Setup, rows: Sequence[tuple[int, int, int | None]]) -> Features:
    """Rows of (site, position, index) as a table."""
    return torch.tensor(rows, dtype=torch.long, device=setup.model.device).view(-1, 3)


def root_of(circuit: str) -> Root:
    """The root that a circuit's id names: `<prompt>/<position>/<layer>/<site>/<index>/<rule>` or a logit's."""
    position, *path = circuit.split("/")[1:-1]
    if path[0] == "logit":
        token, _, versus = path[1].partition("-")
        return Root("logit", -1, int(position), int(token), int(versus) if versus else None)
    return Root(path[1], int(path[0]), int(position), int(path[2]))


def measure(setup: Setup, replacement: ReplacementModel, claims: Sequence[Claim], by: Ablation) -> list[SharesRecord]:
    """The shares of each claim about one prompt, of which `replacement` is the local replacement model.

    The features of a claim that cannot reach its root, or stand on BOS, are left out of it.
    """
    if not claims:
        return []
    roots = [_at_its_layer(setup, claim.root) for claim in claims]
    active = _active(setup, replacement)
    clean, direct = _direct(setup, replacement, roots)
    interventions: list[Intervention] = []
    for claim, root, attribution in zip(claims, roots, direct, strict=True):
        own = claim.features[_reaches(setup, claim.features, root)]
        within = _reaches(setup, active, root)
        strongest = active[(attribution.abs() * within).topk(len(own)).indices]
        seed = int.from_bytes(hashlib.sha256(claim.id.encode()).digest()[:6])
        sets = [own, strongest, *_random_sets(own, active[within], seed)]
        interventions += [Intervention(root, features, outside, seed) for features in sets for outside in (True, False)]
    values = root_values(setup, replacement.trace.tokens.tolist(), interventions, by)
    shares = (values.view(len(claims), 2 + DRAWS, 2) / clean[:, None, None]).double()
    shares[..., 1] = 1 - shares[..., 1]
    table = torch.cat([shares[:, :1], shares[:, 2:].mean(1, keepdim=True), shares[:, 1:2]], 1)
    return [SharesRecord(by.kind, *row) for row in table.flatten(1).tolist()]


@torch.no_grad()
def root_values(
    setup: Setup,
    tokens: Sequence[int],
    interventions: Sequence[Intervention],
    by: Ablation,
    pre_activations: bool = False,
) -> Float[torch.Tensor, " intervention"]:
    """The value of each intervention's root: a feature's activation, a logit, or a difference of two logits.

    With `pre_activations` it is p_r, which is what edges add up to, also where the feature falls silent.
    """
    values = setup.dictionaries[0].b_enc.new_zeros(len(interventions))
    for chosen in _batches(interventions):
        values[chosen] = _Batch(setup, tokens, [interventions[i] for i in chosen], by, pre_activations).run()
    return values


def _batches(interventions: Sequence[Intervention]) -> Iterator[list[int]]:
    """Interventions whose roots are of one layer and site, short ones together, each lot up to `BATCH` tokens."""

    def key(i: int) -> tuple[int, str, int]:
        root = interventions[i].root
        return root.layer, root.site, root.position

    lot: list[int] = []
    for i in sorted(range(len(interventions)), key=key):
        if lot and (key(i)[:2] != key(lot[0])[:2] or (len(lot) + 1) * (key(i)[2] + 1) > BATCH):
            yield lot
            lot = []
        lot.append(i)
    if lot:
        yield lot


class _Read(Exception):
    """The roots were read, and the rest of the forward pass is not needed."""


class _Batch:
    """Interventions whose roots are of one layer and site, run as one batch [variant, pos]."""

    def __init__(
        self,
        setup: Setup,
        tokens: Sequence[int],
        chosen: Sequence[Intervention],
        by: Ablation,
        pre_activations: bool,
    ) -> None:
        self.setup, self.by, self.pre_activations = setup, by, pre_activations
        self.root = chosen[0].root
        self.roots = [intervention.root for intervention in chosen]
        features = torch.cat([intervention.features for intervention in chosen])
        self.position = features.new_tensor([root.position for root in self.roots])
        self.outside = features.new_tensor([intervention.outside for intervention in chosen]).bool()
        self.tokens = features.new_tensor([list(tokens[: int(self.position.max()) + 1])] * len(chosen))
        lengths = features.new_tensor([len(intervention.features) for intervention in chosen])
        variant = self._arange(len(chosen)).repeat_interleave(lengths)
        read = features[:, 1] < self.tokens.shape[1]
        self.variant, self.features = variant[read], features[read]
        self.draws = _draws(chosen, self.tokens.shape[1], len(by.fill[0])).to(self.tokens.device)
        self.value: torch.Tensor | None = None

    def _arange(self, n: int) -> Int[torch.Tensor, " n"]:
        return torch.arange(n, device=self.position.device)

    def run(self) -> Float[torch.Tensor, " variant"]:
        """The roots' values."""
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for site, dictionary in enumerate(self.setup.dictionaries):
            if dictionary.record.d_sae and _depth(dictionary) < depth_of(self.root.layer, self.root.site):
                hooks += self._hooks(site, dictionary)
        hooks.append((self._reading_hook(), self._read))
        with contextlib.suppress(_Read):
            self.setup.model.bridge.run_with_hooks(self.tokens, fwd_hooks=hooks)
        assert self.value is not None
        return self.value

    def _hooks(self, site: int, dictionary: Dictionary) -> list[tuple[str, Callable[..., Any]]]:
        """What edits a site; a transcoder's input is remembered until its output comes."""
        hook_in, hook_out = dictionary.record.hook_in, dictionary.record.hook_out
        if hook_in == hook_out:
            return [(hook_in, lambda value, hook: self._edited(site, value, value))]
        seen: list[torch.Tensor] = []

        def remember(value: torch.Tensor, hook: object) -> None:
            seen[:] = [value]

        return [(hook_in, remember), (hook_out, lambda value, hook: self._edited(site, seen[0], value))]

    def _edited(self, site: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` with the ablated features of a site replaced; both [variant, pos, ...]."""
        x, edited = x.flatten(2).to(self.by.fill[site]), out.flatten(2).clone()
        variant, position = self._rows(site).nonzero(as_tuple=True)
        size = max(1, CELLS // self.setup.dictionaries[site].record.d_sae)
        for rows in zip(variant.split(size), position.split(size), strict=True):
            edited[rows] += self._change(site, x[rows], *rows).to(edited)
        return edited.view_as(out)

    def _rows(self, site: int) -> Bool[torch.Tensor, "variant pos"]:
        """Where something is ablated at a site that can reach the root."""
        mine = self.features[:, 0] == site
        some = self.outside[:, None].repeat(1, self.tokens.shape[1])
        some[self.variant[mine], self.features[mine, 1]] = True
        layer = self.setup.dictionaries[site].record.layer
        top = min(self.root.layer, self.setup.model.record.n_layers - 1)
        return some & _within(self._arange(some.shape[1]), self.position[:, None], layer < top)

    def _change(
        self,
        site: int,
        x: Float[torch.Tensor, "row d_in"],
        variant: Int[torch.Tensor, " row"],
        position: Int[torch.Tensor, " row"],
    ) -> Float[torch.Tensor, "row d_out"]:
        """sum over ablated i of (fill_i - a_i) dec_i."""
        dictionary, fill = self.setup.dictionaries[site], self.by.fill[site]
        a = dictionary.activations(x)
        row = torch.full_like(self.tokens, -1)
        row[variant, position] = self._arange(len(x))
        own = self.features[:, 0] == site
        of_row = row[self.variant[own], self.features[own, 1]]
        inside = torch.zeros_like(a, dtype=torch.bool)
        inside[of_row[of_row >= 0], self.features[own, 2][of_row >= 0]] = True
        ablated = inside ^ self.outside[variant, None]
        filled = fill if len(fill) == 1 else fill[self.draws[variant, position]]
        change = (torch.where(ablated, filled, a) - a) @ dictionary.W_dec
        return change * x.std(1, keepdim=True) if dictionary.layer_norm else change

    def _reading_hook(self) -> str:
        if self.root.site == "logit":
            return "ln_final.hook_normalized"
        return self._dictionary().record.hook_in

    def _dictionary(self) -> Dictionary:
        at = (self.root.layer, self.root.site)
        return next(d for d in self.setup.dictionaries if (d.record.layer, d.record.site) == at)

    def _read(self, value: torch.Tensor, hook: object) -> None:
        each = self._arange(len(value))
        x = value.flatten(2)[each, self.position].to(self.by.fill[0])
        index = self.position.new_tensor([root.index for root in self.roots])
        if self.root.site == "logit":
            self.value = self._logits(x, index)
            versus = [i for i, root in enumerate(self.roots) if root.versus is not None]
            self.value[versus] -= self._logits(x[versus], index.new_tensor([self.roots[i].versus for i in versus]))
        else:
            d = self._dictionary()
            values = d.pre_activations(x) if self.pre_activations else d.activations(x)
            self.value = values[each, index]
        raise _Read

    def _logits(self, x: Float[torch.Tensor, "n d_model"], token: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, " n"]:
        weights = self.setup.model.weights
        return (x * weights.W_U.T[token]).sum(1) + weights.b_U[token]


def _depth(dictionary: Dictionary) -> int:
    return depth_of(dictionary.record.layer, dictionary.record.site)


def _at_its_layer(setup: Setup, root: Root) -> Root:
    return replace(root, layer=setup.model.record.n_layers) if root.site == "logit" else root


def _within(
    position: Int[torch.Tensor, "*n"],
    root_position: Int[torch.Tensor, "*m"] | int,
    below: Bool[torch.Tensor, "*k"] | bool,
) -> Bool[torch.Tensor, "*r"]:
    """Which positions of a site can reach a root: with attention above the site (`below`) all up to the root's."""
    return (position > 0) & (position <= root_position) & ((position == root_position) | below)


def _reaches(setup: Setup, features: Features, root: Root) -> Bool[torch.Tensor, " n"]:
    """Which features can change the root."""
    site, position, _ = features.T
    layers = features.new_tensor([dictionary.record.layer for dictionary in setup.dictionaries])[site]
    depths = features.new_tensor([_depth(dictionary) for dictionary in setup.dictionaries])[site]
    top = min(root.layer, setup.model.record.n_layers - 1)
    return _within(position, root.position, layers < top) & (depths < depth_of(root.layer, root.site))


def _active(setup: Setup, replacement: ReplacementModel) -> Features:
    """All features that fire on the prompt, site by site."""
    rows: list[torch.Tensor] = []
    for number, dictionary in enumerate(setup.dictionaries):
        site = replacement.site(dictionary.record.layer, dictionary.record.site)
        rows.append(torch.stack([torch.full_like(site.index, number), site.position, site.index], 1))
    return torch.cat(rows)


def _direct(
    setup: Setup, replacement: ReplacementModel, roots: Sequence[Root]
) -> tuple[Float[torch.Tensor, " root"], Float[torch.Tensor, "root active"]]:
    """The roots' values on the prompt, and the attributions to them of all active features, with nothing pruned."""
    ordered = from_the_top(dict.fromkeys(roots))
    table = root_table(ordered, replacement)
    found = attribute(replacement, table, lambda attr, _: attr != 0)
    feature = torch.cat([found.site(d.record.layer, d.record.site).feature for d in setup.dictionaries], 1)
    place = [ordered.index(root) for root in roots]
    return table.value[place], feature[place]


def _random_sets(own: Features, active: Features, seed: int) -> Iterator[Features]:
    """`DRAWS` sets of active features, as many at each site as the circuit has."""
    rng = np.random.default_rng(seed)
    site = active[:, 0].numpy(force=True)
    n_sites = int(max(site.max(initial=0), own[:, 0].max() if len(own) else 0)) + 1
    wanted, first = (
        np.bincount(own[:, 0].numpy(force=True), minlength=n_sites),
        np.searchsorted(site, np.arange(n_sites)),
    )
    for _ in range(DRAWS):
        order = np.lexsort((rng.random(len(site)), site))
        chosen = order[np.arange(len(site)) - first[site] < wanted[site]]
        yield active[torch.from_numpy(chosen)]


def _draws(chosen: Sequence[Intervention], n_pos: int, n_choices: int) -> Int[torch.Tensor, "variant pos"]:
    """Which row of the fill each position of each variant takes; its own seed decides, not the batch."""
    draws = torch.zeros(len(chosen), n_pos, dtype=torch.long, device="cpu")
    if n_choices > 1:
        for row, intervention in zip(draws, chosen, strict=True):
            generator = torch.Generator().manual_seed(intervention.seed)
            row[:] = torch.randint(n_choices, (n_pos,), generator=generator, device="cpu")
    return draws


def _mean(setup: Setup, dictionary: Dictionary) -> Float[torch.Tensor, " d_sae"]:
    if not dictionary.record.d_sae:
        return dictionary.b_enc
    if dictionary.mean is None:
        raise AtlasError(
            f"Dictionary {dictionary.record.id} has no means of its features: measure them with `atlas dictionaries "
            f"means CORPUS --model {setup.model.record.id}`, or ablate to zero."
        )
    return dictionary.mean
