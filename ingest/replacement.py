"""The local replacement model of one prompt (METHOD 1 and 2): active features, errors and biases.

Encoding a trace gives, for every site, the features that fire and what the dictionary leaves over.
Features of a site are kept as a padded table [pos, slot], so that the sweep's products are batched
matrix products over positions; padded slots have value 0 and `active` False.

    z[l,t]       = sum_i a_i dec_i + b_dec + err          (attention SAE; W_O maps z to the residual stream)
    mlp_out[l,t] = sum_j a_j dec_j + b_dec + err          (transcoder)

With errors kept as nodes the replacement model equals the real one on its prompt.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from ingest.dictionaries import Dictionary
from ingest.model import Weights
from ingest.trace import Trace


@dataclass(frozen=True)
class Site:
    """One site of one layer on one prompt.

    `index`, `value` (= pre-activation) and `active` describe the features that fire; `decoder` holds
    their decoder rows. `error` and `bias` are in the space the dictionary writes: z (heads
    concatenated) for an SAE on hook_z, the residual stream otherwise.
    """

    dictionary: Dictionary
    index: Int[torch.Tensor, "pos slot"]
    value: Float[torch.Tensor, "pos slot"]
    active: Bool[torch.Tensor, "pos slot"]
    decoder: Float[torch.Tensor, "pos slot d_out"]
    error: Float[torch.Tensor, "pos d_out"]
    bias: Float[torch.Tensor, " d_out"]

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

    def W_O(self, layer: int) -> Float[torch.Tensor, "z d_model"]:
        """W_O of a layer with its heads concatenated."""
        return self.weights.W_O[layer].flatten(0, 1)

    def to_residual(self, layer: int, written: Float[torch.Tensor, "*n d_out"]) -> Float[torch.Tensor, "*n d_model"]:
        """What the attention site of `layer` writes to the residual stream, from its dictionary's output space."""
        return written @ self.W_O(layer) if self.attn[layer].on_z else written

    def attn_bias(self, layer: int) -> Float[torch.Tensor, " d_model"]:
        """The write of an attention bias node: b_dec W_O + b_O, or b_dec where the SAE reads attn_out."""
        site = self.attn[layer]
        written = self.to_residual(layer, site.bias)
        return written + self.weights.b_O[layer] if site.on_z else written

    def z_read(self, layer: int, index: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n head d_head"]:
        """How attention features read z: enc_i per head (METHOD 2), through W_O for an SAE on attn_out."""
        rows = self.attn[layer].dictionary.encoder(index)
        rows = rows if self.attn[layer].on_z else rows @ self.W_O(layer).T
        return rows.unflatten(1, self.weights.W_O.shape[1:3])

    def constants(self, layer: int, site: str, index: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, " n"]:
        """The part of features' pre-activations that no node sends: encoder biases, and b_V (b_O) where unfolded."""
        if site == "mlp":
            return self.mlp[layer].dictionary.constants(index)
        read = self.z_read(layer, index)
        constant = self.attn[layer].dictionary.constants(index) + (read * self.weights.b_V[layer]).sum((1, 2))
        if self.attn[layer].on_z:
            return constant
        return constant + self.attn[layer].dictionary.encoder(index) @ self.weights.b_O[layer]


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
            mlp[layer] = _encode(dictionary, trace.mlp_in[layer], trace.mlp_out[layer])
        elif dictionary.record.hook_in.endswith("hook_z"):
            z = trace.z[layer].flatten(1)
            attn[layer] = _encode(dictionary, z, z)
        else:
            attn[layer] = _encode(dictionary, trace.attn_out[layer], trace.attn_out[layer])
    layers = range(len(mlp))
    return ReplacementModel(trace, weights, tuple(attn[i] for i in layers), tuple(mlp[i] for i in layers))


def _encode(dictionary: Dictionary, x: torch.Tensor, target: torch.Tensor) -> Site:
    p = dictionary.pre_activations(x)
    fires = dictionary.active(p)
    position, feature = fires.nonzero(as_tuple=True)
    counts = fires.sum(1)
    n_slots = int(counts.max()) if len(position) else 0
    slot = torch.arange(len(position)) - (counts.cumsum(0) - counts)[position]
    index = torch.zeros(len(x), n_slots, dtype=torch.long)
    value = torch.zeros(len(x), n_slots, dtype=x.dtype)
    index[position, slot] = feature
    value[position, slot] = p[position, feature]
    decoder = dictionary.W_dec[index]
    reconstruction = torch.bmm(value[:, None], decoder)[:, 0] + dictionary.b_dec
    active = torch.arange(n_slots) < counts[:, None]
    return Site(dictionary, index, value, active, decoder, target - reconstruction, dictionary.b_dec)
