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
`unstored` is the sum of all other pairs. It is summed from the pairs, and `score` from the residual stream, so
that score = stored + unstored tests I3. More pairs buy little: on `mini` the median |unstored| over |score| is
29 % with 8 pairs, 25 % with 12, 22 % with 24 and 14 % with 64, of 13,000.

How to call it, once per prompt:

    nodes = score_nodes(replacement, n_layers)           # all nodes below layer `n_layers` - 1
    parts = score_parts(replacement, nodes, looks)       # looks [score, 4]: layer, head, query, key; s <= t, each once
    parts.nodes                                          # numbers (into `nodes`) of the nodes that stored pairs need
    nodes.group[n], nodes.position[n], nodes.place[n]    # what a number stands for: nodes.groups[group] is
                                                         # (kind, layer, site); place is that in the Site's list
    scores, qk = score_records(parts, number)            # number [node]: their places in PromptRecord.nodes
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

from atlas.records import AttentionScores, Kind, QKEdges
from ingest.replacement import ReplacementModel, centre

STRONGEST = 12
LIFTED = 4
NEGLIGIBLE = 0.01
PAIRS_AT_ONCE = 1 << 18
LONGEST = 16  # vectors of either side among which the bound on the strongest pairs is found


@dataclass(frozen=True)
class ScoreNodes:
    """Every node that attention reads, position by position and at each from the embeddings upward.

    Node n is of the kind, layer and site `groups[group[n]]` and stands at `position[n]`; `place[n]` is a feature's
    place in its Site's list, and the position for all others. `write` is a_u w_u. Those below the attention of
    layer l at position t are numbered from `first[t]`, and there are `below[l, t]` of them. The bias nodes of
    queries and keys come after all these: that of layer l, side i (0 query, 1 key) and position t at
    `bias[l, i]` + t; they write nothing.
    """

    groups: tuple[tuple[Kind, int, str], ...]
    group: Int[torch.Tensor, " node"]
    position: Int[torch.Tensor, " node"]
    place: Int[torch.Tensor, " node"]
    write: Float[torch.Tensor, "writer d_model"]
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
class _Pairs:
    """The stored pairs of some scores; `query` and `key` are slots, 0 for the bias."""

    of: Int[torch.Tensor, " pair"]
    query: Int[torch.Tensor, " pair"]
    key: Int[torch.Tensor, " pair"]
    qk: Float[torch.Tensor, " pair"]
    lift: Float[torch.Tensor, " pair"]


@torch.no_grad()
def score_nodes(model: ReplacementModel, n_layers: int) -> ScoreNodes:
    """The nodes that attention reads in the first `n_layers` layers; one more than the last layer of interest."""
    trace = model.trace
    n_pos = len(trace.embed)
    positions = torch.arange(n_pos)
    groups: list[tuple[Kind, int, str]] = [(Kind.EMBEDDING, -1, ""), (Kind.POSITION, -1, "")]
    at, places, writes = [positions, positions], [positions, positions], [trace.embed, trace.pos_embed]
    for layer in range(n_layers - 1):
        for kind, name, site in ((Kind.ATTN, "attn", model.attn[layer]), (Kind.MLP, "mlp", model.mlp[layer])):
            index, each = site.index.unique(return_inverse=True)
            decoder, error, bias = site.dictionary.W_dec[index], site.error, site.bias
            if name == "attn":
                decoder, error = model.to_residual(layer, decoder), model.to_residual(layer, error)
                bias = model.attn_bias(layer)
            groups += [(kind, layer, name), (Kind.ERROR, layer, name), (Kind.BIAS, layer, name)]
            at += [site.position, positions, positions]
            places += [torch.arange(len(site.position)), positions, positions]
            writes += [decoder[each].mul_(site.value[:, None]), error, bias.expand(n_pos, -1)]
    depth = torch.tensor([layer for _, layer, _ in groups])
    group = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(a) for a in at]))
    position = torch.cat(at)
    below = torch.stack([position[depth[group] < layer].bincount(minlength=n_pos) for layer in range(n_layers)])
    order = position.argsort(stable=True)
    write = trace.embed.new_empty(len(order), trace.embed.shape[1])
    for rows, written in zip(order.argsort().split([len(a) for a in at]), writes, strict=True):
        write.index_copy_(0, rows, written)
    counts = position.bincount(minlength=n_pos)
    sides = 2 * n_layers
    return ScoreNodes(
        groups=(*groups, *((Kind.BIAS, layer, side) for layer in range(n_layers) for side in ("q", "k"))),
        group=torch.cat([group[order], len(groups) + torch.arange(sides).repeat_interleave(n_pos)]),
        position=torch.cat([position[order], positions.repeat(sides)]),
        place=torch.cat([torch.cat(places)[order], positions.repeat(sides)]),
        write=write,
        first=counts.cumsum(0) - counts,
        below=below,
        bias=len(order) + n_pos * torch.arange(sides).view(n_layers, 2),
    )


