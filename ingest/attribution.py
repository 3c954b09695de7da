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

A root at t never reaches a position after t nor a layer above its own, and until a head has looked back for it
it is at its own position alone. So g is looked at, and handed on, only where it is something: at the `Rows`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional

from ingest.replacement import ReplacementModel, Site, centre, nonzero, repeated

# PyTorch says that they are in beta state, and 2.11 also that what is told not to be checked is not.
warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")

READS = 64  # rows that look back at once
DENSE = 4  # how much faster an operation is where rows are summed at their keys first

Keep = Callable[[Float[torch.Tensor, "root n"], Float[torch.Tensor, " root"]], Bool[torch.Tensor, "root n"]]
Threshold = float | Float[torch.Tensor, " root"]  # of all roots, or of each


def paper(threshold: Threshold) -> Keep:
    """Keep attr > threshold: absolute, positive only, as published."""
    return lambda attr, root_value: attr > _of_each(threshold, attr)


def relative(threshold: Threshold) -> Keep:
    """Keep |attr| >= threshold * |p_r|, both signs."""
    return lambda attr, root_value: attr.abs() >= _least(threshold, attr, root_value)


def support(threshold: Threshold) -> Keep:
    """Keep attr >= threshold * |p_r| in the sign of p_r: what makes the root what it is, not what works against it."""
    return lambda attr, root_value: attr * root_value.sign()[:, None] >= _least(threshold, attr, root_value)


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


def _least(threshold: Threshold, attr: torch.Tensor, root_value: torch.Tensor) -> torch.Tensor:
    """threshold * |p_r| of each root, and more than nothing."""
    least = _of_each(threshold, attr) * root_value.abs()[:, None]
    return least.clamp(min=torch.finfo(least.dtype).tiny)


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
    """Places in g, of roots at positions, root by root and from the first token to the last."""

    root: Int[torch.Tensor, " row"]
    position: Int[torch.Tensor, " row"]

    @classmethod
    def of(cls, reached: Bool[torch.Tensor, "root pos"]) -> "Rows":
        """Those of a table."""
        return cls(*reached.nonzero(as_tuple=True))

    @property
    def n_begun(self) -> int:
        """How many roots come before the last one that has a row, and it."""
        return int(self.root[-1]) + 1 if len(self.root) else 0

    @property
    def at(self) -> tuple[Int[torch.Tensor, " row"], Int[torch.Tensor, " row"]]:
        """As an index into g and into tables by root and position."""
        return self.root, self.position


@torch.no_grad()
def attribute(model: ReplacementModel, roots: Roots, keep: Keep) -> Attribution:
    """Sweep all roots of a prompt from the last layer to the embeddings (METHOD 4)."""
    trace = model.trace
    g = trace.embed.new_zeros(len(roots.site), *trace.embed.shape)
    reached = g.new_zeros(g.shape[:2], dtype=torch.bool)  # where g is something
    constant = roots.constant.clone()
    pruned = torch.zeros_like(constant)
    attn: list[SiteAttribution] = []
    mlp: list[SiteAttribution] = []

    def table(rows: Rows, value: Float[torch.Tensor, " row"]) -> Float[torch.Tensor, "root pos"]:
        return g.new_zeros(reached.shape).index_put_(rows.at, value)

    def begin(layer: int) -> None:
        here = [*roots.at(layer, "mlp"), *roots.at(layer, "logit")]
        if not here:
            return
        g[here, roots.position[here]] += roots.read[here]
        reached[here, roots.position[here]] = True

    def site_attribution(
        layer: int, name: str, rows: Rows, written: torch.Tensor, bias: torch.Tensor
    ) -> tuple[Rows, torch.Tensor]:
        site = model.site(layer, name)
        feature, kept, gradients = _features(site, written, rows, keep, roots.value)
        error = _products(written, site.error, rows)
        (mlp if name == "mlp" else attn).append(SiteAttribution(feature, kept, table(rows, error), table(rows, bias)))
        constants = model.constants(layer, name, site.index[gradients.place], site.position[gradients.place])
        constant.index_add_(0, gradients.root, gradients.value * constants)
        pruned.add_((feature * ~kept).sum(1))
        return _hand_on(site, gradients, written, rows)

    begin(model.n_layers)
    for layer in reversed(range(model.n_layers)):
        rows = Rows.of(reached)
        live = g[rows.at]
        rows, read = site_attribution(layer, "mlp", rows, live, _products(live, model.mlp[layer].bias, rows))
        g[rows.at] += centre(read) / trace.sigma_mid[layer][rows.position, None]
        begin(layer)

        rows = Rows.of(reached)
        live = g[rows.at]
        written = live @ model.W_O(layer).T if model.attn[layer].on_z else live
        rows, read = site_attribution(layer, "attn", rows, written, _products(live, model.attn_bias(layer), rows))
        rows, read = _with_begun(model, layer, roots, rows, read)
        look_back(model, layer, rows, read, g)
        last = rows.root.new_full((len(g),), -1).scatter_reduce_(0, rows.root, rows.position, "amax")
        reached |= torch.arange(reached.shape[1], device=last.device) <= last[:, None]
    return Attribution(
        attn=tuple(reversed(attn)),
        mlp=tuple(reversed(mlp)),
        embedding=(g * trace.embed).sum(2),
        position=(g * trace.pos_embed).sum(2),
        constant=constant,
        pruned=pruned,
    )


