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
    the next one                     the row is that and a vector a head, in other shares at every position (`_Few`)
    attention of layer 1             W_V is applied to the sources below it, once for all rows
    attention of layer 0             it moves embeddings only, once for all rows

The last two are for prompts of up to LOW tokens: embeddings at all queries are as many as the square of these.
The sources of a layer are dotted with all rows in one product, a batch of positions with as many sources at each.

Each thread takes blocks of its own, which stay in its processor's cache; to share every product of one block costs
a quarter more time where processors share no cache.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional

from atlas.records import DirectEdges, OVEdges
from ingest import edges
from ingest.edges import AttentionTargets, Sources, Targets, depth_of
from ingest.replacement import ReplacementModel, centre

BLOCK, CELLS = 128, 2**12  # rows, and rows times positions, that a processor carries at once
GPU_CELLS = 2**17  # rows times positions that a GPU carries at once: of small products it waits for each
LOW = 256  # tokens of a prompt up to which the lowest layers' attention is applied to sources
T = TypeVar("T")


class EdgeRows(NamedTuple):
    """The weights of all edges into some targets from some sources; targets and sources are told by their numbers.

    A weight is 0 where there is no edge, as from source 0, by which cells are filled up to be of one length.
    """

    target: Int[torch.Tensor, " row"]
    source: Int[torch.Tensor, "cell n"]
    weight: Float[torch.Tensor, "cell row n"]


def open_edges(
    sources: Sources, targets: Targets, attention: Sequence[AttentionTargets], model: ReplacementModel
) -> tuple[DirectEdges, OVEdges]:
    """The DIRECT and OV edges that are strong enough to store, along all open paths."""
    n_heads = model.weights.W_V.shape[1]
    per_head = [_per_head(at) for at in attention]
    every = Targets(*(torch.cat(c) for c in zip(*(vars(t).values() for t in (targets, *per_head)), strict=True)))
    head = torch.arange(len(every.node) - len(targets.node), device=every.node.device) % n_heads
    found = edge_rows(sources, every, model, partial(_strong, every.value))
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


def edge_rows(
    sources: Sources, targets: Targets, model: ReplacementModel, take: Callable[[Iterator[EdgeRows]], T]
) -> list[T]:
    """What `take` makes of the edges into each block of targets; every edge comes once.

    `targets` at an even depth are attention features, which read z. `take` is called by several threads.
    """
    n_pos, on_cpu = len(model.trace.tokens), targets.node.device.type == "cpu"
    order = (-targets.depth).argsort(stable=True)
    order = order[targets.position[order].argsort(stable=True)]
    size = min(BLOCK, -(-CELLS // n_pos)) if on_cpu else -(-GPU_CELLS // n_pos)
    blocks = order.split(size)[::-1]  # the longest first
    frozen = _Frozen(sources, model)
    taken: dict[int, T] = {}
    todo = iter(enumerate(blocks))

    @torch.no_grad()
    def work() -> None:
        carry = _Carry(frozen, min(size, len(order)))
        for i, block in todo:
            rows = block[targets.depth[block].argsort(descending=True, stable=True)]
            taken[i] = take(carry.down(rows, targets.depth[rows], targets.position[rows], targets.read[rows]))

    _in_threads(work, min(len(blocks), torch.get_num_threads()) if on_cpu else 1)
    return [taken[i] for i in range(len(blocks))]


def _in_threads(work: Callable[[], None], n: int) -> None:
    """Do `work` in `n` threads at once, each of which computes alone."""
    if n < 2:
        return work()
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work) for _ in range(n)]:
                done.result()
    finally:
        torch.set_num_threads(threads)


def _strong(
    value: Float[torch.Tensor, " target"], rows: Iterable[EdgeRows]
) -> tuple[Int[torch.Tensor, " edge"], Int[torch.Tensor, " edge"], Float[torch.Tensor, " edge"]]:
    """Target, source and weight of the edges that are strong enough to store."""
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for target, source, weight in rows:
        strong = (weight.abs() >= edges.SHARE * value[target, None].abs()) & (weight != 0)
        cell, row, place = strong.nonzero(as_tuple=True)
        found.append((target[row], source[cell, place], weight[strong].double()))
    row, source, weight = (torch.cat(column) for column in zip(*found, strict=True))
    return row, source, weight


class _Cells(NamedTuple):
    """Sources by position, as many at each: where there are fewer, source 0 stands, and writes nothing."""

    source: Int[torch.Tensor, "pos n"]
    write: Float[torch.Tensor, "pos n d"]


class _Few(NamedTuple):
    """Rows that are the same few vectors at every position, each with another share there."""

    share: Float[torch.Tensor, "row pos n"]
    vector: Float[torch.Tensor, "row n d_model"]


