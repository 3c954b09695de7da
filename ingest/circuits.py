"""From one prompt's attributions to the records that are stored.

The nodes of a prompt are the union of its circuits' nodes, listed from the embeddings upward. A
circuit's members are its root, the features its sweep kept, and the leaves (errors, biases,
embeddings) that pass the same rule. Edges run between all nodes of the prompt (METHOD 3).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from atlas.records import CircuitRecord, DirectEdges, FiringRecord, Kind, NodeRecord, OVEdges, PromptRecord
from ingest.attribution import RULES, Attribution, Roots, attribute
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
from ingest.model import LanguageModel
from ingest.prompts import Prompt
from ingest.replacement import ReplacementModel, Site, centre
from ingest.roots import Root, RootRequest, from_the_top, resolve, root_table


@dataclass(frozen=True)
class CircuitRequest:
    """One word of `--roots` under one rule: what a later run compares to know what is still to do."""

    rule: str
    threshold: float
    root: RootRequest

    @property
    def stored(self) -> str:
        """As it is kept with the prompt."""
        return json.dumps({"root": self.root.spec, "rule": self.rule, "threshold": self.threshold})


Leaf = tuple[Kind, int, str]


@dataclass(frozen=True)
class Sweep:
    """The roots of one rule and threshold with their attribution, and which leaves pass the rule."""

    rule: str
    threshold: float
    roots: list[Root]
    table: Roots
    attribution: Attribution
    leaves: dict[Leaf, tuple[Float[torch.Tensor, "root pos"], Bool[torch.Tensor, "root pos"]]]


@dataclass(frozen=True)
class Group:
    """Nodes of one kind at one layer and site, in order.

    `active` is the place of each in its site's list of features, and meaningful for features only.
    """

    kind: Kind
    layer: int
    site: str
    position: Int[torch.Tensor, " n"]
    active: Int[torch.Tensor, " n"]


def prompt_record(
    prompt: Prompt,
    prompt_id: str,
    model: LanguageModel,
    replacement_model: str,
    replacement: ReplacementModel,
    requests: Sequence[CircuitRequest],
) -> PromptRecord:
    """Everything that one prompt contributes; without circuits where no root is active in it."""
    tokens = replacement.trace.tokens.tolist()
    texts = tuple(model.token_text(token) for token in tokens)
    sweeps = _sweeps(requests, replacement)
    groups = _groups(sweeps, replacement)
    logits = list(dict.fromkeys(root for sweep in sweeps for root in sweep.roots if root.site == "logit"))
    build = _Assembly(prompt_id, model, replacement, groups, logits, texts)
    direct, ov, unstored = build.edges()
    return PromptRecord(
        id=prompt_id,
        replacement_model=replacement_model,
        text=prompt.text,
        token_ids=tuple(tokens),
        token_texts=texts,
        requests=tuple(request.stored for request in requests),
        firings=tuple(firing for site in (*replacement.attn, *replacement.mlp) for firing in _firings(site)),
        nodes=build.nodes(unstored),
        direct=direct,
        ov=ov,
        circuits=build.circuits(sweeps, direct, ov),
        task=prompt.task,
        source=prompt.source,
        fields=prompt.fields,
    )


def _sweeps(requests: Sequence[CircuitRequest], replacement: ReplacementModel) -> list[Sweep]:
    """One sweep per rule and threshold; a root that two requests name belongs to the later one's threshold."""
    resolved = resolve([request.root for request in requests], replacement)
    threshold: dict[tuple[str, Root], float] = {}
    for request, roots in zip(requests, resolved, strict=True):
        threshold.update({(request.rule, root): request.threshold for root in roots})
    sweeps: list[Sweep] = []
    for rule, value in dict.fromkeys((rule, value) for (rule, _), value in threshold.items()):
        roots = from_the_top(root for (r, root), v in threshold.items() if (r, v) == (rule, value))
        keep, table = RULES[rule](value), root_table(roots, replacement)
        attribution = attribute(replacement, table, keep)
        leaves = {leaf: (attr, keep(attr, table.value)) for leaf, attr in _leaves(attribution).items()}
        sweeps.append(Sweep(rule, value, roots, table, attribution, leaves))
    return sweeps


def _leaves(attribution: Attribution) -> dict[Leaf, Float[torch.Tensor, "root pos"]]:
    """The leaves of the sweep by kind, layer and site."""
    leaves: dict[Leaf, torch.Tensor] = {
        (Kind.EMBEDDING, -1, ""): attribution.embedding,
        (Kind.POSITION, -1, ""): attribution.position,
    }
    for layer in range(len(attribution.mlp)):
        for site, found in (("attn", attribution.attn[layer]), ("mlp", attribution.mlp[layer])):
            leaves[Kind.ERROR, layer, site] = found.error
            leaves[Kind.BIAS, layer, site] = found.bias
    return leaves


