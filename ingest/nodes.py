"""The nodes of a prompt: their numbers, what they write, and their records.

Nodes are listed from the embeddings upward: first those of the circuits, then those that only the
scores' pairs need (METHOD 5), then the logits. Edges and circuits refer to them by their numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from atlas.records import Kind, NodeRecord
from ingest.model import LanguageModel
from ingest.replacement import ReplacementModel, Site
from ingest.roots import Root, Roots, root_table

Key = tuple[Kind, int, str]


@dataclass(frozen=True)
class Group:
    """Nodes of one kind at one layer and site.

    `place` is that of a feature in its site's list; for all others it is the position.
    """

    kind: Kind
    layer: int
    site: str
    position: Int[torch.Tensor, " n"]
    place: Int[torch.Tensor, " n"]

    @property
    def key(self) -> Key:
        """What all of its nodes share."""
        return self.kind, self.layer, self.site

    @property
    def of_features(self) -> bool:
        """Whether its nodes are features."""
        return self.kind in (Kind.MLP, Kind.ATTN)


class Nodes:
    """Numbers the nodes of a prompt: `circuit` groups, then `others`, then `logits`."""

    def __init__(
        self,
        prompt_id: str,
        model: LanguageModel,
        replacement: ReplacementModel,
        circuit: Sequence[Group],
        others: Sequence[Group],
        logits: Sequence[Root],
    ) -> None:
        self.prompt_id, self.model, self.replacement = prompt_id, model, replacement
        self.circuit, self.groups, self.logits = circuit, [*circuit, *others], logits
        self._circuit_group = {group.key: i for i, group in enumerate(circuit)}
        self.first = np.cumsum([0, *(len(group.position) for group in self.groups)])
        self.n_circuit, self.n_groups = int(self.first[len(circuit)]), int(self.first[-1])
        self.logit_table: Roots = root_table(logits, replacement)
        self.texts = tuple(model.texts([[token] for token in replacement.trace.tokens.tolist()]))
        # Where a node stands, in words: `@ Texas`.
        self.at = ("@ BOS", *(f"@ {text.strip() or repr(text)}" for text in self.texts[1:]))

    def __len__(self) -> int:
        return self.n_groups + len(self.logits)

    def numbers(self, i: int) -> Int[torch.Tensor, " n"]:
        """The numbers of group `i`."""
        return self.arange(int(self.first[i]), int(self.first[i + 1]))

    @property
    def logit_numbers(self) -> Int[torch.Tensor, " logit"]:
        """The numbers of the logits."""
        return self.arange(self.n_groups, len(self))

    def arange(self, start: int, end: int) -> Int[torch.Tensor, " n"]:
        """Numbers in a row."""
        return torch.arange(start, end, device=self.model.device)

    def of_root(self, root: Root) -> int:
        """The number of a root."""
        if root.site == "logit":
            return self.n_groups + self.logits.index(root)
        kind = Kind.MLP if root.site == "mlp" else Kind.ATTN
        i = self._circuit_group[kind, root.layer, root.site]
        group = self.circuit[i]
        here = (group.position == root.position) & (self.features(group)[0] == root.index)
        return int(self.first[i]) + int(here.nonzero())

    def site(self, group: Group) -> Site:
        """The site of a group of features, errors or biases."""
        return self.replacement.site(group.layer, group.site)

    def features(self, group: Group) -> tuple[Int[torch.Tensor, " n"], Float[torch.Tensor, " n"]]:
        """(index, value) of a group of features."""
        site = self.site(group)
        return site.index[group.place], site.value[group.place]

    def write(self, group: Group) -> Float[torch.Tensor, "n d_model"]:
        """a_u w_u of a group's nodes (METHOD 2)."""
        trace = self.replacement.trace
        if group.kind is Kind.EMBEDDING:
            return trace.embed[group.position]
        if group.kind is Kind.POSITION:
            return trace.pos_embed[group.position]
        site = self.site(group)
        if group.kind is Kind.BIAS:
            bias = site.bias if group.site == "mlp" else self.replacement.attn_bias(group.layer)
            return bias[group.position]
        if group.kind is Kind.ERROR:
            written = site.error[group.position]
        else:
            written = site.dictionary.W_dec[site.index[group.place]] * site.amplitude[group.place, None]
        return written if group.site == "mlp" else self.replacement.to_residual(group.layer, written)

    def records(self, unstored: Float[np.ndarray, " node"]) -> tuple[NodeRecord, ...]:
        """All nodes in the order of their numbers; `unstored` is meaningful for features and logits."""
        nodes: list[NodeRecord] = []
        for group in self.groups:
            position = group.position.tolist()
            if group.of_features:
                nodes += self._feature_nodes(group, position, unstored[len(nodes) :])
            else:
                nodes += self._leaf_nodes(group, position)
        return (*nodes, *(self._logit_node(i, unstored[len(nodes) + i]) for i in range(len(self.logits))))

    def _feature_nodes(
        self, group: Group, positions: list[int], unstored: Float[np.ndarray, " node"]
    ) -> list[NodeRecord]:
        layer, site = group.layer, group.site
        index, value = self.features(group)
        constant = self.replacement.constants(layer, site, index, group.position).tolist()
        dictionary = self.site(group).dictionary.record.id
        return [
            NodeRecord(
                id=f"{self.prompt_id}/{t}/{layer}/{site}/{j}",
                kind=group.kind,
                position=t,
                layer=layer,
                name=f"L{layer} {site} {j} {self.at[t]}",
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
                    name=f"embedding {self.at[t]}",
                    token_id=tokens[t],
                )
                for t in positions
            ]
        if group.kind is Kind.POSITION:
            return [
                NodeRecord(f"{prompt}/{t}/position", group.kind, t, -1, f"position {t} {self.at[t]}") for t in positions
            ]
        word = "error" if group.kind is Kind.ERROR else "bias"
        norms = self.write(group).norm(dim=1).tolist() if group.kind is Kind.ERROR else [None] * len(positions)
        return [
            NodeRecord(
                id=f"{prompt}/{t}/{layer}/{site}/{word}",
                kind=group.kind,
                position=t,
                layer=layer,
                name=f"L{layer} {site} {word} {self.at[t]}",
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
            id=f"{self.prompt_id}/{root_path(root)}",
            kind=Kind.LOGIT,
            position=root.position,
            layer=root.layer,
            name=f'logit "{token}"{"" if versus is None else f" - {versus!r}"} {self.at[root.position]}',
            pre_activation=value,
            constant=float(self.logit_table.constant[i]),
            unstored=float(unstored),
            token=token,
            versus=versus,
            logit=value,
            probability=float(probability) if versus is None else None,
        )


def root_path(root: Root) -> str:
    """A root's id within its prompt."""
    if root.site != "logit":
        return f"{root.position}/{root.layer}/{root.site}/{root.index}"
    return f"{root.position}/logit/{root.index}" + ("" if root.versus is None else f"-{root.versus}")
