"""The local replacement model of one prompt (METHOD 1 and 2): active features, errors and biases.

Encoding a trace gives, for every site, the features that fire and what the dictionary leaves over.
The features of a site are one list, position after position, so that nothing is computed for those
that are silent; `counts` says where each position's part ends.

    z[l,t]       = sum_i a_i dec_i + b_dec + err          (attention SAE; W_O maps z to the residual stream)
    mlp_out[l,t] = sum_j a_j dec_j + b_dec + err          (transcoder)

An SAE that normalises its input token by token is linear once its mean and scale are frozen, like a layer norm: its
reads are P enc / (std + eps), its writes dec std, and its bias b_dec std + mean.

What takes an open linear path (METHOD 3) is taken off the right before the error is: x W_skip of a skip transcoder,
and of open attention all of z but its value biases, which are its bias.

With errors kept as nodes the replacement model equals the real one on its prompt.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional

from ingest.dictionaries import NORM_EPS, Dictionary
from ingest.model import Weights
from ingest.trace import Trace


@dataclass(frozen=True)
class Site:
    """One site of one layer on one prompt.

    `position` (ascending), `index` (ascending within a position) and `value` (= pre-activation) list the
    features that fire, `counts` [pos] how many at each position. `error` and `bias` are in the space the
    dictionary writes: z (heads concatenated) for an SAE on hook_z, the residual stream otherwise. Where the dictionary
    normalises its input, `norm` is what it divides by and what it multiplies its output by at each position, else None.
    """

    dictionary: Dictionary
    position: Int[torch.Tensor, " active"]
    index: Int[torch.Tensor, " active"]
    value: Float[torch.Tensor, " active"]
    counts: tuple[int, ...]
    error: Float[torch.Tensor, "pos d_out"]
    bias: Float[torch.Tensor, "pos d_out"]
    norm: tuple[Float[torch.Tensor, " pos"], Float[torch.Tensor, " pos"]] | None = None

    def reads(
        self, encoder: Float[torch.Tensor, "n d_in"], position: Int[torch.Tensor, " n"]
    ) -> Float[torch.Tensor, "n d_in"]:
        """Reads of what the dictionary encodes as reads of its site, at some positions."""
        return encoder if self.norm is None else centre(encoder) / self.norm[0][position, None]

    @property
    def amplitude(self) -> Float[torch.Tensor, " active"]:
        """How much of its decoder row each feature writes: its value, unless the dictionary normalises its input."""
        return self.value if self.norm is None else self.value * self.norm[1][self.position]

    def find(self, position: int, index: int) -> int | None:
        """The place of a feature in the list, or None where it is silent."""
        found = ((self.position == position) & (self.index == index)).nonzero()
        return int(found) if len(found) else None

    def places(self, position: Int[torch.Tensor, " n"], index: Int[torch.Tensor, " n"]) -> Int[torch.Tensor, " n"]:
        """The places in the list of features that fire."""
        d_sae = self.dictionary.record.d_sae
        return torch.searchsorted(self.position * d_sae + self.index, position * d_sae + index)

    @property
    def on_z(self) -> bool:
        """Whether the dictionary reads and writes hook_z, so that W_O is still to be applied."""
        return self.dictionary.record.hook_in.endswith("hook_z")


@dataclass(frozen=True)
class ReplacementModel:
    """The local replacement model: what is frozen (`trace`), the weights, and both sites of every layer."""

    trace: Trace
    weights: Weights
    attn: tuple[Site, ...]
    mlp: tuple[Site, ...]

    @property
    def n_layers(self) -> int:
        return len(self.mlp)

    def site(self, layer: int, name: str) -> Site:
        """The site `attn` or `mlp` of a layer."""
        return (self.attn if name == "attn" else self.mlp)[layer]

    def open_below(self, layer: int) -> bool:
        """Whether a linear path stays open at some site under the attention of `layer` (METHOD 3)."""
        sites = (*self.attn[:layer], *self.mlp[:layer])
        return any(site.dictionary.is_open or site.dictionary.W_skip is not None for site in sites)

    def W_O(self, layer: int) -> Float[torch.Tensor, "z d_model"]:
        """W_O of a layer with its heads concatenated."""
        return self.weights.W_O[layer].flatten(0, 1)

    def to_residual(self, layer: int, written: Float[torch.Tensor, "*n d_out"]) -> Float[torch.Tensor, "*n d_model"]:
        """What the attention site of `layer` writes to the residual stream, from its dictionary's output space."""
        return written @ self.W_O(layer) if self.attn[layer].on_z else written

    def attn_bias(self, layer: int) -> Float[torch.Tensor, "pos d_model"]:
        """The write of an attention bias node: b_dec W_O + b_O, or b_dec where the SAE reads attn_out."""
        site = self.attn[layer]
        if not site.on_z:
            return site.bias
        return (self.to_residual(layer, site.bias[:1]) + self.weights.b_O[layer]).expand(len(site.bias), -1)

    def to_z(
        self, layer: int, read: Float[torch.Tensor, "n d_in"], position: Int[torch.Tensor, " n"]
    ) -> Float[torch.Tensor, "n z"]:
        """Reads of what the attention SAE of `layer` encodes as reads of z: through W_O for an SAE on attn_out."""
        site = self.attn[layer]
        return read if site.on_z else site.reads(read, position) @ self.W_O(layer).T

    def z_read(
        self, layer: int, index: Int[torch.Tensor, " n"], position: Int[torch.Tensor, " n"]
    ) -> Float[torch.Tensor, "n head d_head"]:
        """How attention features at some positions read z: enc_i per head (METHOD 2)."""
        encoder = self.attn[layer].dictionary.encoder(index)
        return self.to_z(layer, encoder, position).unflatten(1, self.weights.W_O.shape[1:3])

    def constants(
        self, layer: int, site: str, index: Int[torch.Tensor, " n"], position: Int[torch.Tensor, " n"]
    ) -> Float[torch.Tensor, " n"]:
        """The part of features' pre-activations that no node sends: encoder biases, and b_V (b_O) where unfolded."""
        dictionary = self.site(layer, site).dictionary
        if site == "mlp":
            return dictionary.constant[index]
        moved = self.weights.b_V[layer].flatten()
        if not self.attn[layer].on_z:
            moved = moved @ self.W_O(layer) + self.weights.b_O[layer]
        if not moved.any():
            return dictionary.constant[index]
        return dictionary.constant[index] + self.attn[layer].reads(dictionary.encoder(index), position) @ moved


