"""One forward pass of the real model on one prompt, and what is frozen from it (METHOD 1).

Where the model computes in less than single precision, every sum that it rounds would break the identities. Then only
what lies between its linear maps is taken from it: the embeddings, the patterns, and what the MLPs write. From these
the residual stream, all scales and all reads of it are computed again in single precision, so that the identities hold
as they do there, and what the model rounded is in the errors of its MLPs.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

from ingest.model import LanguageModel, Weights


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
    """Run `model` once on `tokens` and keep its patterns, layer-norm scales and the sites' inputs and outputs.

    In the dtype of `model.weights` and on their device, whatever the model computes in.
    """
    like = model.weights.W_V
    ids = torch.tensor([tokens], device=model.device)
    per_layer = ("attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale", "attn.hook_v", "attn.hook_z", "hook_attn_out",
                 "ln2.hook_normalized", "hook_mlp_out", "hook_resid_pre", "hook_resid_mid")  # fmt: skip
    layers = range(model.record.n_layers)
    last = f"blocks.{layers[-1]}.hook_resid_post"
    wanted = {f"blocks.{layer}.{hook}" for layer in layers for hook in per_layer}
    wanted |= {"hook_embed", "hook_pos_embed", "ln_final.hook_scale", last}
    logits, cache = model.bridge.run_with_cache(ids, names_filter=lambda name: name in wanted)

    def stacked(hook: str) -> torch.Tensor:
        return torch.stack([cache[f"blocks.{layer}.{hook}"][0] for layer in layers]).to(like)

    found = Trace(
        tokens=ids[0],
        embed=cache["hook_embed"][0].to(like),
        pos_embed=cache["hook_pos_embed"].expand_as(cache["hook_embed"])[0].to(like),
        pattern=stacked("attn.hook_pattern"),
        sigma_pre=stacked("ln1.hook_scale").squeeze(-1),
        sigma_mid=stacked("ln2.hook_scale").squeeze(-1),
        sigma_final=cache["ln_final.hook_scale"][0].squeeze(-1).to(like),
        v=stacked("attn.hook_v"),
        z=stacked("attn.hook_z"),
        attn_out=stacked("hook_attn_out"),
        mlp_in=stacked("ln2.hook_normalized"),
        mlp_out=stacked("hook_mlp_out"),
        resid_pre=stacked("hook_resid_pre"),
        resid_mid=stacked("hook_resid_mid"),
        resid_final=cache[last][0].to(like),
        logits=logits[0].to(like),
    )
    return found if logits.dtype == like.dtype else summed(found, model.weights, model.bridge.cfg.eps)


def summed(found: Trace, weights: Weights, eps: float) -> Trace:
    """The trace with everything but the embeddings, the patterns and what the MLPs write computed again from these."""
    pattern = found.pattern / found.pattern.sum(3, keepdim=True)
    resid = found.embed + found.pos_embed
    rows: list[tuple[torch.Tensor, ...]] = []
    for layer, mlp_out in enumerate(found.mlp_out):
        resid_pre, (x, sigma_pre) = resid, _normalised(resid, eps)
        v = torch.einsum("sd,hde->she", x, weights.W_V[layer]) + weights.b_V[layer]
        z = torch.einsum("hts,she->the", pattern[layer], v)
        attn_out = torch.einsum("the,hed->td", z, weights.W_O[layer]) + weights.b_O[layer]
        resid_mid = resid_pre + attn_out
        mlp_in, sigma_mid = _normalised(resid_mid, eps)
        rows.append((resid_pre, sigma_pre, v, z, attn_out, resid_mid, sigma_mid, mlp_in))
        resid = resid_mid + mlp_out
    resid_pre, sigma_pre, v, z, attn_out, resid_mid, sigma_mid, mlp_in = map(torch.stack, zip(*rows, strict=True))
    x, sigma_final = _normalised(resid, eps)
    return replace(
        found,
        pattern=pattern,
        sigma_pre=sigma_pre,
        sigma_mid=sigma_mid,
        sigma_final=sigma_final,
        v=v,
        z=z,
        attn_out=attn_out,
        mlp_in=mlp_in,
        resid_pre=resid_pre,
        resid_mid=resid_mid,
        resid_final=resid,
        logits=x @ weights.W_U + weights.b_U,
    )


def _normalised(
    resid: Float[torch.Tensor, "pos d_model"], eps: float
) -> tuple[Float[torch.Tensor, "pos d_model"], Float[torch.Tensor, " pos"]]:
    """The residual stream as a layer norm leaves it, and the norm's scale."""
    centred = resid - resid.mean(1, keepdim=True)
    sigma = (centred.pow(2).mean(1) + eps).sqrt()
    return centred / sigma[:, None], sigma
