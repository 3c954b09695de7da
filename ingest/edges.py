"""Direct edges between the nodes of a prompt's circuits (METHOD 3).

For a target v that reads the residual stream where it stands (MLP features and logits),

    DIRECT(u -> v) = a_u w_u . read_v                                       at v's position

and for an attention feature v at t, through head h from position s,

    OV_h(u -> v) = A[l,h,t,s] (a_u w_u) . P W_V[h] enc_v[h] / sigma_pre[l,s]

Every source below the target is multiplied at once; an edge is stored where it carries at least
`SHARE` of the target's pre-activation. `incoming` is what reaches a target from all upstream nodes,
stored or not, so that pre_activation = constant + stored edges + unstored can be checked.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from atlas.records import DirectEdges, OVEdges
from ingest.replacement import ReplacementModel, centre

SHARE = 0.02


@dataclass(frozen=True)
class Sources:
    """Nodes that write: `write` is a_u w_u; `depth` orders layers and sites (see `depth_of`)."""

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
    """Attention features of one layer; `z_read` is how they read z, per head."""

    layer: int
    node: Int[torch.Tensor, " target"]
    position: Int[torch.Tensor, " target"]
    z_read: Float[torch.Tensor, "target head d_head"]
    value: Float[torch.Tensor, " target"]


def depth_of(layer: int, site: str) -> int:
    """A node's place in the order of writes: embeddings -1, then attention and MLP of each layer in turn."""
    return -1 if layer < 0 else 2 * layer + (site == "mlp")


def direct_edges(sources: Sources, targets: Targets) -> DirectEdges:
    """The DIRECT edges that are strong enough to store."""
    weight = targets.read @ sources.write.T
    upstream = (sources.position == targets.position[:, None]) & (sources.depth < targets.depth[:, None])
    strong = upstream & (weight.abs() >= SHARE * targets.value.abs()[:, None])
    target, source = strong.nonzero(as_tuple=True)
    return DirectEdges(
        source=sources.node[source].numpy(),
        target=targets.node[target].numpy(),
        weight=weight[target, source].double().numpy(),
    )


def ov_edges(sources: Sources, targets: AttentionTargets, model: ReplacementModel) -> OVEdges:
    """The OV edges into the attention features of one layer that are strong enough to store, per head."""
    layer, trace = targets.layer, model.trace
    below = sources.depth < depth_of(layer, "attn")
    node, position, write = sources.node[below], sources.position[below], sources.write[below]
    read = residual_reads(targets, model)
    weight = torch.einsum("nhd,ud->nhu", read, write / trace.sigma_pre[layer][position, None])
    pattern = trace.pattern[layer][:, targets.position][:, :, position].transpose(0, 1)
    weight = weight * pattern
    reached = position <= targets.position[:, None, None]
    strong = reached & (weight.abs() >= SHARE * targets.value.abs()[:, None, None]) & (weight != 0)
    target, head, source = strong.nonzero(as_tuple=True)
    return OVEdges(
        source=node[source].numpy(),
        target=targets.node[target].numpy(),
        layer=np.full(len(target), layer, dtype=np.int64),
        head=head.numpy(),
        weight=weight[target, head, source].double().numpy(),
        pattern=pattern[target, head, source].double().numpy(),
    )


def residual_reads(targets: AttentionTargets, model: ReplacementModel) -> Float[torch.Tensor, "target head d_model"]:
    """P W_V[h] enc_v[h]: how attention features read the normalised residual stream through each head."""
    return centre(torch.einsum("hde,nhe->nhd", model.weights.W_V[targets.layer], targets.z_read))


def incoming_direct(targets: Targets, resid: Float[torch.Tensor, "target d_model"]) -> Float[torch.Tensor, " target"]:
    """All that reaches reading targets, given the residual stream where each of them reads it."""
    return (targets.read.double() * resid.double()).sum(1)


def incoming_ov(targets: AttentionTargets, model: ReplacementModel) -> Float[torch.Tensor, " target"]:
    """All that reaches attention features through all heads from all positions."""
    layer, trace = targets.layer, model.trace
    stream = (trace.resid_pre[layer] / trace.sigma_pre[layer][:, None]).double()
    moved = torch.einsum("nhd,sd->nhs", residual_reads(targets, model).double(), stream)
    return (moved * trace.pattern[layer][:, targets.position].transpose(0, 1).double()).sum((1, 2))
