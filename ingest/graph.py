"""The edges of a prompt: DIRECT and OV between its circuits' nodes, QK between those that its scores need.

DIRECT and OV edges run between all nodes of all circuits (METHOD 3). A score is taken apart (METHOD 5)
where a head brings an attention feature of a circuit at least `look_share` of its pre-activation from
one key. The pairs that explain it are mostly in no circuit; those nodes are stored for the QK edges
alone, and all that reaches them is their `unstored`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn import functional

from atlas.records import AttentionScores, DirectEdges, OVEdges, QKEdges
from ingest.edges import (
    AttentionTargets,
    Sources,
    Targets,
    depth_of,
    direct_edges,
    incoming_direct,
    incoming_ov,
    ov_edges,
)
from ingest.nodes import Group, Nodes
from ingest.open_paths import open_edges
from ingest.qk import ScoreNodes, ScoreParts, score_records
from ingest.replacement import ReplacementModel, centre

LOOK_SHARE = 0.05


def attention_targets(groups: Sequence[Group], replacement: ReplacementModel) -> list[AttentionTargets]:
    """The attention features of a prompt's circuits, whose `groups` are the first to be numbered."""
    first = np.cumsum([0, *(len(group.place) for group in groups)])
    return [
        _attention(group, torch.arange(first[i], first[i + 1], device=group.place.device), replacement)
        for i, group in enumerate(groups)
        if group.site == "attn" and group.of_features and len(group.place)
    ]


def linear_edges(
    nodes: Nodes, attention: Sequence[AttentionTargets]
) -> tuple[DirectEdges, OVEdges, Float[np.ndarray, " node"]]:
    """DIRECT and OV edges, and per feature and logit the part of its pre-activation that no stored edge carries."""
    targets = _reading(nodes)
    sources = _sources(nodes)
    if nodes.replacement.open_below(nodes.replacement.n_layers):
        direct, ov = open_edges(sources, targets, attention, nodes.replacement)
    else:
        direct = direct_edges(sources, targets)
        ov = _concatenate([ov_edges(sources, at, nodes.replacement) for at in attention])
    unstored = np.zeros(len(nodes))
    for i in range(len(nodes.circuit), len(nodes.groups)):
        unstored[nodes.numbers(i).numpy(force=True)] = _reaching(nodes, nodes.groups[i]).numpy(force=True)
    unstored[targets.node.numpy(force=True)] = incoming_direct(targets, _streams(nodes)).numpy(force=True)
    for at in attention:
        unstored[at.node.numpy(force=True)] = at.incoming.sum((1, 2)).numpy(force=True)
    unstored -= np.bincount(direct.target, direct.weight, len(nodes))
    unstored -= np.bincount(ov.target, ov.weight, len(nodes))
    return direct, ov, unstored


def looks(
    attention: Sequence[AttentionTargets], look_share: float, replacement: ReplacementModel
) -> Int[torch.Tensor, "score 4"]:
    """(layer, head, query, key) of every score that is taken apart, each once."""
    found = [replacement.trace.tokens.new_zeros(0, 4)]
    for targets in attention:
        share = targets.incoming / targets.value[:, None, None]
        target, head, key = (share.abs() >= look_share).nonzero(as_tuple=True)
        at = torch.stack([torch.full_like(head, targets.layer), head, targets.position[target], key], 1)
        found.append(at.unique(dim=0))
    return torch.cat(found)


def only_for_scores(groups: Sequence[Group], at: ScoreNodes, parts: ScoreParts) -> list[Group]:
    """The nodes that stored pairs need and that are in no circuit."""
    known = {group.key: group.place for group in groups}
    needed, group_of = parts.nodes, at.group[parts.nodes]
    found: list[Group] = []
    for i in group_of.unique().tolist():
        nodes, (kind, layer, site) = needed[group_of == i], at.groups[i]
        if (kind, layer, site) in known:
            nodes = nodes[~torch.isin(at.place[nodes], known[kind, layer, site])]
        found.append(Group(kind, layer, site, at.position[nodes], at.place[nodes]))
    return found


