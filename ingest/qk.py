"""Why a head looks where it looks: pre-softmax scores as sums over pairs of nodes (METHOD 5).

With sigma frozen, the score of head h at query t and key s is bilinear in what was written at t and at s:

    S[l,h,t,s] = sum_{u at t} sum_{v at s} qk(u, v)                             (I3)
    qk(u, v)   = q_u . k_v * scale        q_u = a_u w_u P W_Q[h] / sigma_pre[l,t]
                                          k_v = a_v w_v P W_K[h] / sigma_pre[l,s]

over all nodes below layer l: every feature that fires, errors, biases and both embeddings, circuit or not.
b_Q and b_K are one more node on each side, a Bias with site `q` or `k` of layer l, which all heads share.
`lift` says what a query node does against the softmax's other choices: c_u(s) = q_u . k[s] * scale, with the
whole key at s, less its mean under the head's pattern. Only s <= t is ever read, so no masked score is touched.

Stored are, per score, the `STRONGEST` pairs by |qk|, and the strongest pair of each of the `LIFTED` query nodes
of greatest |lift| (a pair that is strong towards every key does not say why the head looks at this one). What is
under `NEGLIGIBLE` is not stored by either rule: it moves the odds of the pattern by less than 1 %.
`unstored` is the sum of all other pairs. It is summed from what the nodes write, and `score` comes from the
residual stream, so that score = stored + unstored tests I3. More pairs buy little: on `mini` the median
|unstored| over |score| is 29 % with 8 pairs, 25 % with 12, 22 % with 24 and 14 % with 64, of 13,000.

What costs is to project the nodes. A feature that fires at several tokens writes in one direction, which is
projected once, through all heads of a layer that look. After that nothing is computed that is not needed: as
|qk| <= |q_u| |k_v|, the pairs among the longest vectors say which others could be stronger, and of the tens of
thousands of a score a few hundred remain. The same bound finds the greatest |lift| and each one's strongest pair.

How to call it, once per prompt:

    nodes = score_nodes(replacement, looks)              # looks [score, 4]: layer, head, query, key; s <= t, each once
    parts = score_parts(replacement, nodes, looks)
    parts.nodes                                          # numbers (into `nodes`) of the nodes that stored pairs need
    nodes.group[n], nodes.position[n], nodes.place[n]    # what a number stands for: nodes.groups[group] is
                                                         # (kind, layer, site); place is that in the Site's list
    scores, qk = score_records(parts, number)            # number [node]: their places in PromptRecord.nodes
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch.nn import functional

from atlas.records import AttentionScores, Kind, QKEdges
from ingest.replacement import ReplacementModel, centre

STRONGEST = 12
LIFTED = 4
NEGLIGIBLE = 0.01
PAIRS_AT_ONCE = 1 << 13
LONGEST = 16  # vectors of either side that are tried first
ROUNDED = 1 - 1e-4  # as norms and products are


@dataclass(frozen=True)
class ScoreNodes:
    """Every node that some look reads, position by position and at each from the embeddings upward.

    Node n is of the kind, layer and site `groups[group[n]]` and stands at `position[n]`; `place[n]` is a feature's
    place in its Site's list, and the position for all others. It writes `value[n]` times `direction[of[n]]`. Those
    below the attention of layer l at position t are numbered from `first[t]`, and there are `below[l, t]` of them,
    if a head of l looks from or at t. The bias nodes of queries and keys come after all these: that of layer l,
    side i (0 query, 1 key) and position t at `bias[l, i]` + t; they write nothing.
    """

    groups: tuple[tuple[Kind, int, str], ...]
    group: Int[torch.Tensor, " node"]
    position: Int[torch.Tensor, " node"]
    place: Int[torch.Tensor, " node"]
    direction: Float[torch.Tensor, "direction d_model"]
    of: Int[torch.Tensor, " writer"]
    value: Float[torch.Tensor, " writer"]
    first: Int[torch.Tensor, " pos"]
    below: Int[torch.Tensor, "layer pos"]
    bias: Int[torch.Tensor, "layer 2"]


@dataclass(frozen=True)
class ScoreParts:
    """Scores and the pairs that are stored of them; `looks` is layer, head, query and key of each score.

    Pair i belongs to score `of[i]`; `query_node` and `key_node` are numbers of ScoreNodes, `qk` what the two
    give to the score, `lift` what the query node gives towards this key against the others.
    """

    looks: Int[torch.Tensor, "score 4"]
    score: Float[torch.Tensor, " score"]
    pattern: Float[torch.Tensor, " score"]
    unstored: Float[torch.Tensor, " score"]
    of: Int[torch.Tensor, " pair"]
    query_node: Int[torch.Tensor, " pair"]
    key_node: Int[torch.Tensor, " pair"]
    qk: Float[torch.Tensor, " pair"]
    lift: Float[torch.Tensor, " pair"]

    @property
    def nodes(self) -> Int[torch.Tensor, " n"]:
        """The numbers of all nodes that stored pairs need, ascending, each once."""
        return torch.cat([self.query_node, self.key_node]).unique()


@dataclass(frozen=True)
class _Writers:
    """The nodes of one kind, layer and site; the fields are those of ScoreNodes."""

    key: tuple[Kind, int, str]
    position: Int[torch.Tensor, " n"]
    place: Int[torch.Tensor, " n"]
    direction: Float[torch.Tensor, "direction d_model"]
    of: Int[torch.Tensor, " n"]
    value: Float[torch.Tensor, " n"]


@dataclass(frozen=True)
class _Side:
    """q_u or k_v of all nodes at each (head, position) that a layer looks from or at: the longest first.

    Look i is at `of[i]`. The vector in a slot is `scale` times a row of `vector`, and that of node `number`; a slot
    that is left over has norm 0. `total` is the sum over the slots.
    """

    of: Int[torch.Tensor, " look"]
    vector: Float[torch.Tensor, "row d_head"]
    row: Int[torch.Tensor, "n slot"]
    scale: Float[torch.Tensor, "n slot"]
    norm: Float[torch.Tensor, "n slot"]
    number: Int[torch.Tensor, "n slot"]
    total: Float[torch.Tensor, "n d_head"]

    def at(
        self, look: Int[torch.Tensor, " n"], slot: Int[torch.Tensor, " n"]
    ) -> tuple[Float[torch.Tensor, "n d_head"], Float[torch.Tensor, " n"]]:
        """The vectors in some slots of some looks, and what each is still to be multiplied by."""
        cell = self.of[look] * self.row.shape[1] + slot
        return self.vector.index_select(0, self.row.take(cell)), self.scale.take(cell)

    def longest(self) -> Float[torch.Tensor, "n slot d_head"]:
        """The `LONGEST` vectors of each."""
        row, scale = self.row[:, :LONGEST], self.scale[:, :LONGEST, None]
        return self.vector.index_select(0, row.flatten()).view(*row.shape, -1) * scale


@dataclass(frozen=True)
class _Pairs:
    """Pairs of some looks, by their slots."""

    look: Int[torch.Tensor, " pair"]
    query: Int[torch.Tensor, " pair"]
    key: Int[torch.Tensor, " pair"]
    qk: Float[torch.Tensor, " pair"]

    def __getitem__(self, which: torch.Tensor) -> "_Pairs":
        return _Pairs(self.look[which], self.query[which], self.key[which], self.qk[which])


@torch.no_grad()
def score_nodes(model: ReplacementModel, looks: Int[torch.Tensor, "score 4"]) -> ScoreNodes:
    """The nodes below all `looks` [layer, head, query, key], at their queries and keys."""
    n_pos = len(model.trace.embed)
    arange = partial(torch.arange, device=looks.device)
    positions = arange(n_pos)
    top = looks.new_full((n_pos,), -1)
    for end in looks[:, 2:].T:
        top.scatter_reduce_(0, end, looks[:, 0], "amax")
    n_layers = 1 + max(0, int(top.max()))
    writers = list(_writers(model, top))
    position = torch.cat([w.position for w in writers])
    order = position.argsort(stable=True)
    group = arange(len(writers)).repeat_interleave(looks.new_tensor([len(w.place) for w in writers]))
    depth = looks.new_tensor([w.key[1] for w in writers])[group]
    below = [position[depth < layer].bincount(minlength=n_pos) for layer in range(n_layers)]
    counts = position.bincount(minlength=n_pos)
    before = looks.new_tensor([0, *(len(w.direction) for w in writers)]).cumsum(0)
    of = torch.cat([w.of for w in writers]) + before[group]
    return ScoreNodes(
        groups=(*(w.key for w in writers), *((Kind.BIAS, i, side) for i in range(n_layers) for side in ("q", "k"))),
        group=torch.cat([group[order], len(writers) + arange(2 * n_layers).repeat_interleave(n_pos)]),
        position=torch.cat([position[order], positions.repeat(2 * n_layers)]),
        place=torch.cat([torch.cat([w.place for w in writers])[order], positions.repeat(2 * n_layers)]),
        direction=torch.cat([w.direction for w in writers]),
        of=of[order],
        value=torch.cat([w.value for w in writers])[order],
        first=counts.cumsum(0) - counts,
        below=torch.stack(below),
        bias=len(order) + n_pos * arange(2 * n_layers).view(n_layers, 2),
    )


@torch.no_grad()
def score_parts(model: ReplacementModel, nodes: ScoreNodes, looks: Int[torch.Tensor, "score 4"]) -> ScoreParts:
    """Take apart the scores at `looks` [layer, head, query, key], key <= query, each given once."""
    layer, head, query, key = looks.T
    score = looks.new_zeros(len(looks), dtype=torch.float64)
    unstored = torch.zeros_like(score)
    none = looks[:0, 0]
    found: list[tuple[torch.Tensor, ...]] = [(none, none, none, score[:0], score[:0])]
    for at in layer.unique().tolist():
        which = (layer == at).nonzero()[:, 0]
        score[which], unstored[which], (of, *pairs) = _layer(model, nodes, at, looks[which, 1:])
        found.append((which[of], *pairs))
    return ScoreParts(
        looks,
        score,
        model.trace.pattern[layer, head, query, key].double(),
        unstored,
        *(torch.cat(column) for column in zip(*found, strict=True)),
    )


def score_records(parts: ScoreParts, number: Int[torch.Tensor, " node"]) -> tuple[AttentionScores, QKEdges]:
    """As they are stored; `number` gives each node that the pairs need its place in the prompt's list."""
    layer, head, query, key = (column.numpy(force=True) for column in parts.looks.T)
    of = parts.of.numpy(force=True)
    values = (column.numpy(force=True) for column in (parts.score, parts.pattern, parts.unstored))
    scores = AttentionScores(layer, head, query, key, *values)
    edges = QKEdges(
        source=number[parts.key_node].numpy(force=True),
        target=number[parts.query_node].numpy(force=True),
        layer=layer[of],
        head=head[of],
        score=parts.qk.numpy(force=True),
        lift=parts.lift.numpy(force=True),
    )
    return scores, edges


