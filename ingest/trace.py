"""One forward pass of the real model on one prompt, and what is frozen from it (METHOD 1)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from ingest.model import LanguageModel


@dataclass(frozen=True)
class Trace:
    """What one forward pass leaves behind; everything that attribution holds fixed is here."""

    tokens: Int[torch.Tensor, " pos"]
    embed: Float[torch.Tensor, "pos d_model"]
    pos_embed: Float[torch.Tensor, "pos d_model"]
    pattern: Float[torch.Tensor, "layer head query key"]
    sigma_pre: Float[torch.Tensor, "layer pos"]
    sigma_mid: Float[torch.Tensor, "layer pos"]
    sigma_final: Float[torch.Tensor, " pos"]
    v: Float[torch.Tensor, "layer pos head d_head"]
    z: Float[torch.Tensor, "layer pos head d_head"]
    attn_out: Float[torch.Tensor, "layer pos d_model"]
    mlp_in: Float[torch.Tensor, "layer pos d_model"]
    mlp_out: Float[torch.Tensor, "layer pos d_model"]
    resid_pre: Float[torch.Tensor, "layer pos d_model"]
    resid_mid: Float[torch.Tensor, "layer pos d_model"]
    resid_final: Float[torch.Tensor, "pos d_model"]
    logits: Float[torch.Tensor, "pos d_vocab"]


@torch.no_grad()
def trace(model: LanguageModel, tokens: list[int]) -> Trace:
    """Run `model` once on `tokens` and keep its patterns, layer-norm scales and the sites' inputs and outputs."""
    ids = torch.tensor([tokens])
    per_layer = ("attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale", "attn.hook_v", "attn.hook_z", "hook_attn_out",
                 "ln2.hook_normalized", "hook_mlp_out", "hook_resid_pre", "hook_resid_mid")  # fmt: skip
    layers = range(model.record.n_layers)
    last = f"blocks.{layers[-1]}.hook_resid_post"
    wanted = {f"blocks.{layer}.{hook}" for layer in layers for hook in per_layer}
    wanted |= {"hook_embed", "hook_pos_embed", "ln_final.hook_scale", last}
    logits, cache = model.bridge.run_with_cache(ids, names_filter=lambda name: name in wanted)

    def stacked(hook: str) -> torch.Tensor:
        return torch.stack([cache[f"blocks.{layer}.{hook}"][0] for layer in layers])

    return Trace(
        tokens=ids[0],
        embed=cache["hook_embed"][0],
        pos_embed=cache["hook_pos_embed"].expand_as(cache["hook_embed"])[0],
        pattern=stacked("attn.hook_pattern"),
        sigma_pre=stacked("ln1.hook_scale").squeeze(-1),
        sigma_mid=stacked("ln2.hook_scale").squeeze(-1),
        sigma_final=cache["ln_final.hook_scale"][0].squeeze(-1),
        v=stacked("attn.hook_v"),
        z=stacked("attn.hook_z"),
        attn_out=stacked("hook_attn_out"),
        mlp_in=stacked("ln2.hook_normalized"),
        mlp_out=stacked("hook_mlp_out"),
        resid_pre=stacked("hook_resid_pre"),
        resid_mid=stacked("hook_resid_mid"),
        resid_final=cache[last][0],
        logits=logits[0],
    )