def qk_edges(nodes: Nodes, at: ScoreNodes, parts: ScoreParts) -> tuple[AttentionScores, QKEdges]:
    """The scores, and their stored pairs between the prompt's nodes."""
    groups = {key: i for i, key in enumerate(at.groups)}
    stride = int(at.place.max()) + 1
    mine = [(groups[g.key] * stride + g.place, nodes.numbers(i)) for i, g in enumerate(nodes.groups) if g.key in groups]
    place, order = torch.cat([place for place, _ in mine]).sort()
    numbers = functional.pad(torch.cat([number for _, number in mine])[order], (0, 1), value=-1)
    return score_records(parts, numbers[torch.searchsorted(place, at.group * stride + at.place)])


def _reaching(nodes: Nodes, group: Group) -> Float[torch.Tensor, " n"]:
    """What reaches the nodes of a group, by their own value: nothing, or a pre-activation less its constant."""
    if not group.of_features:
        return nodes.replacement.trace.embed.new_zeros(len(group.place))
    index, value = nodes.features(group)
    return value - nodes.replacement.constants(group.layer, group.site, index, group.position)


def _sources(nodes: Nodes) -> Sources:
    groups = nodes.circuit
    return Sources(
        node=nodes.arange(0, nodes.n_circuit),
        depth=torch.cat([torch.full_like(g.position, depth_of(g.layer, g.site)) for g in groups]),
        position=torch.cat([g.position for g in groups]),
        write=torch.cat([nodes.write(g) for g in groups]),
    )


def _mlp(nodes: Nodes) -> list[tuple[int, Group]]:
    return [(i, group) for i, group in enumerate(nodes.circuit) if group.site == "mlp" and group.of_features]


def _reading(nodes: Nodes) -> Targets:
    """MLP features and logits: what reads the residual stream at its own position."""
    trace, mlp, logits = nodes.replacement.trace, _mlp(nodes), nodes.logit_table
    found = [nodes.features(g) for _, g in mlp]
    reads = [
        centre(nodes.site(g).dictionary.encoder(index)) / trace.sigma_mid[g.layer][g.position, None]
        for (_, g), (index, _) in zip(mlp, found, strict=True)
    ]
    top = torch.full_like(logits.position, depth_of(nodes.replacement.n_layers, "attn"))
    return Targets(
        node=torch.cat([*(nodes.numbers(i) for i, _ in mlp), nodes.logit_numbers]),
        depth=torch.cat([*(torch.full_like(g.position, depth_of(g.layer, "mlp")) for _, g in mlp), top]),
        position=torch.cat([*(g.position for _, g in mlp), logits.position]),
        read=torch.cat([*reads, logits.read]),
        value=torch.cat([*(value for _, value in found), logits.value]),
    )


def _streams(nodes: Nodes) -> Float[torch.Tensor, "target d_model"]:
    """The residual stream where each reading target reads it."""
    trace = nodes.replacement.trace
    mid = [trace.resid_mid[g.layer, g.position] for _, g in _mlp(nodes)]
    return torch.cat([*mid, trace.resid_final[nodes.logit_table.position]])


def _attention(group: Group, numbers: Int[torch.Tensor, " n"], replacement: ReplacementModel) -> AttentionTargets:
    site = replacement.site(group.layer, "attn")
    z_read = replacement.z_read(group.layer, site.index[group.place], group.position)
    incoming = incoming_ov(group.layer, group.position, z_read, replacement)
    return AttentionTargets(group.layer, numbers, group.position, z_read, site.value[group.place], incoming)


def _concatenate(parts: Sequence[OVEdges]) -> OVEdges:
    empty_int, empty_float = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float64)
    return OVEdges(
        source=np.concatenate([empty_int, *(p.source for p in parts)]),
        target=np.concatenate([empty_int, *(p.target for p in parts)]),
        layer=np.concatenate([empty_int, *(p.layer for p in parts)]),
        head=np.concatenate([empty_int, *(p.head for p in parts)]),
        weight=np.concatenate([empty_float, *(p.weight for p in parts)]),
        pattern=np.concatenate([empty_float, *(p.pattern for p in parts)]),
    )