@torch.no_grad()
def score_parts(model: ReplacementModel, nodes: ScoreNodes, looks: Int[torch.Tensor, "score 4"]) -> ScoreParts:
    """Take apart the scores at `looks` [layer, head, query, key], key <= query, each given once."""
    layer, head, query, key = looks.T
    score = torch.zeros(len(looks), dtype=torch.float64)
    unstored = torch.zeros_like(score)
    none = looks[:0, 0]
    found = [_Pairs(none, none, none, score[:0], score[:0])]
    for at in layer.unique().tolist():
        which = (layer == at).nonzero()[:, 0]
        score[which], unstored[which], pairs = _layer(model, nodes, at, looks[which, 1:])
        found += [replace(part, of=which[part.of]) for part in pairs]
    of, query_slot, key_slot, qk, lift = (
        torch.cat(c) for c in zip(*(vars(part).values() for part in found), strict=True)
    )
    return ScoreParts(
        looks=looks,
        score=score,
        pattern=model.trace.pattern[layer, head, query, key].double(),
        unstored=unstored,
        of=of,
        query_node=_number(nodes, nodes.bias[layer[of], 0], query[of], query_slot),
        key_node=_number(nodes, nodes.bias[layer[of], 1], key[of], key_slot),
        qk=qk,
        lift=lift,
    )


def score_records(parts: ScoreParts, number: Int[torch.Tensor, " node"]) -> tuple[AttentionScores, QKEdges]:
    """As they are stored; `number` gives each node that the pairs need its place in the prompt's list."""
    layer, head, query, key = (column.numpy() for column in parts.looks.T)
    of = parts.of.numpy()
    scores = AttentionScores(
        layer, head, query, key, parts.score.numpy(), parts.pattern.numpy(), parts.unstored.numpy()
    )
    edges = QKEdges(
        source=number[parts.key_node].numpy(),
        target=number[parts.query_node].numpy(),
        layer=layer[of],
        head=head[of],
        score=parts.qk.numpy(),
        lift=parts.lift.numpy(),
    )
    return scores, edges