def _groups(sweeps: Sequence[Sweep], replacement: ReplacementModel) -> list[Group]:
    """The nodes of all circuits of a prompt but its logits, from the embeddings upward."""

    def leaves(kind: Kind, layer: int, site: str) -> Group:
        members = [sweep.leaves[kind, layer, site][1] for sweep in sweeps]
        position = torch.cat(members).any(0).nonzero()[:, 0] if members else torch.zeros(0, dtype=torch.long)
        return Group(kind, layer, site, position, position)

    groups = [leaves(Kind.EMBEDDING, -1, ""), leaves(Kind.POSITION, -1, "")]
    for layer in range(replacement.n_layers):
        for kind, site in ((Kind.ATTN, "attn"), (Kind.MLP, "mlp")):
            active = _used_features(sweeps, replacement, layer, site).nonzero()[:, 0]
            position = replacement.site(layer, site).position[active]
            groups += [
                Group(kind, layer, site, position, active),
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
        for i in sweep.table.at(layer, site):
            used[at.find(sweep.roots[i].position, sweep.roots[i].index)] = True
    return used


class _Assembly:
    """Numbers the nodes of a prompt and fills in what is stored of them."""

    def __init__(
        self,
        prompt_id: str,
        model: LanguageModel,
        replacement: ReplacementModel,
        groups: list[Group],
        logits: list[Root],
        texts: tuple[str, ...],
    ) -> None:
        self.prompt_id, self.model, self.replacement = prompt_id, model, replacement
        self.groups, self.logits, self.texts = groups, logits, texts
        sizes = [len(group.position) for group in groups]
        self.first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.logit_table = root_table(logits, replacement)

    def site(self, group: Group) -> Site:
        return self.replacement.site(group.layer, group.site)

    def numbers(self, i: int) -> Int[torch.Tensor, " n"]:
        """The node numbers of group `i`."""
        return torch.arange(self.first[i], self.first[i + 1])

    def features(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """(index, value) of a group of features."""
        site = self.site(group)
        return site.index[group.active], site.value[group.active]

    # Edges

    def edges(self) -> tuple[DirectEdges, OVEdges, Float[np.ndarray, " node"]]:
        """DIRECT and OV edges, and per target the part of its pre-activation that no stored edge carries."""
        sources = self._sources()
        targets, attention = self._reading_targets(), self._attention_targets()
        direct = direct_edges(sources, targets)
        ov = _concatenate([ov_edges(sources, at, self.replacement) for at in attention])
        unstored = np.zeros(self.first[-1] + len(self.logits))
        unstored[targets.node] = incoming_direct(targets, self._streams())
        for at in attention:
            unstored[at.node] = incoming_ov(at, self.replacement).sum((1, 2))
        unstored -= np.bincount(direct.target, direct.weight, len(unstored))
        unstored -= np.bincount(ov.target, ov.weight, len(unstored))
        return direct, ov, unstored

    def _sources(self) -> Sources:
        groups = self.groups
        return Sources(
            node=torch.arange(self.first[-1]),
            depth=torch.cat([torch.full_like(g.position, depth_of(g.layer, g.site)) for g in groups]),
            position=torch.cat([g.position for g in groups]),
            write=torch.cat([self._write(g) for g in groups]),
        )

    def _write(self, group: Group) -> Float[torch.Tensor, "n d_model"]:
        """a_u w_u of a group's nodes (METHOD 2)."""
        trace = self.replacement.trace
        if group.kind is Kind.EMBEDDING:
            return trace.embed[group.position]
        if group.kind is Kind.POSITION:
            return trace.pos_embed[group.position]
        site = self.site(group)
        if group.kind is Kind.BIAS:
            bias = site.bias if group.site == "mlp" else self.replacement.attn_bias(group.layer)
            return bias.expand(len(group.position), -1)
        if group.kind is Kind.ERROR:
            written = site.error[group.position]
        else:
            written = site.dictionary.W_dec[site.index[group.active]] * site.value[group.active, None]
        return written if group.site == "mlp" else self.replacement.to_residual(group.layer, written)

    def _mlp_groups(self) -> list[tuple[int, Group]]:
        return [(i, g) for i, g in enumerate(self.groups) if g.kind is Kind.MLP]

    def _reading_targets(self) -> Targets:
        """MLP features and logits: what reads the residual stream at its own position."""
        trace, mlp = self.replacement.trace, self._mlp_groups()
        found = [self.features(g) for _, g in mlp]
        reads = [
            centre(self.site(g).dictionary.encoder(index)) / trace.sigma_mid[g.layer][g.position, None]
            for (_, g), (index, _) in zip(mlp, found, strict=True)
        ]
        n_logits = len(self.logits)
        return Targets(
            node=torch.cat([*(self.numbers(i) for i, _ in mlp), self.first[-1] + torch.arange(n_logits)]),
            depth=torch.cat(
                [
                    *(torch.full_like(g.position, depth_of(g.layer, "mlp")) for _, g in mlp),
                    torch.full((n_logits,), depth_of(self.replacement.n_layers, "attn")),
                ]
            ),
            position=torch.cat([*(g.position for _, g in mlp), self.logit_table.position]),
            read=torch.cat([*reads, self.logit_table.read]),
            value=torch.cat([*(value for _, value in found), self.logit_table.value]),
        )

    def _streams(self) -> Float[torch.Tensor, "target d_model"]:
        """The residual stream where each reading target reads it."""
        trace = self.replacement.trace
        mid = [trace.resid_mid[g.layer, g.position] for _, g in self._mlp_groups()]
        return torch.cat([*mid, trace.resid_final[self.logit_table.position]])

    def _attention_targets(self) -> list[AttentionTargets]:
        targets: list[AttentionTargets] = []
        for i, group in enumerate(self.groups):
            if group.kind is Kind.ATTN and len(group.position):
                index, value = self.features(group)
                z_read = self.replacement.z_read(group.layer, index)
                targets.append(AttentionTargets(group.layer, self.numbers(i), group.position, z_read, value))
        return targets

    # Nodes

    def nodes(self, unstored: Float[np.ndarray, " node"]) -> tuple[NodeRecord, ...]:
        """All nodes in the order of their numbers."""
        nodes: list[NodeRecord] = []
        for group in self.groups:
            position = group.position.tolist()
            if group.kind in (Kind.MLP, Kind.ATTN):
                nodes += self._feature_nodes(group, position, unstored[len(nodes) :])
            else:
                nodes += self._leaf_nodes(group, position)
        return (*nodes, *(self._logit_node(i, unstored[len(nodes) + i]) for i in range(len(self.logits))))

    def _feature_nodes(
        self, group: Group, positions: list[int], unstored: Float[np.ndarray, " node"]
    ) -> list[NodeRecord]:
        layer, site = group.layer, group.site
        index, value = self.features(group)
        constant = self.replacement.constants(layer, site, index).tolist()
        dictionary = self.site(group).dictionary.record.id
        return [
            NodeRecord(
                id=f"{self.prompt_id}/{t}/{layer}/{site}/{j}",
                kind=group.kind,
                position=t,
                layer=layer,
                name=f"L{layer} {site} {j} {self.at(t)}",
                dictionary=dictionary,
                index=j,
                site=site,
                value=a,
                pre_activation=a,
                constant=c,
                unstored=rest,
            )
            for t, j, a, c, rest in zip(
                positions, index.tolist(), value.tolist(), constant, unstored[: len(positions)].tolist(), strict=True
            )
        ]

    def _leaf_nodes(self, group: Group, positions: list[int]) -> list[NodeRecord]:
        prompt, layer, site = self.prompt_id, group.layer, group.site
        tokens = self.replacement.trace.tokens.tolist()
        if group.kind is Kind.EMBEDDING:
            return [
                NodeRecord(
                    id=f"{prompt}/{t}/embedding",
                    kind=group.kind,
                    position=t,
                    layer=-1,
                    name=f"embedding {self.at(t)}",
                    token_id=tokens[t],
                )
                for t in positions
            ]
        if group.kind is Kind.POSITION:
            return [
                NodeRecord(f"{prompt}/{t}/position", group.kind, t, -1, f"position {t} {self.at(t)}") for t in positions
            ]
        word = "error" if group.kind is Kind.ERROR else "bias"
        norms = self._write(group).norm(dim=1).tolist() if group.kind is Kind.ERROR else [None] * len(positions)
        return [
            NodeRecord(
                id=f"{prompt}/{t}/{layer}/{site}/{word}",
                kind=group.kind,
                position=t,
                layer=layer,
                name=f"L{layer} {site} {word} {self.at(t)}",
                site=site,
                norm=norm,
            )
            for t, norm in zip(positions, norms, strict=True)
        ]

    def _logit_node(self, i: int, unstored: float) -> NodeRecord:
        root, value = self.logits[i], float(self.logit_table.value[i])
        token = self.model.token_text(root.index)
        versus = None if root.versus is None else self.model.token_text(root.versus)
        probability = self.replacement.trace.logits[root.position].softmax(0)[root.index]
        return NodeRecord(
            id=f"{self.prompt_id}/{_root_path(root)}",
            kind=Kind.LOGIT,
            position=root.position,
            layer=root.layer,
            name=f'logit "{token}"{"" if versus is None else f" - {versus!r}"} {self.at(root.position)}',
            pre_activation=value,
            constant=float(self.logit_table.constant[i]),
            unstored=float(unstored),
            token=token,
            versus=versus,
            logit=value,
            probability=float(probability) if versus is None else None,
        )

    def at(self, position: int) -> str:
        """Where a node stands, in words: `@ Texas`."""
        return "@ BOS" if position == 0 else f"@ {self.texts[position].strip() or repr(self.texts[position])}"

    # Circuits

    def circuits(self, sweeps: Sequence[Sweep], direct: DirectEdges, ov: OVEdges) -> tuple[CircuitRecord, ...]:
        """One circuit per root and rule, with its members and its shares (METHOD 4)."""
        ends = np.concatenate([[direct.source, direct.target], [ov.source, ov.target]], axis=1)
        return tuple(circuit for sweep in sweeps for circuit in self._circuits(sweep, ends))

    def _membership(self, sweep: Sweep) -> tuple[torch.Tensor, torch.Tensor]:
        """(attribution, membership) of every node but the roots themselves, [root, node] each."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for group in self.groups:
            if group.kind in (Kind.MLP, Kind.ATTN):
                at = sweep.attribution.site(group.layer, group.site)
                found.append((at.feature[:, group.active], at.kept[:, group.active]))
            else:
                attr, member = sweep.leaves[group.kind, group.layer, group.site]
                found.append((attr[:, group.position], member[:, group.position]))
        return torch.cat([attr for attr, _ in found], 1), torch.cat([member for _, member in found], 1)

    def _circuits(self, sweep: Sweep, ends: np.ndarray) -> Iterator[CircuitRecord]:
        found = sweep.attribution
        shares = torch.stack([found.embeddings + found.biases + found.constant, found.errors, found.pruned])
        shares = (shares / sweep.table.value).T.tolist()
        attributions, memberships = (part.double().numpy() for part in self._membership(sweep))
        for r, (root, value) in enumerate(zip(sweep.roots, sweep.table.value.tolist(), strict=True)):
            node = self._root_node(root)
            members = memberships[r].nonzero()[0]
            inside = np.zeros(self.first[-1] + len(self.logits), dtype=bool)
            inside[members] = inside[node] = True
            completeness, error_share, pruned_share = shares[r]
            yield CircuitRecord(
                id=f"{self.prompt_id}/{_root_path(root)}/{sweep.rule}",
                root=node,
                rule=sweep.rule,
                threshold=sweep.threshold,
                members=np.append(members, node),
                attribution=np.append(attributions[r, members], value),
                n_edges=int(inside[ends].all(0).sum()),
                root_value=value,
                completeness=completeness,
                error_share=error_share,
                pruned_share=pruned_share,
            )

    def _root_node(self, root: Root) -> int:
        if root.site == "logit":
            return int(self.first[-1]) + self.logits.index(root)
        for i, group in enumerate(self.groups):
            if group.kind in (Kind.MLP, Kind.ATTN) and (group.layer, group.site) == (root.layer, root.site):
                index, _ = self.features(group)
                return int(self.first[i]) + int(((index == root.index) & (group.position == root.position)).nonzero())
        raise LookupError(root)


def _root_path(root: Root) -> str:
    """A root's id within its prompt."""
    if root.site != "logit":
        return f"{root.position}/{root.layer}/{root.site}/{root.index}"
    return f"{root.position}/logit/{root.index}" + ("" if root.versus is None else f"-{root.versus}")


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


def _firings(site: Site) -> list[FiringRecord]:
    """Every feature of a site that is active after BOS, with its positions and values."""
    after = slice(site.counts[0], None)
    index, order = site.index[after].sort(stable=True)
    features, counts = index.unique_consecutive(return_counts=True)
    positions, values = tuple(site.position[after][order].tolist()), tuple(site.value[after][order].tolist())
    stops = counts.cumsum(0).tolist()
    dictionary = site.dictionary.record.id
    return [
        FiringRecord(dictionary, feature, positions[start:stop], values[start:stop])
        for feature, start, stop in zip(features.tolist(), [0, *stops], stops, strict=False)
    ]
