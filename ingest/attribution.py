"""Hierarchical attribution: the circuits of many roots in one sweep (METHOD 4).

The gradient g [root, pos, d_model] of every root at the residual stream is carried from the last
layer down to the embeddings. At each site the features' attributions are read off it,

    attr = a_j (dec_j . g[t])

the keep rule decides, and only kept features hand it on, through the read vector of METHOD 2:

    mlp:   g[t] += sum_kept (dec_j . g[t]) P enc_j / sigma_mid[t]
    attn:  g[s] += sum_h P W_V[h] (sum_t A[h,t,s] sum_kept (dec_i . g[t]) enc_i[h]) / sigma_pre[s]

so a pruned feature blocks what would have flowed through it. Errors, biases and embeddings are leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from ingest.replacement import ReplacementModel, Site, centre

Keep = Callable[[Float[torch.Tensor, "root n"], Float[torch.Tensor, " root"]], Bool[torch.Tensor, "root n"]]


def paper(threshold: float) -> Keep:
    """Keep attr > threshold: absolute, positive only, as published."""
    return lambda attr, root_value: attr > threshold


def relative(threshold: float) -> Keep:
    """Keep |attr| >= threshold * |p_r|, both signs."""
    return lambda attr, root_value: (attr.abs() >= threshold * root_value.abs()[:, None]) & (attr != 0)


def top_mass(threshold: float) -> Keep:
    """Keep the smallest set whose |attr| sums to the share `threshold` of the total; ties by node order."""

    def keep(attr: torch.Tensor, root_value: torch.Tensor) -> torch.Tensor:
        ordered, order = attr.abs().sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        chosen = before < threshold * ordered.sum(1, keepdim=True)
        return torch.zeros_like(chosen).scatter_(1, order, chosen) & (attr != 0)

    return keep


RULES: dict[str, Callable[[float], Keep]] = {"paper": paper, "relative": relative, "top_mass": top_mass}


@dataclass(frozen=True)
class Roots:
    """What circuits are asked for. Per root: where it reads the residual stream, and how.

    `layer` is n_layers for logits. `site` is "mlp", "attn" or "logit". `read` is P enc / sigma_mid at
    resid_mid for MLP features, P W_U / sigma_final at the last resid_post for logits, and zero for
    attention features, whose read runs over all s <= t and is made in the sweep from `index`.
    `value` is p_r; `constant` the part of it that no node sends.
    """

    layer: Int[torch.Tensor, " root"]
    site: tuple[str, ...]
    position: Int[torch.Tensor, " root"]
    index: Int[torch.Tensor, " root"]
    read: Float[torch.Tensor, "root d_model"]
    value: Float[torch.Tensor, " root"]
    constant: Float[torch.Tensor, " root"]

    def at(self, layer: int, site: str) -> list[int]:
        """The roots that sit at a site."""
        return [i for i, s in enumerate(self.site) if s == site and int(self.layer[i]) == layer]


@dataclass(frozen=True)
class SiteAttribution:
    """What one site gets: features with what was kept of them, and the leaves error and bias."""

    feature: Float[torch.Tensor, "root pos slot"]
    kept: Bool[torch.Tensor, "root pos slot"]
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


@torch.no_grad()
def attribute(model: ReplacementModel, roots: Roots, keep: Keep) -> Attribution:
    """Sweep all roots of a prompt from the last layer to the embeddings (METHOD 4)."""
    trace = model.trace
    n_pos, d_model = trace.embed.shape
    g = torch.zeros(len(roots.site), n_pos, d_model, dtype=trace.embed.dtype)
    constant = roots.constant.clone()
    pruned = torch.zeros_like(constant)
    attn: list[SiteAttribution] = []
    mlp: list[SiteAttribution] = []
    _inject(g, roots, roots.at(model.n_layers, "logit"))
    for layer in reversed(range(model.n_layers)):
        site = model.mlp[layer]
        found, coefficient = _features(site, g, roots, keep)
        index, position, weight = _kept(site, coefficient)
        mlp.append(SiteAttribution(*found, error=_dot(g, site.error), bias=g @ site.bias))
        constant += weight @ model.constants(layer, "mlp", index)
        pruned += (found[0] * ~found[1]).sum((1, 2))
        step = torch.zeros_like(g).index_add_(1, position, weight[:, :, None] * site.dictionary.encoder(index))
        g = g + centre(step) / trace.sigma_mid[layer][:, None]
        _inject(g, roots, roots.at(layer, "mlp"))

        site = model.attn[layer]
        written = g @ model.W_O(layer).T if site.on_z else g
        found, coefficient = _features(site, written, roots, keep)
        index, position, weight = _kept(site, coefficient)
        attn.append(SiteAttribution(*found, error=_dot(written, site.error), bias=g @ model.attn_bias(layer)))
        constant += weight @ model.constants(layer, "attn", index)
        pruned += (found[0] * ~found[1]).sum((1, 2))
        read_z = torch.zeros(len(g), n_pos, *model.weights.W_O.shape[1:3], dtype=g.dtype)
        read_z.index_add_(1, position, weight[:, :, None, None] * model.z_read(layer, index))
        for root in roots.at(layer, "attn"):
            read_z[root, roots.position[root]] += model.z_read(layer, roots.index[root, None])[0]
        if read_z.any():
            g = g + through_values(model, layer, read_z)
    return Attribution(
        attn=tuple(reversed(attn)),
        mlp=tuple(reversed(mlp)),
        embedding=_dot(g, trace.embed),
        position=_dot(g, trace.pos_embed),
        constant=constant,
        pruned=pruned,
    )


def through_values(
    model: ReplacementModel, layer: int, read_z: Float[torch.Tensor, "root pos head d_head"]
) -> Float[torch.Tensor, "root pos d_model"]:
    """Carry a read of z at query positions to reads of resid_pre at key positions, patterns frozen."""
    read_v = torch.einsum("hts,rthe->rshe", model.trace.pattern[layer], read_z)
    read = torch.einsum("rshe,hde->rsd", read_v, model.weights.W_V[layer])
    return centre(read) / model.trace.sigma_pre[layer][:, None]


def _inject(g: torch.Tensor, roots: Roots, chosen: list[int]) -> None:
    """Begin the sweep of the roots that read the residual stream here."""
    if chosen:
        g[chosen, roots.position[chosen]] += roots.read[chosen]


def _features(
    site: Site, g: Float[torch.Tensor, "root pos d_out"], roots: Roots, keep: Keep
) -> tuple[tuple[torch.Tensor, torch.Tensor], Float[torch.Tensor, "root pos slot"]]:
    """(attributions, kept) and the gradients of kept features, zero where pruned; all [root, pos, slot]."""
    gradient = torch.bmm(g.transpose(0, 1), site.decoder.mT).transpose(0, 1) * site.active
    attr = gradient * site.value
    kept = keep(attr.flatten(1), roots.value).view_as(attr) & site.active
    return (attr, kept), gradient * kept


def _kept(
    site: Site, coefficient: Float[torch.Tensor, "root pos slot"]
) -> tuple[Int[torch.Tensor, " n"], Int[torch.Tensor, " n"], Float[torch.Tensor, "root n"]]:
    """The features that any root kept: their index in the dictionary, position, and gradient per root."""
    position, slot = coefficient.any(0).nonzero(as_tuple=True)
    return site.index[position, slot], position, coefficient[:, position, slot]


def _dot(g: Float[torch.Tensor, "root pos d"], write: Float[torch.Tensor, "pos d"]) -> Float[torch.Tensor, "root pos"]:
    return torch.einsum("rtd,td->rt", g, write)
