"""Direct edges between the nodes of a prompt's circuits (METHOD 3).

For a target v that reads the residual stream where it stands (MLP features and logits),

    DIRECT(u -> v) = a_u w_u . read_v                                       at v's position

and for an attention feature v at t, through head h from position s,

    OV_h(u -> v) = A[l,h,t,s] (a_u w_u) . P W_V[h] enc_v[h] / sigma_pre[l,s]

Every source below the target is multiplied at once; an edge is stored where it carries at least
`SHARE` of the target's pre-activation. What reaches a target from all upstream nodes, stored or not,
is read off the residual stream itself, so that pre_activation = constant + stored edges + unstored can
be checked.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from atlas.records import DirectEdges, OVEdges
from ingest.replacement import ReplacementModel, centre, nonzero

SHARE = 0.02
BLOCK = 8  # positions whose direct edges are computed at once


@dataclass(frozen=True)
class Sources:
    """Nodes that write, from the embeddings upward: `write` is a_u w_u, `depth` ascends (see `depth_of`)."""

    node: Int[torch.Tensor, " source"]
    depth: Int[torch.Tensor, " source"]
    position: Int[torch.Tensor, " source"]
    write: Float[torch.Tensor, "source d_model"]


@dataclass(frozen=True)
class Targets:
    """Nodes that read the residual stream at their own position, through `read`."""

    node: Int[torch.Tensor, " target"]
    depth: Int[torch.Tensor, " target"]
    position: Int[torch.Tensor, " target"]
    read: Float[torch.Tensor, "target d_model"]
    value: Float[torch.Tensor, " target"]


@dataclass(frozen=True)
class AttentionTargets:
    """Attention features of one layer; `z_read` is how they read z, per head, `incoming` all that reaches them."""

    layer: int
    node: Int[torch.Tensor, " target"]
    position: Int[torch.Tensor, " target"]
    z_read: Float[torch.Tensor, "target head d_head"]
    value: Float[torch.Tensor, " target"]
    incoming: Float[torch.Tensor, "target head key"]


def depth_of(layer: int, site: str) -> int:
    """A node's place in the order of writes: embeddings -1, then attention and MLP of each layer in turn."""
    return -1 if layer < 0 else 2 * layer + (site == "mlp")


def direct_edges(sources: Sources, targets: Targets) -> DirectEdges:
    """The DIRECT edges that are strong enough to store; a few positions at a time, as edges stay at theirs."""
    none = sources.node[:0]
    parts = [(none, none, none.double())]
    source_block, target_block = sources.position // BLOCK, targets.position // BLOCK
    for block in target_block.unique():
        s, t = (source_block == block).nonzero()[:, 0], (target_block == block).nonzero()[:, 0]
        weight = targets.read[t] @ sources.write[s].T
        upstream = (sources.position[s] == targets.position[t, None]) & (sources.depth[s] < targets.depth[t, None])
        strong = upstream & (weight.abs() >= SHARE * targets.value[t].abs()[:, None])
        target, source = strong.nonzero(as_tuple=True)
        parts.append((sources.node[s[source]], targets.node[t[target]], weight[target, source].double()))
    return DirectEdges(*(torch.cat(column).numpy(force=True) for column in zip(*parts, strict=True)))


def ov_edges(sources: Sources, targets: AttentionTargets, model: ReplacementModel) -> OVEdges:
    """The OV edges into the attention features of one layer that are strong enough to store, per head."""
    layer = targets.layer
    below = int((sources.depth < depth_of(layer, "attn")).sum())
    position = sources.position[:below]
    resid = sources.write[:below] / model.trace.sigma_pre[layer][position, None]
    pattern = model.trace.pattern[layer].index_select(1, targets.position).index_select(2, position)
    weight = _through_heads(resid, targets.z_read, model.weights.W_V[layer]) * pattern
    strong = nonzero(weight.abs() >= SHARE * targets.value[:, None])
    head, target, source = strong
    return OVEdges(
        source=sources.node[source].numpy(force=True),
        target=targets.node[target].numpy(force=True),
        layer=np.full(len(head), layer, dtype=np.int64),
        head=head.numpy(force=True),
        weight=weight[strong].double().numpy(force=True),
        pattern=pattern[strong].double().numpy(force=True),
    )


def _through_heads(
    resid: Float[torch.Tensor, "source d_model"],
    z_read: Float[torch.Tensor, "target head d_head"],
    W_V: Float[torch.Tensor, "head d_model d_head"],
) -> Float[torch.Tensor, "head target source"]:
    """resid . P W_V[h] z_read[h]; the fewer of both are carried through W_V."""
    if len(z_read) < W_V.shape[2]:
        return centre(torch.einsum("nhe,hde->hnd", z_read, W_V)) @ resid.T
    return torch.einsum("nhe,uhe->hnu", z_read, head_values(resid, W_V))


def head_values(
    resid: Float[torch.Tensor, "n d_model"], W_V: Float[torch.Tensor, "head d_model d_head"]
) -> Float[torch.Tensor, "n head d_head"]:
    """P x W_V[h]: what each head takes from (scaled) residual vectors."""
    return (centre(resid) @ W_V.transpose(0, 1).flatten(1)).unflatten(1, (W_V.shape[0], W_V.shape[2]))


def incoming_direct(targets: Targets, resid: Float[torch.Tensor, "target d_model"]) -> Float[torch.Tensor, " target"]:
    """All that reaches reading targets, given the residual stream where each of them reads it; in float64."""
    return (targets.read.double() * resid.double()).sum(1)


def incoming_ov(
    layer: int,
    position: Int[torch.Tensor, " target"],
    z_read: Float[torch.Tensor, "target head d_head"],
    model: ReplacementModel,
) -> Float[torch.Tensor, "target head key"]:
    """All that reaches attention features at `position`, by head and key; in float64."""
    moved = torch.einsum("nhe,she->nhs", z_read, model.trace.v[layer] - model.weights.b_V[layer])
    return (moved * model.trace.pattern[layer].index_select(1, position).transpose(0, 1)).double()