def _writers(model: ReplacementModel, top: Int[torch.Tensor, " pos"]) -> Iterator[_Writers]:
    """From the embeddings upward, what is written at each position below the attention of its `top` layer."""

    def one_each(key: tuple[Kind, int, str], at: torch.Tensor, direction: torch.Tensor, of: torch.Tensor) -> _Writers:
        return _Writers(key, at, at, direction, of, direction.new_ones(len(at)))

    at = (top >= 0).nonzero()[:, 0]
    yield one_each((Kind.EMBEDDING, -1, ""), at, model.trace.embed[at], _each(at))
    yield one_each((Kind.POSITION, -1, ""), at, model.trace.pos_embed[at], _each(at))
    for layer in range(int(top.max())):
        at = (top > layer).nonzero()[:, 0]
        for kind, name in ((Kind.ATTN, "attn"), (Kind.MLP, "mlp")):
            site = model.site(layer, name)
            place = (top > layer)[site.position].nonzero()[:, 0]
            index, of = site.index[place].unique(return_inverse=True)
            decoder, error, bias = site.dictionary.W_dec[index], site.error[at], site.bias
            if name == "attn":
                decoder, error = model.to_residual(layer, decoder), model.to_residual(layer, error)
                bias = model.attn_bias(layer)
            yield _Writers((kind, layer, name), site.position[place], place, decoder, of, site.amplitude[place])
            yield one_each((Kind.ERROR, layer, name), at, error, _each(at))
            alike = site.norm is None
            yield one_each(
                (Kind.BIAS, layer, name),
                at,
                bias[:1] if alike else bias[at],
                torch.zeros_like(at) if alike else _each(at),
            )


