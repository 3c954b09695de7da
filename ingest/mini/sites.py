"""Reads and replaces the activations that the dictionaries of `mini` stand for.

Per layer l there are two sites: `attn`, which reads and writes hook_z (heads concatenated), and
`mlp`, which reads ln2.hook_normalized and writes hook_mlp_out. All values are those of
TransformerLens' processed weights (fold_ln, center_writing_weights, fold_value_biases), taken from
the unprocessed `GPT2LMHeadModel` by three identities:

    hook_z              = input of attn.c_proj - (b_V + ln_1.bias W_V)    the value bias is folded into b_O
    ln2.hook_normalized = (x - mean x) / sigma                            ln_2 without its weight and bias
    hook_mlp_out        = mlp output - its mean over d_model              the writing weights are centred

so that the forward pass may run in whatever precision the caller's autocast asks for. Replacing a
value leaves position 0 (BOS) as the model has it: no dictionary is trained or measured there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch.nn.functional import layer_norm
from transformers import GPT2LMHeadModel

from atlas.errors import AtlasError

Values = Float[torch.Tensor, "batch pos d"]
Replacement = Callable[[Values, Values], Values]


@dataclass(frozen=True)
class Site:
    """One place of the model that a dictionary replaces."""

    layer: int
    kind: Literal["attn", "mlp"]

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"

    @property
    def hook_in(self) -> str:
        return f"blocks.{self.layer}." + ("attn.hook_z" if self.kind == "attn" else "ln2.hook_normalized")

    @property
    def hook_out(self) -> str:
        return f"blocks.{self.layer}." + ("attn.hook_z" if self.kind == "attn" else "hook_mlp_out")


class SiteModel:
    """A GPT-2-architecture model whose sites can be read and replaced.

    `model` is the unprocessed Hugging Face model, `sites` its sites in the order of the forward pass.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model.eval()
        self.n_ctx: int = model.config.n_positions
        self.sites = [Site(layer, kind) for layer in range(model.config.n_layer) for kind in ("attn", "mlp")]
        self._seen: dict[Site, tuple[Values, Values]] = {}
        self._replacements: Mapping[Site, Replacement] = {}
        for site in self.sites:
            block: Any = model.transformer.h[site.layer]
            if site.kind == "attn":
                self._watch_attention(site, block)
            else:
                self._watch_mlp(site, block)

    @classmethod
    def load(cls, directory: Path) -> "SiteModel":
        """The model in `directory` in float32; raises AtlasError when it is not one of GPT-2's architecture."""
        if not (directory / "config.json").exists():
            raise AtlasError(f"{directory} holds no model (config.json is missing): train it first")
        return cls(GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32))

    @torch.no_grad()
    def record(self, tokens: Int[torch.Tensor, "batch pos"]) -> dict[Site, tuple[Values, Values]]:
        """What every site reads and writes, [batch, pos, d_in] and [batch, pos, d_out]."""
        self.model.transformer(tokens)
        return dict(self._seen)

    @torch.no_grad()
    def logits(self, tokens: Int[torch.Tensor, "batch pos"]) -> Float[torch.Tensor, "batch pos d_vocab"]:
        """The model's logits, under the replacements in force."""
        return self.model(tokens).logits

    @contextmanager
    def replaced(self, replacements: Mapping[Site, Replacement]) -> Iterator[None]:
        """Within, each given site writes `replacement(x, y)` at positions 1 and later instead of y."""
        self._replacements = replacements
        try:
            yield
        finally:
            self._replacements = {}

    def _written(self, site: Site, x: Values, y: Values) -> Values:
        self._seen[site] = (x, y)
        replacement = self._replacements.get(site)
        return y if replacement is None else torch.cat([y[:, :1], replacement(x, y)[:, 1:]], dim=1)

    def _watch_attention(self, site: Site, block: Any) -> None:
        w_v, b_v = (p.detach().chunk(3, dim=-1)[2] for p in (block.attn.c_attn.weight, block.attn.c_attn.bias))
        bias = b_v + block.ln_1.bias.detach() @ w_v

        def before_output(_module: Any, args: tuple[Values]) -> tuple[Values]:
            z = args[0] - bias
            return (self._written(site, z, z) + bias,)

        block.attn.c_proj.register_forward_pre_hook(before_output)

    def _watch_mlp(self, site: Site, block: Any) -> None:
        normalized: list[Values] = []

        def before_norm(norm: Any, args: tuple[Values]) -> None:
            normalized[:] = [layer_norm(args[0], norm.normalized_shape, eps=norm.eps)]

        def after_mlp(_module: Any, _args: Any, out: Values) -> Values:
            return self._written(site, normalized[0], out - out.mean(-1, keepdim=True))

        block.ln_2.register_forward_pre_hook(before_norm)
        block.mlp.register_forward_hook(after_mlp)
