"""Hierarchical attribution: the circuits of many roots in one sweep (METHOD 4).

The gradient g of every root at the residual stream is carried from the last layer down to the
embeddings. At each site the features' attributions are read off it,

    attr = a_j (dec_j . g[t])

the keep rule decides, and only kept features hand it on, through the read vector of METHOD 2:

    mlp:   g[t] += sum_kept (dec_j . g[t]) P enc_j / sigma_mid[t]
    attn:  g[s] += sum_h P W_V[h] (sum_t A[h,t,s] sum_kept (dec_i . g[t]) enc_i[h]) / sigma_pre[s]

so a pruned feature blocks what would have flowed through it. Errors, biases and embeddings are leaves. A linear
path that stays open (METHOD 3) hands everything on, by the same two equations: of a skip transcoder W_skip g[t]
stands beside the sum over features, and of open attention g[t] W_O[h]^T.

A root at t never reaches a position after t nor a layer above its own, so g has one row per root and
position s <= t and nothing else, and roots come sorted from the top of the model down: those begun at
a site are the first few.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional

from ingest.replacement import ReplacementModel, Site, centre

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")

Keep = Callable[[Float[torch.Tensor, "root n"], Float[torch.Tensor, " root"]], Bool[torch.Tensor, "root n"]]
Threshold = float | Float[torch.Tensor, " root"]  # of all roots, or of each


def paper(threshold: Threshold) -> Keep:
    """Keep attr > threshold: absolute, positive only, as published."""
    return lambda attr, root_value: attr > _of_each(threshold, attr)


def relative(threshold: Threshold) -> Keep:
    """Keep |attr| >= threshold * |p_r|, both signs."""
    return lambda attr, root_value: (attr.abs() >= _of_each(threshold, attr) * root_value.abs()[:, None]) & (attr != 0)


def support(threshold: Threshold) -> Keep:
    """Keep attr >= threshold * |p_r| in the sign of p_r: what makes the root what it is, not what works against it."""
    return lambda attr, root_value: (
        (attr * root_value.sign()[:, None] >= _of_each(threshold, attr) * root_value.abs()[:, None]) & (attr != 0)
    )


def top_mass(threshold: Threshold) -> Keep:
    """Keep the smallest set whose |attr| sums to the share `threshold` of the total; ties by node order."""

    def keep(attr: torch.Tensor, root_value: torch.Tensor) -> torch.Tensor:
        ordered, order = attr.abs().sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        chosen = before < _of_each(threshold, attr) * ordered.sum(1, keepdim=True)
        return torch.zeros_like(chosen).scatter_(1, order, chosen) & (attr != 0)

    return keep


def _of_each(threshold: Threshold, attr: torch.Tensor) -> torch.Tensor | float:
    """A threshold for each row of `attr`, which are those of the first roots; or the one of all."""
    return threshold[: len(attr), None] if isinstance(threshold, torch.Tensor) else threshold


RULES: dict[str, Callable[[Threshold], Keep]] = {
    "paper": paper,
    "relative": relative,
    "support": support,
    "top_mass": top_mass,
}


@dataclass(frozen=True)
class Roots:
    """What circuits are asked for, from the top of the model down: logits, then MLP before attention per layer.

    `layer` is n_layers for logits. `site` is "mlp", "attn" or "logit". `read` is P enc / sigma_mid at
    resid_mid for MLP features, P W_U / sigma_final at the last resid_post for logits, and zero for
    attention features, whose read runs over all s <= t and is made in the sweep from `index`.
    `value` is p_r; `constant` the part of it that no node sends.
    """

    layer: tuple[int, ...]
    site: tuple[str, ...]
    position: Int[torch.Tensor, " root"]
    index: Int[torch.Tensor, " root"]
    read: Float[torch.Tensor, "root d_model"]
    value: Float[torch.Tensor, " root"]
    constant: Float[torch.Tensor, " root"]

    def at(self, layer: int, site: str) -> list[int]:
        """The roots that sit at a site."""
        return [i for i, at in enumerate(zip(self.layer, self.site, strict=True)) if at == (layer, site)]


@dataclass(frozen=True)
class SiteAttribution:
    """What one site gets: its features, in the site's order, with what was kept of them, and its leaves."""

    feature: Float[torch.Tensor, "root active"]
    kept: Bool[torch.Tensor, "root active"]
    error: Float[torch.Tensor, "root pos"]
    bias: Float[torch.Tensor, "root pos"]