def _each(of: Int[torch.Tensor, " n"]) -> Int[torch.Tensor, " n"]:
    """0, 1, 2 and so on, as many as there are."""
    return torch.arange(len(of), device=of.device)


def _layer(
    model: ReplacementModel, nodes: ScoreNodes, layer: int, looks: Int[torch.Tensor, "n 3"]
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"], tuple[torch.Tensor, ...]]:
    """(score, unstored) of the looks [head, query, key] of one layer, and the last five fields of ScoreParts."""
    trace, weights, sigma = model.trace, model.weights, model.trace.sigma_pre[layer]
    scale = weights.attn_scale[layer]
    W_Q, b_Q = weights.W_Q[layer] * scale, weights.b_Q[layer] * scale
    W_K, b_K = weights.W_K[layer], weights.b_K[layer]
    head, query, key = looks.T
    stream = centre(trace.resid_pre[layer]) / sigma[:, None]
    whole_q = torch.einsum("td,hde->hte", stream, W_Q) + b_Q[:, None]
    whole_k = torch.einsum("td,hde->hte", stream, W_K) + b_K[:, None]
    score = (whole_q[head, query].double() * whole_k[head, key].double()).sum(1)
    towards = whole_k[head, key] - (trace.pattern[layer] @ whole_k)[head, query]

    q = _side(nodes, nodes.bias[layer, 0], nodes.below[layer], head, query, W_Q, b_Q, sigma)
    k = _side(nodes, nodes.bias[layer, 1], nodes.below[layer], head, key, W_K, b_K, sigma)
    pairs = _stored(q, k, _strongest(q, k), _lifted(q, k, towards))
    qk, lift = pairs.qk.double(), _lifts(q, towards, pairs.look, pairs.query).double()
    # What open paths bring to a token is in no node there, but in the score.
    total = score if model.open_below(layer) else (q.total[q.of] * k.total[k.of]).sum(1)
    unstored = total.index_add(0, pairs.look, qk, alpha=-1)
    query_node, key_node = q.number[q.of[pairs.look], pairs.query], k.number[k.of[pairs.look], pairs.key]
    return score, unstored, (pairs.look, query_node, key_node, qk, lift)


def _side(
    nodes: ScoreNodes,
    bias: Int[torch.Tensor, ""],
    below: Int[torch.Tensor, " pos"],
    head: Int[torch.Tensor, " look"],
    position: Int[torch.Tensor, " look"],
    W: Float[torch.Tensor, "head d_model d_head"],
    b: Float[torch.Tensor, "head d_head"],
    sigma: Float[torch.Tensor, " pos"],
) -> _Side:
    """One side of a layer, whose bias nodes are numbered from `bias`; `below` counts the nodes of a position."""
    ends, of = (head * len(below) + position).unique(return_inverse=True)
    heads, head = (ends // len(below)).unique(return_inverse=True)
    at, end = (ends % len(below)).unique(return_inverse=True)
    counts, slot = below[at], torch.arange(1 + int(below[at].max()), device=below.device)
    number = nodes.first[at, None] + slot - 1
    number[:, 0] = bias + at
    taken = (slot > 0) & (slot <= counts[:, None])
    node = number[taken]
    used, row_of = nodes.of[node].unique(return_inverse=True)
    scale = (slot == 0).to(W.dtype).repeat(len(at), 1)
    scale[taken] = nodes.value[node] / sigma[nodes.position[node]]
    row = torch.zeros_like(number)
    row[taken] = 1 + row_of

    written = functional.embedding_bag(
        nodes.of[node], nodes.direction, counts.cumsum(0) - counts, mode="sum", per_sample_weights=nodes.value[node]
    )
    centred = (W - W.mean(1, keepdim=True))[heads].transpose(0, 1).flatten(1)
    total = (written / sigma[at, None] @ centred).view(len(at), len(heads), -1)[end, head] + b[heads[head]]
    vector = W.new_empty(1 + len(used), centred.shape[1])
    vector[0] = b[heads].flatten()
    torch.mm(nodes.direction[used], centred, out=vector[1:])
    vector = vector.view(-1, b.shape[1])
    row = row[end] * len(heads) + head[:, None]
    norm, order = (vector.norm(dim=1)[row] * scale[end].abs()).sort(dim=1, descending=True)
    return _Side(
        of=of,
        vector=vector,
        row=row.gather(1, order),
        scale=scale[end].gather(1, order),
        norm=norm,
        number=number[end].gather(1, order),
        total=total.double(),
    )


def _strongest(q: _Side, k: _Side) -> _Pairs:
    """The `STRONGEST` pairs of every look."""
    look = _each(q.of)
    least = _least(torch.bmm(q.longest()[q.of], k.longest()[k.of].mT).flatten(1), STRONGEST)
    n_queries = max(1, int((q.norm[q.of] * k.norm[k.of, :1] >= least[:, None]).sum(1).max()))
    pairs = _reaching(q, k, look, torch.arange(n_queries, device=look.device).expand(len(look), -1), least)
    return pairs[_greatest(pairs.look, pairs.qk, STRONGEST)]


def _lifted(q: _Side, k: _Side, towards: Float[torch.Tensor, "look d_head"]) -> _Pairs:
    """The strongest pair of each of the `LIFTED` query nodes of greatest |lift|, for every look."""
    least = _least(torch.bmm(q.longest()[q.of], towards[:, :, None])[:, :, 0], LIFTED)
    look, slot = (q.norm[q.of] * towards.norm(dim=1)[:, None] >= least[:, None]).nonzero(as_tuple=True)
    lift = _lifts(q, towards, look, slot)
    which = _greatest(look, lift, LIFTED)
    which = which[lift[which].abs() >= NEGLIGIBLE]
    look, slot = look[which], slot[which]
    vector, scale = q.at(look, slot)
    least = _least(torch.bmm(k.longest()[k.of[look]], vector[:, :, None])[:, :, 0] * scale[:, None], 1)
    pairs = _reaching(q, k, look, slot[:, None], least)
    return pairs[_greatest(pairs.look * q.row.shape[1] + pairs.query, pairs.qk, 1)]


def _least(first: Float[torch.Tensor, "row product"], n: int) -> Float[torch.Tensor, " row"]:
    """What a product must reach at least to be among the `n` greatest of its row, of which `first` are some."""
    if first.shape[1] < n:
        return first.new_full((len(first),), NEGLIGIBLE * ROUNDED)
    return first.abs().topk(n, dim=1).values[:, -1].clamp(min=NEGLIGIBLE) * ROUNDED


def _reaching(
    q: _Side,
    k: _Side,
    look: Int[torch.Tensor, " row"],
    query: Int[torch.Tensor, "row slot"],
    least: Float[torch.Tensor, " row"],
) -> _Pairs:
    """All pairs of a row's query slots with |qk| >= `least`; those whose norms allow it are computed."""
    norm = q.norm[q.of[look, None], query].clamp(min=torch.finfo(q.norm.dtype).tiny)
    needed = least / norm.amax(1)
    shortest = k.norm.new_full((len(k.norm),), torch.inf).scatter_reduce_(0, k.of[look], needed, "amin")
    n_keys = int((k.norm >= shortest[:, None]).sum(1).max())
    count = torch.searchsorted(-k.norm[:, :n_keys][k.of[look]], -least[:, None] / norm, right=True).flatten()
    cell = _each(count).repeat_interleave(count)
    key = _each(cell) - (count.cumsum(0) - count)[cell]
    row, query = cell // query.shape[1], query.flatten()[cell]
    look = look[row]
    split = (x.split(PAIRS_AT_ONCE) for x in (look, query, key))
    qk = torch.cat([_products(q, k, *part) for part in zip(*split, strict=True)])
    return _Pairs(look, query, key, qk)[qk.abs() >= least[row]]


def _products(
    q: _Side, k: _Side, look: Int[torch.Tensor, " n"], query: Int[torch.Tensor, " n"], key: Int[torch.Tensor, " n"]
) -> Float[torch.Tensor, " n"]:
    """qk of some pairs."""
    (q_u, a_u), (k_v, a_v) = q.at(look, query), k.at(look, key)
    return (q_u * k_v).sum(1) * (a_u * a_v)


def _lifts(
    q: _Side, towards: Float[torch.Tensor, "look d_head"], look: Int[torch.Tensor, " n"], query: Int[torch.Tensor, " n"]
) -> Float[torch.Tensor, " n"]:
    """What some query slots do towards the keys of their looks."""
    vector, scale = q.at(look, query)
    return (vector * towards.index_select(0, look)).sum(1) * scale


def _greatest(of: Int[torch.Tensor, " n"], x: Float[torch.Tensor, " n"], n: int) -> Int[torch.Tensor, " kept"]:
    """Where the `n` greatest |x| of each group are, group by group from the greatest."""
    order = x.abs().argsort(descending=True)
    order = order[of[order].argsort(stable=True)]
    rank = _each(order) - torch.searchsorted(of[order], of[order])
    return order[rank < n]


def _stored(q: _Side, k: _Side, strongest: _Pairs, lifted: _Pairs) -> _Pairs:
    """Both, each pair once, without what is negligible."""

    def cell(pairs: _Pairs) -> Int[torch.Tensor, " pair"]:
        return (pairs.look * q.row.shape[1] + pairs.query) * k.row.shape[1] + pairs.key

    new = ~torch.isin(cell(lifted), cell(strongest))
    pairs = _Pairs(
        *(torch.cat([a, b[new]]) for a, b in zip(vars(strongest).values(), vars(lifted).values(), strict=True))
    )
    return pairs[(pairs.qk.abs() >= NEGLIGIBLE) & (pairs.qk != 0)]