def _layer(
    model: ReplacementModel, nodes: ScoreNodes, layer: int, looks: Int[torch.Tensor, "n 3"]
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"], list[_Pairs]]:
    """(score, unstored) of the looks [head, query, key] of one layer, and their stored pairs."""
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

    queries, of_query = looks[:, [0, 1]].unique(dim=0, return_inverse=True)
    keys, of_key = looks[:, [0, 2]].unique(dim=0, return_inverse=True)
    q = _projected(nodes, layer, queries, W_Q, b_Q, sigma)
    k = _projected(nodes, layer, keys, W_K, b_K, sigma)
    # What open paths bring to a token is in no node there, but in the score.
    summed = (q.double().sum(1)[of_query] * k.double().sum(1)[of_key]).sum(1)
    unstored = score.clone() if model.open_below(layer) else summed
    found: list[_Pairs] = []
    for part, pairs in _strongest(q, k, of_query, of_key):
        lifts = torch.einsum("nud,nd->nu", q[of_query[part]], towards[part])
        found.append(_stored(part, pairs, _lifted(q, k, of_query[part], of_key[part], lifts), lifts))
        unstored.index_add_(0, found[-1].of, found[-1].qk, alpha=-1)
    return score, unstored, found


def _projected(
    nodes: ScoreNodes,
    layer: int,
    at: Int[torch.Tensor, "n 2"],
    W: Float[torch.Tensor, "head d_model d_head"],
    b: Float[torch.Tensor, "head d_head"],
    sigma: Float[torch.Tensor, " pos"],
) -> Float[torch.Tensor, "n slot d_head"]:
    """q_u or k_v of all nodes below `layer` at each (head, position): the bias first, then the nodes, then zeros."""
    head, position = at.T
    counts = nodes.below[layer, position]
    centred = W - W.mean(1, keepdim=True)
    projected = W.new_zeros(len(at), 1 + int(counts.max()), W.shape[2])
    for out, h, first, n in zip(projected, head.tolist(), nodes.first[position].tolist(), counts.tolist(), strict=True):
        torch.mm(nodes.write[first : first + n], centred[h], out=out[1 : n + 1])
    projected /= sigma[position, None, None]
    projected[:, 0] = b[head]
    return projected


def _strongest(
    q: Float[torch.Tensor, "a query_slot d_head"],
    k: Float[torch.Tensor, "b key_slot d_head"],
    of_query: Int[torch.Tensor, " n"],
    of_key: Int[torch.Tensor, " n"],
) -> Iterator[tuple[Int[torch.Tensor, " part"], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Some looks at a time, their `STRONGEST` pairs: (query slot, key slot, qk), [part, pair] each.

    As |qk| <= |q_u| |k_v|, the strongest pairs among the longest vectors say which vectors are too short to be in a
    stronger one: a twentieth of all pairs is left to compute.
    """
    (q_norm, q_order), (k_norm, k_order) = (x.norm(dim=2).sort(dim=1, descending=True) for x in (q, k))

    def products(part: torch.Tensor, n_queries: int, n_keys: int) -> Float[torch.Tensor, "part query key"]:
        a, b = of_query[part, None], of_key[part, None]
        return torch.bmm(q[a, q_order[a[:, 0], :n_queries]], k[b, k_order[b[:, 0], :n_keys]].mT)

    every = torch.arange(len(of_query))
    among = products(every, LONGEST, LONGEST).flatten(1).abs()
    least = among.topk(min(STRONGEST, among.shape[1]), dim=1).values[:, -1:] * (1 - 1e-4)  # norms are rounded
    n_queries = (q_norm[of_query] * k_norm[of_key, :1] >= least).sum(1)
    n_keys = (k_norm[of_key] * q_norm[of_query, :1] >= least).sum(1)
    rest = (n_queries * n_keys).argsort(descending=True)
    while len(rest):
        at_once = max(1, PAIRS_AT_ONCE // int(n_queries[rest[0]] * n_keys[rest[0]]))
        part, rest = rest[:at_once], rest[at_once:]
        pairs = products(part, int(n_queries[part].max()), int(n_keys[part].max()))
        best = pairs.flatten(1).abs().topk(min(STRONGEST, pairs[0].numel()), dim=1).indices
        query, key = best // pairs.shape[2], best % pairs.shape[2]
        qk = pairs.flatten(1).gather(1, best)
        yield part, (q_order[of_query[part]].gather(1, query), k_order[of_key[part]].gather(1, key), qk)


def _lifted(
    q: Float[torch.Tensor, "a query_slot d_head"],
    k: Float[torch.Tensor, "b key_slot d_head"],
    of_query: Int[torch.Tensor, " n"],
    of_key: Int[torch.Tensor, " n"],
    lift: Float[torch.Tensor, "n query"],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The strongest pair of each of the query nodes of greatest |lift|: (query slot, key slot, qk), [n, pair] each."""
    query = lift.abs().topk(min(LIFTED, lift.shape[1]), dim=1).indices
    pairs = torch.bmm(q[of_query[:, None], query], k[of_key].mT)
    key = pairs.abs().argmax(2)
    return query, key, pairs.gather(2, key[:, :, None])[:, :, 0]


def _stored(
    part: Int[torch.Tensor, " n"],
    strongest: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lifted: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lifts: Float[torch.Tensor, "n query"],
) -> _Pairs:
    """Both sets of pairs, each pair once, without what is negligible."""
    double = (lifted[0][:, :, None] == strongest[0][:, None]) & (lifted[1][:, :, None] == strongest[1][:, None])
    worth = (lifts.gather(1, lifted[0]).abs() >= NEGLIGIBLE) & ~double.any(2)
    query, key, qk = (torch.cat(both, dim=1) for both in zip(strongest, lifted, strict=True))
    stored = torch.cat([torch.ones_like(strongest[0], dtype=torch.bool), worth], dim=1)
    stored &= (qk.abs() >= NEGLIGIBLE) & (qk != 0)
    return _Pairs(
        of=part[:, None].expand_as(query)[stored],
        query=query[stored],
        key=key[stored],
        qk=qk[stored].double(),
        lift=lifts.gather(1, query)[stored].double(),
    )


def _number(
    nodes: ScoreNodes, bias: Int[torch.Tensor, " n"], position: Int[torch.Tensor, " n"], slot: Int[torch.Tensor, " n"]
) -> Int[torch.Tensor, " n"]:
    """The numbers of the nodes in some slots, of which the first is the bias."""
    return torch.where(slot == 0, bias + position, nodes.first[position] + slot - 1)
