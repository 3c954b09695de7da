"""From one prompt's attributions to the records that are stored.

The nodes of a prompt are the union of its circuits' nodes, and those that explain where its heads look.
A circuit's members are its root, the features its sweep kept, and the leaves (errors, biases, embeddings)
that pass the same rule.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from atlas.records import CircuitRecord, DirectEdges, Kind, OVEdges, PromptRecord
from ingest.attribution import RULES, Attribution, Roots, attribute
from ingest.firings import firings, spans
from ingest.graph import LOOK_SHARE, attention_targets, linear_edges, looks, only_for_scores, qk_edges
from ingest.model import LanguageModel
from ingest.nodes import Group, Key, Nodes, root_path
from ingest.prompts import Prompt
from ingest.qk import score_nodes, score_parts
from ingest.replacement import ReplacementModel
from ingest.roots import Root, RootRequest, from_the_top, resolve, root_table


@dataclass(frozen=True)
class CircuitRequest:
    """One word of `--roots` under one rule: what a later run compares to know what is still to do.

    `logit_threshold` is that of the roots that are logits, where it is another than `threshold`. `look_share` says
    which attention scores are taken apart (see `ingest.graph`), alike for all of a prompt's requests; with None it is
    still to be settled, by what is stored.
    """

    rule: str
    threshold: float
    root: RootRequest
    look_share: float | None = LOOK_SHARE
    logit_threshold: float | None = None

    @property
    def stored(self) -> str:
        """As it is kept with the prompt."""
        row = {"root": self.root.spec, "rule": self.rule, "threshold": self.threshold, "look_share": self.look_share}
        return json.dumps(row if self.logit_threshold is None else row | {"logit_threshold": self.logit_threshold})

    def threshold_of(self, root: Root) -> float:
        """The threshold for a root that this request names."""
        if root.site == "logit" and self.logit_threshold is not None:
            return self.logit_threshold
        return self.threshold


@dataclass(frozen=True)
class Sweep:
    """The roots of one rule, each with its threshold, their attribution, and which leaves pass the rule."""

    rule: str
    threshold: list[float]
    roots: list[Root]
    table: Roots
    attribution: Attribution
    leaves: dict[Key, tuple[Float[torch.Tensor, "root pos"], Bool[torch.Tensor, "root pos"]]]


@torch.inference_mode()
def prompt_record(
    prompt: Prompt,
    prompt_id: str,
    model: LanguageModel,
    replacement_model: str,
    replacement: ReplacementModel,
    requests: Sequence[CircuitRequest],
) -> PromptRecord:
    """Everything that one prompt contributes; without circuits where no root is active in it."""
    sweeps = _sweeps(requests, replacement)
    logits = list(dict.fromkeys(root for sweep in sweeps for root in sweep.roots if root.site == "logit"))
    groups = _groups(sweeps, replacement)
    attention = attention_targets(groups, replacement)
    looked = looks(attention, requests[0].look_share or LOOK_SHARE, replacement)
    at = score_nodes(replacement, looked)
    parts = score_parts(replacement, at, looked)
    nodes = Nodes(prompt_id, model, replacement, groups, only_for_scores(groups, at, parts), logits)
    direct, ov, unstored = linear_edges(nodes, attention)
    scores, qk = qk_edges(nodes, at, parts)
    fires = firings(replacement)
    return PromptRecord(
        id=prompt_id,
        replacement_model=replacement_model,
        text=prompt.text,
        token_ids=tuple(replacement.trace.tokens.tolist()),
        token_texts=nodes.texts,
        requests=tuple(request.stored for request in requests),
        firings=fires,
        spans=spans(fires, replacement.trace.tokens.tolist(), model),
        nodes=nodes.records(unstored),
        direct=direct,
        ov=ov,
        scores=scores,
        qk=qk,
        circuits=tuple(circuit for sweep in sweeps for circuit in _circuits(sweep, nodes, direct, ov)),
        task=prompt.task,
        source=prompt.source,
        fields=prompt.fields,
    )


def _sweeps(requests: Sequence[CircuitRequest], replacement: ReplacementModel) -> list[Sweep]:
    """One sweep per rule; a root that two requests name belongs to the later one's threshold."""
    resolved = resolve([request.root for request in requests], replacement)
    threshold: dict[str, dict[Root, float]] = {}
    for request, roots in zip(requests, resolved, strict=True):
        threshold.setdefault(request.rule, {}).update({root: request.threshold_of(root) for root in roots})
    sweeps: list[Sweep] = []
    for rule, of in threshold.items():
        roots = from_the_top(of)
        table = root_table(roots, replacement)
        each = table.value.new_tensor([of[root] for root in roots])
        attribution = attribute(replacement, table, RULES[rule](each))
        leaves = _leaves(attribution, rule, each, table.value)
        sweeps.append(Sweep(rule, [of[root] for root in roots], roots, table, attribution, leaves))
    return sweeps