class _Frozen:
    """What is frozen, folded, and the sources by layer and position."""

    def __init__(self, sources: Sources, model: ReplacementModel) -> None:
        self.model, self.sources = model, sources
        trace, weights = model.trace, model.weights
        self.n_pos = len(trace.tokens)
        self.moving = (trace.pattern / trace.sigma_pre[:, None, None]).mT.contiguous()  # [layer, head, key, query]
        self.W_V = centre(weights.W_V.mT.contiguous())  # [layer, head, d_head, d_model]
        depth, layers = sources.depth, range(model.n_layers)
        self.skips = [site.dictionary.W_skip for site in model.mlp]
        self.attn = [self._cells(depth == depth_of(layer, "attn")) for layer in layers]
        # Rows come to both sites of a layer alike, unless something is skipped to between them.
        self.mlp = [
            self._cells(depth == depth_of(layer, "mlp") if self.skips[layer] is not None else depth // 2 == layer)
            for layer in layers
        ]
        self.lowest = 0  # the layer whose attention is the last that rows go through
        self.has_low = False
        if not model.attn[0].dictionary.is_open or self.n_pos > LOW:
            self.embedded = self._cells(depth < 0)
            return
        self.lowest, self.embedding = 1, (depth < 0).nonzero()[:, 0]
        write = sources.write[self.embedding]
        moved = torch.einsum("nd,hed,hef->nhf", write, self.W_V[0], weights.W_O[0])
        self.at_queries = self._at_queries(write, moved)
        if model.n_layers > 1 and model.attn[1].dictionary.is_open and self.skips[0] is None:
            self.has_low = True
            W_V = self.W_V[1].flatten(0, 1).T
            self.low = self.mlp[0].write @ W_V
            self.low_at_queries = self._at_queries(write @ W_V, moved @ W_V)

    def _cells(self, chosen: Bool[torch.Tensor, " source"]) -> _Cells:
        """The chosen sources by position."""
        source = chosen.nonzero()[:, 0]
        source = source[self.sources.position[source].argsort(stable=True)]
        position = self.sources.position[source]
        counts = position.bincount(minlength=self.n_pos)
        place = torch.arange(len(source), device=source.device) - (counts.cumsum(0) - counts)[position]
        number = source.new_zeros(self.n_pos, int(counts.max()))
        number[position, place] = source
        write = self.sources.write[number]
        write[torch.arange(number.shape[1], device=source.device) >= counts[:, None]] = 0
        return _Cells(number, write)

    def _at_queries(
        self, write: Float[torch.Tensor, "n d"], moved: Float[torch.Tensor, "n head d"]
    ) -> Float[torch.Tensor, "pos n d"]:
        """What embeddings write at their own positions, and heads move of it to queries."""
        position = self.sources.position[self.embedding]
        at = torch.arange(self.n_pos, device=position.device)[:, None] == position
        pattern = self.moving[0, :, position]  # [head, embedding, query]
        return at[..., None] * write + torch.einsum("hnq,nhd->qnd", pattern, moved)


class _Carry:
    """Carries rows down, one block after another in the same memory."""

    def __init__(self, frozen: _Frozen, size: int) -> None:
        self.frozen = frozen
        write = frozen.sources.write
        self.rooms = write.new_empty(3, size * frozen.n_pos * write.shape[1])

    def down(
        self,
        target: Int[torch.Tensor, " row"],
        depth: Int[torch.Tensor, " row"],
        position: Int[torch.Tensor, " row"],
        read: Float[torch.Tensor, "row d"],
    ) -> Iterator[EdgeRows]:
        """Rows from the top of the model down, through all layers below them."""
        frozen, n_pos = self.frozen, int(position.max()) + 1
        g = self._room(2, len(read), n_pos, read.shape[1]).zero_()
        begun = [int((depth >= d).sum()) for d in range(2 * frozen.model.n_layers + 1)]  # at depth d or above
        start, spread = begun[-1], 0  # the first `spread` rows may be anywhere, the others at their positions only
        arange = partial(torch.arange, device=position.device)
        g[arange(start), position[:start]] = read[:start]
        low, few = g[:0], None
        for layer in reversed(range(frozen.model.n_layers)):
            mlp, attn = depth_of(layer, "mlp"), depth_of(layer, "attn")
            before, reading, after = begun[mlp + 1], begun[mlp], begun[attn]
            met = _met(target[:before], g[:before], frozen.mlp[layer])
            if layer == 0 and frozen.has_low:
                met.weight[:, : len(low)] += _dot(low, frozen.low)
            yield met
            if (W_skip := frozen.skips[layer]) is not None:
                g[:before] += centre(g[:before] @ W_skip.T) / frozen.model.trace.sigma_mid[layer, :n_pos, None]
                few = None
                yield _met(target[:before], g[:before], frozen.attn[layer])
            new = arange(before, reading)
            g[new, position[new]] = read[new]
            yield _met_once(target[new], read[new], position[new], frozen.attn[layer])
            if layer >= frozen.lowest and frozen.model.attn[layer].dictionary.is_open:
                moved = self._moved(layer, g[:spread], few)
                few = self._first_pass(layer, g[spread:reading], position[spread:reading])
                if layer == 1 and frozen.has_low:
                    low = moved
                else:
                    g[:spread].flatten(0, 1).addmm_(moved.flatten(0, 1), frozen.W_V[layer].flatten(0, 1))
                spread = reading
            elif after > reading:
                heads = self._heads(layer, read[reading:after], position[reading:after], n_pos)
                torch.bmm(heads.share, heads.vector, out=g[reading:after])
                few, spread = None, after
        if frozen.lowest == 0:
            yield _met(target, g, frozen.embedded)
            return
        weight = _dot(g, frozen.at_queries).sum(0)
        if frozen.has_low:
            weight[: len(low)] += _dot(low, frozen.low_at_queries).sum(0)
        yield EdgeRows(target, frozen.embedding[None], weight[None])

    def _moved(
        self, layer: int, g: Float[torch.Tensor, "row pos d_model"], few: _Few | None
    ) -> Float[torch.Tensor, "row pos z"]:
        """What open attention hands from queries to keys, before W_V; the last rows are `few`."""
        n_pos, n_heads, W_O = g.shape[1], self.frozen.moving.shape[1], self.frozen.model.W_O(layer).T
        many = len(g) - (len(few.share) if few else 0)
        z = self._room(0, len(g), n_pos, len(W_O.T))
        torch.mm(g[:many].flatten(0, 1), W_O, out=z[:many].flatten(0, 1))
        if few:
            torch.bmm(few.share, few.vector @ W_O, out=z[many:])
        # All rows of a head at once: its pattern is small, and costs more than its share row by row.
        heads = self._room(1, n_heads, n_pos, len(g), z.shape[2] // n_heads)
        heads.copy_(z.unflatten(2, (n_heads, -1)).permute(2, 1, 0, 3))
        moved = self._room(0, *heads.shape)
        torch.bmm(self.frozen.moving[layer, :, :n_pos, :n_pos], heads.flatten(2), out=moved.flatten(2))
        by_row = self._room(1, len(g), n_pos, n_heads, heads.shape[3])
        return by_row.copy_(moved.permute(2, 1, 0, 3)).flatten(2)

    def _room(self, which: int, *shape: int) -> torch.Tensor:
        """Memory that is used again, for g, and in turn for what becomes of it: new memory costs more than a pass."""
        return self.rooms[which, : math.prod(shape)].view(shape)

    def _first_pass(
        self, layer: int, g: Float[torch.Tensor, "row pos d_model"], position: Int[torch.Tensor, " row"]
    ) -> _Few | None:
        """Hand rows, which are at one query each, to all their keys too; None where `few` are as many as positions."""
        here = functional.one_hot(position, g.shape[1]).to(g.dtype)[..., None]
        own = here.mT @ g
        heads = self._heads(layer, own[:, 0] @ self.frozen.model.W_O(layer).T, position, g.shape[1])
        few = _Few(torch.cat([heads.share, here], 2), torch.cat([heads.vector, own], 1))
        torch.bmm(few.share, few.vector, out=g)
        return few if few.share.shape[2] < few.share.shape[1] else None

    def _heads(
        self, layer: int, z: Float[torch.Tensor, "row z"], position: Int[torch.Tensor, " row"], n_pos: int
    ) -> _Few:
        """What each head hands to keys of rows that read z at one query."""
        vector = torch.einsum("rhe,hed->rhd", z.unflatten(1, (self.frozen.moving.shape[1], -1)), self.frozen.W_V[layer])
        return _Few(self.frozen.moving[layer, :, :n_pos, position].permute(2, 1, 0).contiguous(), vector)


def _met(target: Int[torch.Tensor, " row"], g: Float[torch.Tensor, "row pos d_model"], cells: _Cells) -> EdgeRows:
    """Rows that may be at every position, dotted with what is written there."""
    return EdgeRows(target, cells.source[: g.shape[1]], _dot(g, cells.write))


def _dot(
    g: Float[torch.Tensor, "row pos d"], write: Float[torch.Tensor, "all_pos n d"]
) -> Float[torch.Tensor, "pos row n"]:
    """g . w of every row, at every position and with all that is written there."""
    return g.transpose(0, 1) @ write[: g.shape[1]].mT


def _met_once(
    target: Int[torch.Tensor, " row"],
    read: Float[torch.Tensor, "row d_model"],
    position: Int[torch.Tensor, " row"],
    cells: _Cells,
) -> EdgeRows:
    """The same of rows that are at one position each."""
    here = position[:, None] == torch.arange(len(cells.source), device=position.device)
    weight = (read @ cells.write.flatten(0, 1).T).unflatten(1, cells.source.shape) * here[:, :, None]
    return EdgeRows(target, cells.source.flatten()[None], weight.flatten(1)[None])


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