@dataclass(frozen=True)
class Attribution:
    """The sweep's result. Identity I2: value = leaves + pruned + constant, for every root.

    `constant` holds the root's own and the kept nodes' constants weighted by their gradients;
    `pruned` the attributions of the features that were cut (the cut flow).
    """

    attn: tuple[SiteAttribution, ...]
    mlp: tuple[SiteAttribution, ...]
    embedding: Float[torch.Tensor, "root pos"]
    position: Float[torch.Tensor, "root pos"]
    constant: Float[torch.Tensor, " root"]
    pruned: Float[torch.Tensor, " root"]

    def site(self, layer: int, name: str) -> SiteAttribution:
        """What the site `attn` or `mlp` of a layer gets."""
        return (self.attn if name == "attn" else self.mlp)[layer]

    @property
    def errors(self) -> Float[torch.Tensor, " root"]:
        """What each root owes to reconstruction errors."""
        return sum_of([site.error for site in (*self.attn, *self.mlp)])

    @property
    def biases(self) -> Float[torch.Tensor, " root"]:
        """What each root owes to bias nodes."""
        return sum_of([site.bias for site in (*self.attn, *self.mlp)])

    @property
    def embeddings(self) -> Float[torch.Tensor, " root"]:
        """What each root owes to token and position embeddings."""
        return sum_of([self.embedding, self.position])


def sum_of(parts: list[torch.Tensor]) -> Float[torch.Tensor, " root"]:
    """The sum over everything but the first dimension, over all parts."""
    return torch.stack([part.flatten(1).sum(1) for part in parts]).sum(0)


@dataclass(frozen=True)
class Rows:
    """Which root and position each row of g belongs to; the rows of root r begin at `start[r]`."""

    root: Int[torch.Tensor, " row"]
    position: Int[torch.Tensor, " row"]
    start: Int[torch.Tensor, " root_and_end"]

    def of(self, begun: int) -> "Rows":
        """The rows of the first roots."""
        end = int(self.start[begun])
        return Rows(self.root[:end], self.position[:end], self.start[: begun + 1])

    def table(self, value: Float[torch.Tensor, " row"], n_roots: int, n_pos: int) -> Float[torch.Tensor, "root pos"]:
        """Numbers of rows by root and position, zero where there is no row."""
        table = value.new_zeros(n_roots, n_pos)
        table[self.root, self.position] = value
        return table


def _rows(roots: Roots) -> Rows:
    lengths = roots.position + 1
    start = functional.pad(lengths.cumsum(0), (1, 0))
    root = torch.arange(len(lengths)).repeat_interleave(lengths)
    return Rows(root, torch.arange(len(root)) - start[root], start)


