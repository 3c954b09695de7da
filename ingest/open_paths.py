"""Direct edges where linear paths stay open (METHOD 3): a target is read through all of them.

Every target is one row. Its read g is carried down from where it stands to the embeddings, and at each depth
dotted with what the sources there write:

    edge(u -> v) = a_u w_u . g[position of u]

    skip transcoder    g[t] += P W_skip g[t] / sigma_mid[t]
    open attention     g[s] += sum_h P W_V[h] (sum_t A[h,t,s] W_O[h] g[t]) / sigma_pre[s]

A closed site hands nothing down. An attention feature is one row per head, which begins in that head's z.

A row never reaches positions after its own nor layers above its own. So rows are taken in blocks of like positions,
each block no longer than its last position, and within a block from the top of the model down, so that those begun
at a layer are the first few. P and sigma_pre are folded into W_V and A. What costs are the products with W_O and W_V
at every position, and a row is spared them where they can be done on less:

    first open attention under it    the row is at one query: one product with W_O, and with W_V one a head
    attention of layer 1             W_V is applied to the sources below it, once for all rows (`low`)
    attention of layer 0             it moves embeddings only, once for all rows (`moved`)
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch.nn import functional

from atlas.records import DirectEdges, OVEdges
from ingest import edges
from ingest.edges import AttentionTargets, Sources, Targets, depth_of
from ingest.replacement import ReplacementModel, centre

BLOCK = 128  # rows that a processor carries at once
GPU_CELLS = 2**17  # rows times positions that a GPU carries at once: of small products it waits for each


def open_edges(
    sources: Sources, targets: Targets, attention: Sequence[AttentionTargets], model: ReplacementModel
) -> tuple[DirectEdges, OVEdges]:
    """The DIRECT and OV edges that are strong enough to store, along all open paths."""
    n_heads = model.weights.W_V.shape[1]
    per_head = [_per_head(at) for at in attention]
    every = Targets(*(torch.cat(c) for c in zip(*(vars(t).values() for t in (targets, *per_head)), strict=True)))
    head = torch.arange(len(every.node) - len(targets.node), device=every.node.device) % n_heads
    sources = in_order(sources)
    none = sources.node[:0]
    found = [(none, none, none.double())]
    for rows, weight in edge_rows(sources, every, model):
        strong = (weight.abs() >= edges.SHARE * every.value[rows, None].abs()) & (weight != 0)
        row, source = strong.nonzero(as_tuple=True)
        found.append((rows[row], source, weight[row, source].double()))
    row, source, weight = (torch.cat(column) for column in zip(*found, strict=True))
    reading = row < len(targets.node)
    direct = DirectEdges(
        *(
            column.numpy(force=True)
            for column in (sources.node[source[reading]], every.node[row[reading]], weight[reading])
        )
    )
    row, source = row[~reading], source[~reading]
    head, layer = head[row - len(targets.node)], every.depth[row] // 2
    ov = OVEdges(
        source=sources.node[source].numpy(force=True),
        target=every.node[row].numpy(force=True),
        layer=layer.numpy(force=True),
        head=head.numpy(force=True),
        weight=weight[~reading].numpy(force=True),
        pattern=model.trace.pattern[layer, head, every.position[row], sources.position[source]]
        .double()
        .numpy(force=True),
    )
    return direct, ov


def in_order(sources: Sources) -> Sources:
    """The sources by depth, and of one depth by position."""
    order = _lexsort(sources.position, sources.depth)
    return Sources(*(column[order] for column in vars(sources).values()))


def _lexsort(second: Int[torch.Tensor, " n"], first: Int[torch.Tensor, " n"]) -> Int[torch.Tensor, " n"]:
    """The order by `first`, and of what is alike in it by `second`."""
    order = second.argsort(stable=True)
    return order[first[order].argsort(stable=True)]


def edge_rows(
    sources: Sources, targets: Targets, model: ReplacementModel
) -> Iterator[tuple[Int[torch.Tensor, " row"], Float[torch.Tensor, "row source"]]]:
    """The weights of all edges into some targets at a time, which are given by their numbers.

    `sources` are `in_order`. `targets` at an even depth are attention features, which read z.
    """
    carry = _Carry(sources, model)
    order = _lexsort(-targets.depth, targets.position)
    n_pos = len(model.trace.tokens)
    for block in order.split(BLOCK if order.device.type == "cpu" else -(-GPU_CELLS // n_pos)):
        rows = block[targets.depth[block].argsort(descending=True, stable=True)]
        yield rows, carry.down(targets.depth[rows], targets.position[rows], targets.read[rows])


class _Carry:
    """What is frozen, folded, and the sources by depth and position."""

    def __init__(self, sources: Sources, model: ReplacementModel) -> None:
        self.model, self.sources = model, sources
        trace, weights = model.trace, model.weights
        self.moving = (trace.pattern / trace.sigma_pre[:, None, None]).mT.contiguous()  # [layer, head, key, query]
        self.W_V = centre(weights.W_V.mT.contiguous())  # [layer, head, d_head, d_model]
        n_pos = len(trace.tokens)
        cells, counts = (sources.depth * n_pos + sources.position).unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        self.cells: dict[int, list[tuple[int, int, int]]] = {}
        for cell, start, end in zip(cells.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
            self.cells.setdefault(cell // n_pos, []).append((cell % n_pos, start, end))
        self.has_low = (
            model.n_layers > 1 and model.attn[1].dictionary.is_open and model.mlp[0].dictionary.W_skip is None
        )
        self.low = self._low(sources.write[: int((sources.depth < depth_of(1, "attn")).sum())])
        self.moved = self._moved_embeddings() if model.attn[0].dictionary.is_open else []

    def down(
        self, depth: Int[torch.Tensor, " row"], position: Int[torch.Tensor, " row"], read: Float[torch.Tensor, "row d"]
    ) -> Float[torch.Tensor, "row source"]:
        """Rows from the top of the model down, through all layers below them."""
        model, n_pos, d_model = self.model, int(position.max()) + 1, read.shape[1]
        g = read.new_zeros(len(read), n_pos, d_model)
        weight = read.new_zeros(len(read), len(self.sources.node))
        begun = [int((depth >= d).sum()) for d in range(2 * model.n_layers + 1)]  # at depth d or above
        start, spread = begun[-1], 0  # the first `spread` rows may be anywhere, the others at their positions only
        arange = partial(torch.arange, device=position.device)
        g[arange(start), position[:start]] = read[:start]
        for layer in reversed(range(model.n_layers)):
            mlp, attn = depth_of(layer, "mlp"), depth_of(layer, "attn")
            before, reading, after = begun[mlp + 1], begun[mlp], begun[attn]
            self._meet(mlp, g[:before], weight)
            if (W_skip := model.mlp[layer].dictionary.W_skip) is not None:
                g[:before] += centre(g[:before] @ W_skip.T) / model.trace.sigma_mid[layer, :n_pos, None]
            new = arange(before, reading)
            g[new, position[new], :d_model] = read[new]
            self._meet(attn, g[:reading], weight)
            is_open = model.attn[layer].dictionary.is_open
            if is_open and layer == 0:
                for t, moved in enumerate(self.moved[:n_pos]):
                    weight[:, : len(moved)].addmm_(g[:, t], moved.T)
            elif is_open:
                moved = self._moved(layer, g[:spread])
                rows = arange(spread, reading)
                g[rows] += self._first_pass(layer, g[rows, position[rows]] @ model.W_O(layer).T, position[rows], n_pos)
                if layer == 1 and self.has_low:
                    g = torch.cat([g, functional.pad(moved, (0, 0, 0, 0, 0, len(g) - spread))], 2)
                else:
                    g[:spread].flatten(0, 1).addmm_(moved.flatten(0, 1), self.W_V[layer].flatten(0, 1))
                spread = reading
            elif after > reading:
                rows = arange(reading, after)
                g[rows, :, :d_model] = self._first_pass(layer, read[rows], position[rows], n_pos)
                spread = after
        self._meet(-1, g, weight)
        return weight

    def _meet(self, depth: int, g: Float[torch.Tensor, "row pos d"], weight: torch.Tensor) -> None:
        """Dot rows with the writes of the sources at a depth."""
        write = self.low if depth < depth_of(1, "attn") else self.sources.write
        for position, start, end in self.cells.get(depth, []) if len(g) else []:
            if position < g.shape[1]:
                weight[: len(g), start:end].addmm_(g[:, position], write[start:end].T)

    def _moved(self, layer: int, g: Float[torch.Tensor, "row pos d_model"]) -> Float[torch.Tensor, "row pos z"]:
        """What open attention hands from queries to keys, before W_V."""
        n_pos, n_heads = g.shape[1], self.moving.shape[1]
        z = g @ self.model.W_O(layer).T
        # All rows of a head at once: its pattern is small, and costs more than its share row by row.
        heads = z.unflatten(2, (n_heads, -1)).permute(2, 1, 0, 3).flatten(2)
        moved = self.moving[layer, :, :n_pos, :n_pos] @ heads
        return moved.unflatten(2, (len(g), z.shape[2] // n_heads)).permute(2, 1, 0, 3).flatten(2)

    def _first_pass(
        self, layer: int, z: Float[torch.Tensor, "row z"], position: Int[torch.Tensor, " row"], n_pos: int
    ) -> Float[torch.Tensor, "row pos d_model"]:
        """What attention hands to the keys of rows that read z at one query only, their own."""
        per_head = torch.einsum("rhe,hed->rhd", z.unflatten(1, (self.moving.shape[1], -1)), self.W_V[layer])
        return self.moving[layer][:, :n_pos, position].permute(2, 1, 0) @ per_head

    def _low(self, write: Float[torch.Tensor, "n d_model"]) -> Float[torch.Tensor, "n d"]:
        """What stands below the attention of layer 1, and beside it the same through W_V."""
        return torch.cat([write, write @ self.W_V[1].flatten(0, 1).T], 1) if self.has_low else write

    def _moved_embeddings(self) -> list[Float[torch.Tensor, "source d"]]:
        """For each query, what the first layer's attention moves there of the sources below it."""
        n = int((self.sources.depth < 0).sum())
        position = self.sources.position[:n]
        value = torch.einsum("nd,hed->nhe", self.sources.write[:n], self.W_V[0])
        return [
            self._low(
                (value[: int((position <= t).sum())] * moving[:, position[position <= t]].T[:, :, None]).flatten(1)
                @ self.model.W_O(0)
            )
            for t, moving in enumerate(self.moving[0].unbind(2))
        ]


def _per_head(at: AttentionTargets) -> Targets:
    """Attention features as one target per head, each reading that head's part of z."""
    n, n_heads, d_head = at.z_read.shape
    read = at.z_read.new_zeros(n, n_heads, n_heads, d_head)
    every = torch.arange(n_heads, device=read.device)
    read[:, every, every] = at.z_read

    def each(column: torch.Tensor) -> torch.Tensor:
        return column.repeat_interleave(n_heads)

    return Targets(
        node=each(at.node),
        depth=at.node.new_full((n * n_heads,), depth_of(at.layer, "attn")),
        position=each(at.position),
        read=read.flatten(0, 1).flatten(1),
        value=each(at.value),
    )