def _leaves(
    attribution: Attribution, rule: str, threshold: Float[torch.Tensor, " root"], value: Float[torch.Tensor, " root"]
) -> dict[Key, tuple[Float[torch.Tensor, "root pos"], Bool[torch.Tensor, "root pos"]]]:
    """The leaves of the sweep by kind, layer and site, and which of them pass the rule."""
    leaves: dict[Key, torch.Tensor] = {
        (Kind.EMBEDDING, -1, ""): attribution.embedding,
        (Kind.POSITION, -1, ""): attribution.position,
    }
    for layer in range(len(attribution.mlp)):
        for site, found in (("attn", attribution.attn[layer]), ("mlp", attribution.mlp[layer])):
            leaves[Kind.ERROR, layer, site] = found.error
            leaves[Kind.BIAS, layer, site] = found.bias
    attr, n = torch.stack(list(leaves.values())), len(leaves)
    passes = RULES[rule](threshold.repeat(n))(attr.flatten(0, 1), value.repeat(n)).view_as(attr)
    return {key: (attr[i], passes[i]) for i, key in enumerate(leaves)}


def _groups(sweeps: Sequence[Sweep], replacement: ReplacementModel) -> list[Group]:
    """The nodes of all circuits of a prompt but its logits, from the embeddings upward."""

    def leaves(kind: Kind, layer: int, site: str) -> Group:
        members = [sweep.leaves[kind, layer, site][1] for sweep in sweeps]
        position = torch.cat(members).any(0).nonzero()[:, 0]
        return Group(kind, layer, site, position, position)

    groups = [leaves(Kind.EMBEDDING, -1, ""), leaves(Kind.POSITION, -1, "")]
    for layer in range(replacement.n_layers):
        for kind, site in ((Kind.ATTN, "attn"), (Kind.MLP, "mlp")):
            place = _used_features(sweeps, replacement, layer, site).nonzero()[:, 0]
            groups += [
                Group(kind, layer, site, replacement.site(layer, site).position[place], place),
                leaves(Kind.ERROR, layer, site),
                leaves(Kind.BIAS, layer, site),
            ]
    return groups


def _used_features(
    sweeps: Sequence[Sweep], replacement: ReplacementModel, layer: int, site: str
) -> Bool[torch.Tensor, " active"]:
    at = replacement.site(layer, site)
    used = torch.zeros_like(at.position, dtype=torch.bool)
    for sweep in sweeps:
        used |= sweep.attribution.site(layer, site).kept.any(0)
        roots = sweep.table.at(layer, site)
        if roots:
            used[at.places(sweep.table.position[roots], sweep.table.index[roots])] = True
    return used


def _membership(sweep: Sweep, groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """(attribution, membership) of the circuits' nodes but for the roots themselves, [root, node] each."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for group in groups:
        if group.of_features:
            at = sweep.attribution.site(group.layer, group.site)
            found.append((at.feature[:, group.place], at.kept[:, group.place]))
        else:
            attr, member = sweep.leaves[group.key]
            found.append((attr[:, group.position], member[:, group.position]))
    return torch.cat([attr for attr, _ in found], 1), torch.cat([member for _, member in found], 1)


def _circuits(sweep: Sweep, nodes: Nodes, direct: DirectEdges, ov: OVEdges) -> Iterator[CircuitRecord]:
    """One circuit per root, with its members and its shares (METHOD 4)."""
    found = sweep.attribution
    shares = torch.stack([found.embeddings + found.biases + found.constant, found.errors, found.pruned])
    shares = (shares / sweep.table.value).T.tolist()
    attributions, memberships = (part.double().numpy(force=True) for part in _membership(sweep, nodes.circuit))
    numbers = [nodes.of_root(root) for root in sweep.roots]
    inside = np.zeros((len(nodes), len(numbers)), dtype=bool)
    inside[: nodes.n_circuit] = memberships.T
    inside[numbers, np.arange(len(numbers))] = True
    source, target = np.concatenate([[direct.source, direct.target], [ov.source, ov.target]], axis=1)
    n_edges = (inside[source] & inside[target]).sum(0).tolist()
    for r, (root, value) in enumerate(zip(sweep.roots, sweep.table.value.tolist(), strict=True)):
        node, members = numbers[r], memberships[r].nonzero()[0]
        completeness, error_share, pruned_share = shares[r]
        yield CircuitRecord(
            id=f"{nodes.prompt_id}/{root_path(root)}/{sweep.rule}",
            root=node,
            rule=sweep.rule,
            threshold=sweep.threshold[r],
            members=np.append(members, node),
            attribution=np.append(attributions[r, members], value),
            n_edges=n_edges[r],
            root_value=value,
            completeness=completeness,
            error_share=error_share,
            pruned_share=pruned_share,
        )