def centre(x: Float[torch.Tensor, "*n d_model"]) -> Float[torch.Tensor, "*n d_model"]:
    """P x: layer norm's removal of the mean."""
    return x - x.mean(-1, keepdim=True)


@torch.no_grad()
def replacement_model(trace: Trace, weights: Weights, dictionaries: list[Dictionary]) -> ReplacementModel:
    """Encode every site of a trace once; `dictionaries` hold one per site, any order."""
    attn: dict[int, Site] = {}
    mlp: dict[int, Site] = {}
    for dictionary in dictionaries:
        layer = dictionary.record.layer
        if dictionary.record.site == "mlp":
            mlp[layer] = encode(dictionary, trace.mlp_in[layer], trace.mlp_out[layer])
        elif dictionary.is_open:
            attn[layer] = _open(dictionary, weights.b_V[layer].flatten(), len(trace.tokens))
        elif dictionary.record.hook_in.endswith("hook_z"):
            z = trace.z[layer].flatten(1)
            attn[layer] = encode(dictionary, z, z)
        else:
            attn[layer] = encode(dictionary, trace.attn_out[layer], trace.attn_out[layer])
    layers = range(len(mlp))
    return ReplacementModel(trace, weights, tuple(attn[i] for i in layers), tuple(mlp[i] for i in layers))


def _open(dictionary: Dictionary, b_V: Float[torch.Tensor, " z"], n_pos: int) -> Site:
    """Attention that is not replaced: no features and no error."""
    zeros = b_V.new_zeros(n_pos, len(b_V))
    none = zeros[:0, 0].long()
    return Site(dictionary, none, none, b_V[:0], (0,) * n_pos, zeros, b_V.expand_as(zeros))


def encode(dictionary: Dictionary, x: Float[torch.Tensor, "pos d_in"], target: torch.Tensor) -> Site:
    """The site on input `x`, whose true output is `target` [pos, d_out]."""
    p = dictionary.pre_activations(x)
    index, position = nonzero(dictionary.active(p).T)
    order = position.argsort(stable=True)
    position, index = position[order], index[order]
    counts = position.bincount(minlength=len(x))
    value = p[position, index]
    reconstruction = functional.embedding_bag(
        index, dictionary.W_dec, counts.cumsum(0) - counts, mode="sum", per_sample_weights=value
    )
    bias, norm = dictionary.b_dec.expand_as(target), None
    if dictionary.layer_norm:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        norm = (std[:, 0] + NORM_EPS, std[:, 0])
        reconstruction, bias = reconstruction * std, bias * std + mean
    error = target - reconstruction - bias
    if dictionary.W_skip is not None:
        error -= x @ dictionary.W_skip
    return Site(dictionary, position, index, value, tuple(counts.tolist()), error, bias, norm)


def nonzero(mask: Bool[torch.Tensor, "*n"]) -> tuple[Int[torch.Tensor, " place"], ...]:
    """The indices of what is true, in order; on a processor NumPy finds it several times as fast as torch."""
    if mask.device.type != "cpu":
        return mask.nonzero(as_tuple=True)
    place = np.unravel_index(np.flatnonzero(mask.numpy()), mask.shape)
    return tuple(torch.from_numpy(index) for index in place)


def repeated(values: Int[torch.Tensor, " n"], counts: Int[torch.Tensor, " n"]) -> Int[torch.Tensor, " total"]:
    """Each value as often as its count says; on a processor NumPy is several times as fast as torch."""
    if values.device.type != "cpu":
        return values.repeat_interleave(counts)
    return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))