def _products(
    g: Float[torch.Tensor, "row d_out"], written: Float[torch.Tensor, "pos d_out"], rows: Rows
) -> Float[torch.Tensor, " row"]:
    """The products of g with what is written at each position; or everywhere, as most bias nodes write."""
    return g @ written[0] if written.stride(0) == 0 else (g * written[rows.position]).sum(1)


def _with_begun(
    model: ReplacementModel, layer: int, roots: Roots, rows: Rows, read: Float[torch.Tensor, "row d_in"]
) -> tuple[Rows, Float[torch.Tensor, "row_and_begun d_in"]]:
    """Reads of an attention site, and after them those of the roots that sit there."""
    here = roots.at(layer, "attn")
    if not here:
        return rows, read
    encoder = model.attn[layer].dictionary.encoder(roots.index[here])
    position = torch.cat([rows.position, roots.position[here]])
    return Rows(torch.cat([rows.root, rows.root.new_tensor(here)]), position), torch.cat([read, encoder])


def look_back(
    model: ReplacementModel,
    layer: int,
    rows: Rows,
    read: Float[torch.Tensor, "row d_in"],
    g: Float[torch.Tensor, "root pos d_model"],
) -> None:
    """Carry reads of the attention site at query positions to g of resid_pre at key positions, patterns frozen.

    Few reads go through W_V one by one and then to all keys; many are summed at each key and then go through it.
    """
    trace, W_V = model.trace, model.weights.W_V[layer]
    z = model.to_z(layer, read, rows.position).unflatten(1, (W_V.shape[0], W_V.shape[2]))
    n_roots, n_pos, d_model = g.shape
    if DENSE * len(z) * len(W_V) > n_roots * (n_pos + d_model):
        every = z.new_zeros(n_roots, n_pos, *z.shape[1:]).index_put_(rows.at, z, accumulate=True)
        moved = torch.einsum("hts,rthe->rshe", trace.pattern[layer] / trace.sigma_pre[layer], every)
        g += centre(moved.flatten(2) @ W_V.mT.flatten(0, 1))
        return
    value = centre(torch.einsum("rhe,hde->rhd", z, W_V))
    parts = (x.split(READS) for x in (rows.root, rows.position, value))
    for root, position, some in zip(*parts, strict=True):
        moving = trace.pattern[layer][:, position] / trace.sigma_pre[layer]  # [head, row, key]
        g.index_add_(0, root, moving.permute(1, 2, 0) @ some)


@dataclass(frozen=True)
class Gradients:
    """Of kept features, root by root: `place` in the site's list, and what the root gains for each unit of them."""

    root: Int[torch.Tensor, " kept"]
    place: Int[torch.Tensor, " kept"]
    value: Float[torch.Tensor, " kept"]


def _features(
    site: Site, g: Float[torch.Tensor, "row d_out"], rows: Rows, keep: Keep, value: Float[torch.Tensor, " root"]
) -> tuple[Float[torch.Tensor, "root active"], Bool[torch.Tensor, "root active"], Gradients]:
    """Attributions of features, which of them are kept, and these features' gradients."""
    counts, n_active = rows.position.new_tensor(site.counts), len(site.position)
    n = counts[rows.position]
    ends = functional.pad(n.cumsum(0), (1, 0))
    # The features of a row are those of its position, one stretch of the site's list.
    stretch = (counts.cumsum(0) - counts)[rows.position] - ends[:-1]
    place = repeated(stretch, n) + torch.arange(int(ends[-1]), device=n.device)
    cell = repeated(rows.root * n_active, n) + place
    shape, empty = (len(g), site.dictionary.record.d_sae), g.new_zeros(len(place))
    index = site.index.index_select(0, place)
    at = torch.sparse_csr_tensor(ends, index, empty, shape, device=g.device, check_invariants=False)
    gradient = torch.sparse.sampled_addmm(at, g, site.dictionary.W_dec.T, beta=0.0).values()
    if site.norm is not None:
        gradient = gradient * site.norm[1][site.position[place]]
    attr = g.new_zeros(len(value), n_active)
    attr.view(-1).scatter_(0, cell, gradient)
    attr *= site.value
    kept = torch.zeros_like(attr, dtype=torch.bool)
    n_begun = rows.n_begun
    kept[:n_begun] = keep(attr[:n_begun], value[:n_begun])
    (handed,) = nonzero(kept.view(-1).index_select(0, cell))
    return attr, kept, Gradients(cell[handed] // max(n_active, 1), place[handed], gradient[handed])


def _hand_on(
    site: Site, gradients: Gradients, written: Float[torch.Tensor, "row d_out"], rows: Rows
) -> tuple[Rows, Float[torch.Tensor, "reading_row d_in"]]:
    """sum_i gradient_i enc_i at the rows where features have a gradient, or at every row if an open path hands on."""
    if site.dictionary.is_open:
        return rows, written
    n_pos = len(site.counts)
    key, size = torch.unique_consecutive(gradients.root * n_pos + site.position[gradients.place], return_counts=True)
    read = site.dictionary.encoder_sums(site.index[gradients.place], gradients.value, size.cumsum(0) - size)
    if site.dictionary.W_skip is None:
        return Rows(key // n_pos, key % n_pos), read
    skipped = written @ site.dictionary.W_skip.T
    skipped[torch.searchsorted(rows.root * n_pos + rows.position, key)] += read
    return rows, skipped