@torch.no_grad()
def attribute(model: ReplacementModel, roots: Roots, keep: Keep) -> Attribution:
    """Sweep all roots of a prompt from the last layer to the embeddings (METHOD 4)."""
    trace, every = model.trace, _rows(roots)
    g = trace.embed.new_zeros(len(every.root), trace.embed.shape[1])
    constant = roots.constant.clone()
    pruned = torch.zeros_like(constant)
    attn: list[SiteAttribution] = []
    mlp: list[SiteAttribution] = []

    def table(rows: Rows, value: torch.Tensor) -> torch.Tensor:
        return rows.table(value, len(roots.site), len(trace.embed))

    def begin(layer: int, site: str, begun: int) -> int:
        here = roots.at(layer, site)
        g[every.start[here] + roots.position[here]] += roots.read[here]
        return begun + len(here)

    def site_attribution(layer: int, name: str, rows: Rows, written: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        site, n_begun = model.site(layer, name), len(rows.start) - 1
        feature, kept, gradient = _features(site, written, rows, keep, roots.value[:n_begun])
        error = (written * site.error[rows.position]).sum(1)
        (mlp if name == "mlp" else attn).append(
            SiteAttribution(_padded(feature, roots), _padded(kept, roots), table(rows, error), table(rows, bias))
        )
        constant[:n_begun] += _constants(model, layer, name, gradient)
        pruned[:n_begun] += (feature * ~kept).sum(1)
        return _hand_on(site, gradient, written, rows)

    begun = begin(model.n_layers, "logit", 0)
    for layer in reversed(range(model.n_layers)):
        rows = every.of(begun)
        live = g[: len(rows.root)]
        read = site_attribution(layer, "mlp", rows, live, (live * model.mlp[layer].bias[rows.position]).sum(1))
        live += centre(read) / trace.sigma_mid[layer][rows.position, None]
        begun = begin(layer, "mlp", begun)

        rows = every.of(begun)
        live = g[: len(rows.root)]
        written = live @ model.W_O(layer).T if model.attn[layer].on_z else live
        read = site_attribution(layer, "attn", rows, written, (live * model.attn_bias(layer)[rows.position]).sum(1))
        here = roots.at(layer, "attn")
        begun += len(here)
        rows = every.of(begun)
        read = functional.pad(read, (0, 0, 0, len(rows.root) - len(read)))
        read[every.start[here] + roots.position[here]] = model.attn[layer].dictionary.encoder(roots.index[here])
        g[: len(rows.root)] += through_values(model, layer, rows, read)
    return Attribution(
        attn=tuple(reversed(attn)),
        mlp=tuple(reversed(mlp)),
        embedding=table(every, (g * trace.embed[every.position]).sum(1)),
        position=table(every, (g * trace.pos_embed[every.position]).sum(1)),
        constant=constant,
        pruned=pruned,
    )


def through_values(
    model: ReplacementModel, layer: int, rows: Rows, read: Float[torch.Tensor, "row d_in"]
) -> Float[torch.Tensor, "row d_model"]:
    """Carry reads of the attention site at query positions to reads of resid_pre at key positions, patterns frozen."""
    pattern, W_V = model.trace.pattern[layer], model.weights.W_V[layer]
    reading = read.any(1).nonzero()[:, 0]
    queries, query = rows.position[reading].unique(return_inverse=True)
    read_z = read.new_zeros(len(rows.start) - 1, len(queries), W_V.shape[0], W_V.shape[2])
    read_z[rows.root[reading], query] = model.to_z(layer, read[reading], rows.position[reading]).unflatten(
        1, (W_V.shape[0], W_V.shape[2])
    )
    read_v = torch.einsum("hts,rthe->rshe", pattern[:, queries], read_z)[rows.root, rows.position]
    through = read_v.flatten(1) @ W_V.mT.flatten(0, 1)
    return centre(through) / model.trace.sigma_pre[layer][rows.position, None]


def _features(
    site: Site, g: Float[torch.Tensor, "row d_out"], rows: Rows, keep: Keep, value: Float[torch.Tensor, " begun"]
) -> tuple[torch.Tensor, torch.Tensor, Float[torch.Tensor, "begun active"]]:
    """Attributions, what is kept, and the gradients of kept features, zero where pruned; all [begun, active]."""
    # A root reaches the features up to its own position: the first so many of the list.
    reached = site.position <= rows.position[rows.start[1:] - 1][:, None]
    columns = site.index.expand_as(reached)[reached]
    ends = functional.pad(torch.tensor(site.counts)[rows.position].cumsum(0), (1, 0))
    at = torch.sparse_csr_tensor(
        ends, columns, g.new_zeros(len(columns)), (len(g), len(site.dictionary.W_dec)), check_invariants=False
    )
    products = torch.sparse.sampled_addmm(at, g, site.dictionary.W_dec.T, beta=0.0).values()
    gradient = g.new_zeros(reached.shape).masked_scatter_(reached, products)
    if site.norm is not None:
        gradient *= site.norm[1][site.position]
    attr = gradient * site.value
    kept = keep(attr, value)
    return attr, kept, gradient * kept


def _hand_on(
    site: Site,
    gradient: Float[torch.Tensor, "begun active"],
    written: Float[torch.Tensor, "row d_out"],
    rows: Rows,
) -> Float[torch.Tensor, "row d_in"]:
    """sum_i gradient_i enc_i at every row, over the features that have a gradient, and what an open path hands on."""
    if site.dictionary.is_open:
        return written
    root, i = gradient.nonzero(as_tuple=True)
    bags = torch.bincount(rows.start[root] + site.position[i], minlength=len(rows.root))
    index, place = site.index[i].unique(return_inverse=True)
    read = functional.embedding_bag(
        place,
        site.dictionary.encoder(index),
        bags.cumsum(0) - bags,
        mode="sum",
        per_sample_weights=gradient[root, i],
    )
    return read if site.dictionary.W_skip is None else read.addmm_(written, site.dictionary.W_skip.T)


def _constants(
    model: ReplacementModel, layer: int, name: str, gradient: Float[torch.Tensor, "begun active"]
) -> Float[torch.Tensor, " begun"]:
    """The kept features' constants, weighted by their gradients."""
    site = model.site(layer, name)
    return gradient @ model.constants(layer, name, site.index, site.position)


def _padded(part: torch.Tensor, roots: Roots) -> torch.Tensor:
    """What the begun roots have, with zeros for the others."""
    return functional.pad(part, (0, 0, 0, len(roots.site) - len(part)))
