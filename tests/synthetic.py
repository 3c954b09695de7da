"""Prompts made up from a seed, without a model: their identities hold, their numbers mean nothing.

Every pre-activation is its constant plus the weights of its incoming edges plus `unstored`; edges run
forward in position and in layer, attention before the MLP of the same layer; a circuit's shares sum to 1.
Features come from a small common stock, so different seeds share some of them. Position 0 is a
beginning-of-text token: it has nodes but no firings. Most scores of heads that carry an OV edge are there, each
the sum of its QK edges and `unstored`; a node may be paired with itself.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from atlas.records import (
    AttentionScores,
    CircuitRecord,
    DictionaryRecord,
    DirectEdges,
    Firings,
    Kind,
    ModelRecord,
    MultiTokenRecord,
    NodeRecord,
    OVEdges,
    PromptRecord,
    QKEdges,
    ReplacementModelRecord,
    RunRecord,
    SharesRecord,
    Spans,
)

N_LAYERS, N_HEADS, D_MODEL, D_SAE = 2, 2, 16, 40
WORDS = [" the", " river", " ran", " north", " past", " old", " stone", " mills", " and", " gardens", ",", "."]
FEATURES = (Kind.MLP, Kind.ATTN)
SIDES = ("q", "k")  # sites of the bias nodes of queries and keys


def synthetic_model() -> ReplacementModelRecord:
    """A model of two layers with an attention and an MLP dictionary in each."""
    model = ModelRecord("toy", "gpt2", N_LAYERS, N_HEADS, D_MODEL, 8, 64, 1000, "0" * 64, "fold_ln")
    dictionaries = tuple(
        DictionaryRecord(
            id=f"toy/{layer}/{site}",
            layer=layer,
            site=site,
            kind="sae" if site == "attn" else "transcoder",
            activation="topk",
            hook_in=f"blocks.{layer}.{site}.in",
            hook_out=f"blocks.{layer}.{site}.out",
            d_in=D_MODEL,
            d_sae=D_SAE,
            source="synthetic",
            revision="1",
            sha256=hashlib.sha256(f"{layer}{site}".encode()).hexdigest(),
            explained_variance=0.9,
            l0=3.0 if site == "mlp" else None,
        )
        for layer in range(N_LAYERS)
        for site in ("attn", "mlp")
    )
    return ReplacementModelRecord("toy-replacement", "toy", model, dictionaries)


def synthetic_run(run_id: str = "run-1") -> RunRecord:
    return RunRecord(run_id, '{"rule": "relative"}', "2026-01-01T00:00:00+00:00", "0.1.0")


@dataclass
class _Edges:
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)


def synthetic_prompt(seed: int, n_tokens: int = 5, n_active: int = 3, density: float = 0.5) -> PromptRecord:
    """A prompt of `n_tokens` tokens, `n_active` active features a site, and a share `density` of all edges."""
    rng = np.random.default_rng(seed)
    token_ids = (0, *(int(i) for i in rng.integers(1, 1000, n_tokens - 1)))
    texts = ("<|endoftext|>", *(WORDS[i % len(WORDS)] for i in token_ids[1:]))
    model = synthetic_model()
    prompt = hashlib.sha256(f"{model.id} {token_ids}".encode()).hexdigest()[:16]
    nodes = _nodes(prompt, token_ids, texts, n_active, rng)
    direct, ov = _edges(nodes, density, rng)
    nodes = _with_values(nodes, direct, ov, rng)
    firings = _firings(nodes, rng)
    pattern = np.round(rng.uniform(0.01, 1, len(ov.weight)), 3)
    scores, qk = _scores(nodes, ov, np.random.default_rng([seed, 1]))
    return PromptRecord(
        id=prompt,
        replacement_model=model.id,
        text="".join(texts[1:]),
        token_ids=token_ids,
        token_texts=texts,
        requests=('{"roots": "default", "rule": "relative", "threshold": 0.01}',),
        firings=firings,
        nodes=tuple(nodes),
        direct=DirectEdges(np.array(direct.source), np.array(direct.target), np.array(direct.weight)),
        ov=OVEdges(
            np.array(ov.source),
            np.array(ov.target),
            np.array(ov.layer),
            np.array(ov.head),
            np.array(ov.weight),
            pattern,
        ),
        circuits=_circuits(prompt, nodes, direct, ov, rng),
        spans=_spans(firings, texts),
        task="synthetic" if seed % 2 else None,
        source="seed.jsonl:1",
        fields={"seed": seed, "answer": " north"},
        scores=scores,
        qk=qk,
    )


def _nodes(
    prompt: str, ids: tuple[int, ...], texts: tuple[str, ...], n_active: int, rng: np.random.Generator
) -> list[NodeRecord]:
    nodes: list[NodeRecord] = []
    for t, token in enumerate(texts):
        at = f"{prompt}/{t}"
        nodes.append(NodeRecord(f"{at}/embedding", Kind.EMBEDDING, t, -1, f"embedding{token}", token_id=ids[t]))
        nodes.append(NodeRecord(f"{at}/position", Kind.POSITION, t, -1, f"position {t}"))
        for layer in range(N_LAYERS):
            for site, kind in (("attn", Kind.ATTN), ("mlp", Kind.MLP)):
                here, name = f"{at}/{layer}/{site}", f"L{layer} {site}"
                for index in sorted(int(i) for i in rng.choice(D_SAE, n_active, replace=False)):
                    nodes.append(
                        NodeRecord(
                            f"{here}/{index}",
                            kind,
                            t,
                            layer,
                            f"{name} {index} @{token}",
                            dictionary=f"toy/{layer}/{site}",
                            index=index,
                            site=site,
                        )
                    )
                norm = float(rng.uniform(0.1, 1))
                nodes.append(
                    NodeRecord(f"{here}/error", Kind.ERROR, t, layer, f"{name} error @{token}", site=site, norm=norm)
                )
                nodes.append(NodeRecord(f"{here}/bias", Kind.BIAS, t, layer, f"{name} bias @{token}", site=site))
            for side in SIDES:
                name = f"L{layer} {side} bias @{token}"
                nodes.append(NodeRecord(f"{at}/{layer}/{side}/bias", Kind.BIAS, t, layer, name, site=side))
    t = len(ids) - 1
    for token, versus in ((" north", None), (" south", None), (" north", " south")):
        root = token if versus is None else f"{token}-{versus}"
        nodes.append(
            NodeRecord(
                f"{prompt}/{t}/logit/{root}",
                Kind.LOGIT,
                t,
                N_LAYERS,
                f"logit {root}",
                token=token,
                versus=versus,
                probability=float(rng.uniform(0, 1)),
            )
        )
    return nodes


def _rank(node: NodeRecord) -> int:
    """The order in which information flows at a position: embeddings, then attention and MLP of each layer."""
    return 2 * node.layer + (node.site == "mlp")


def _edges(nodes: list[NodeRecord], density: float, rng: np.random.Generator) -> tuple[_Edges, _Edges]:
    direct, ov = _Edges(), _Edges()
    for target, v in enumerate(nodes):
        for source, u in enumerate(nodes):
            if u.site in SIDES:
                continue
            if v.kind in (Kind.MLP, Kind.LOGIT) and u.position == v.position and _rank(u) < _rank(v):
                if rng.uniform() < density:
                    direct.source.append(source)
                    direct.target.append(target)
                    direct.weight.append(float(rng.normal()))
            elif v.kind is Kind.ATTN and u.position <= v.position and u.layer < v.layer:
                for head in range(N_HEADS):
                    if rng.uniform() < density:
                        ov.source.append(source)
                        ov.target.append(target)
                        ov.layer.append(v.layer)
                        ov.head.append(head)
                        ov.weight.append(float(rng.normal()))
    return direct, ov


def _scores(nodes: list[NodeRecord], ov: _Edges, rng: np.random.Generator) -> tuple[AttentionScores, QKEdges]:
    """Four of five of the scores behind OV edges, each with up to five pairs of nodes below its layer."""
    ends = zip(ov.layer, ov.head, ov.target, ov.source, strict=True)
    looks = sorted({(layer, head, nodes[t].position, nodes[s].position) for layer, head, t, s in ends})
    looks = [look for look in looks if rng.uniform() < 0.8]
    rows: list[tuple[int, int, int, int, float, float]] = []
    scores: list[tuple[float, float, float]] = []
    for layer, head, query, key in looks:
        at_query, at_key = _below(nodes, layer, query, "q"), _below(nodes, layer, key, "k")
        pairs = {(int(rng.choice(at_query)), int(rng.choice(at_key))) for _ in range(rng.integers(0, 6))}
        if query == key and pairs:
            itself = at_query[2 * layer]  # the token's embedding, or a feature
            pairs.add((itself, itself))
        lift = {u: float(rng.normal()) for u, _ in sorted(pairs)}
        qk = {pair: float(rng.normal()) for pair in sorted(pairs)}
        rows += [(v, u, layer, head, value, lift[u]) for (u, v), value in qk.items()]
        unstored = float(rng.normal(scale=0.1))
        scores.append((sum(qk.values()) + unstored, float(rng.uniform(0.01, 1)), unstored))
    whole = (np.array(column) for column in zip(*looks, strict=True))
    edges = list(zip(*rows, strict=True))
    return (
        AttentionScores(*whole, *(np.array(column) for column in zip(*scores, strict=True))),
        QKEdges(*(np.array(column) for column in edges)),
    )


def _below(nodes: list[NodeRecord], layer: int, position: int, side: str) -> list[int]:
    """The nodes at a position that one side of a layer's heads reads: all below it, and the side's bias."""
    read = [i for i, n in enumerate(nodes) if n.position == position and n.layer < layer and n.site not in SIDES]
    return read + [i for i, n in enumerate(nodes) if (n.position, n.layer, n.site) == (position, layer, side)]


def _with_values(nodes: list[NodeRecord], direct: _Edges, ov: _Edges, rng: np.random.Generator) -> list[NodeRecord]:
    incoming = np.zeros(len(nodes))
    np.add.at(incoming, direct.target, direct.weight)
    np.add.at(incoming, ov.target, ov.weight)
    valued: list[NodeRecord] = []
    for node, total in zip(nodes, incoming, strict=True):
        if node.kind not in (*FEATURES, Kind.LOGIT):
            valued.append(node)
            continue
        unstored = float(rng.normal(scale=0.1))
        constant = float(rng.uniform(0.5, 3)) - float(total) - unstored
        pre = constant + float(total) + unstored
        value = {"logit": pre} if node.kind is Kind.LOGIT else {"value": pre}
        valued.append(node._replace(**value, pre_activation=pre, constant=constant, unstored=unstored))
    return valued


def _firings(nodes: list[NodeRecord], rng: np.random.Generator) -> Firings:
    """Every feature among the nodes, and one more of each dictionary, in no circuit, on the first two tokens."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for node in nodes:
        if node.dictionary is not None and node.index is not None and node.value is not None and node.position > 0:
            found.setdefault((node.dictionary, node.index), {})[node.position] = node.value
    for dictionary in synthetic_model().dictionaries:
        unused = [i for i in range(D_SAE) if (dictionary.id, i) not in found]
        found[dictionary.id, int(rng.choice(unused))] = {t: float(rng.uniform(0.1, 2)) for t in (1, 2)}
    return firings_of(dict(sorted(found.items())))


def firings_of(found: dict[tuple[str, int], dict[int, float]]) -> Firings:
    """Values by position, by dictionary and index, in columns."""
    dictionaries = tuple(dict.fromkeys(dictionary for dictionary, _ in found))
    return Firings(
        dictionaries,
        dictionary=np.array([dictionaries.index(dictionary) for dictionary, _ in found]),
        index=np.array([index for _, index in found]),
        start=np.cumsum([0, *(len(values) for values in found.values())]),
        position=np.array([t for values in found.values() for t in values]),
        value=np.array([value for values in found.values() for value in values.values()]),
    )


def _spans(firings: Firings, texts: tuple[str, ...]) -> Spans:
    """Every stretch of two or more consecutive positions on which a feature fires."""
    spans: list[tuple[int, int, int, str, float]] = []
    for feature in range(len(firings)):
        here = slice(firings.start[feature], firings.start[feature + 1])
        values = dict(zip(firings.position[here].tolist(), firings.value[here].tolist(), strict=True))
        for start in (t for t in values if t - 1 not in values):
            end = next(t for t in range(start, len(texts) + 1) if t + 1 not in values)
            if end > start:
                mean = sum(values[t] for t in range(start, end + 1)) / (end - start + 1)
                spans.append((feature, start, end, "".join(texts[start : end + 1]), mean))
    feature, start, end, text, mean = zip(*spans, strict=True) if spans else ((),) * 5
    whole = (np.array(column, dtype=np.int64) for column in (feature, start, end))
    return Spans(*whole, text=text, mean=np.array(mean, dtype=np.float64))


def synthetic_multitoken(record: PromptRecord) -> MultiTokenRecord:
    """A chain of the two feature circuits of a synthetic prompt, which stand on its last two tokens."""
    first, second = record.circuits[-2:]
    end = len(record.token_ids) - 1
    return MultiTokenRecord(
        id=f"{record.id}/{end - 1}-{end}/chain/relative",
        prompt=record.id,
        form="chain",
        start=end - 1,
        end=end,
        text="".join(record.token_texts[end - 1 :]),
        joins=(first.id, second.id),
        crossing_weight=0.4,
        crossing_leaves=0.1,
        null_n=9,
        shuffled_n=0,
        p_value=0.1,
        q_value=0.2,
        null_mean=0.05,
        null_sd=0.1,
        ablated_to="mean",
        n_ablated=3,
        lost=0.7,
        lost_random=0.1,
    )


def _circuits(
    prompt: str, nodes: list[NodeRecord], direct: _Edges, ov: _Edges, rng: np.random.Generator
) -> tuple[CircuitRecord, ...]:
    pairs = list(zip([*direct.source, *ov.source], [*direct.target, *ov.target], strict=True))
    roots = [i for i, n in enumerate(nodes) if n.kind is Kind.LOGIT]
    roots += list({n.position: i for i, n in enumerate(nodes) if n.kind is Kind.MLP and n.position > 0}.values())[-2:]
    circuits: list[CircuitRecord] = []
    for root in roots:
        members = sorted({root} | {s for s, t in pairs if t == root} | {s for s, _ in pairs if rng.uniform() < 0.1})
        inside = set(members)
        shares = rng.dirichlet([5, 1, 1])
        circuits.append(
            CircuitRecord(
                id=f"{prompt}/{nodes[root].id.removeprefix(prompt + '/')}/relative",
                root=root,
                rule="relative",
                threshold=0.01,
                members=np.array(members),
                attribution=rng.normal(size=len(members)),
                n_edges=sum(s in inside and t in inside for s, t in pairs),
                root_value=float(nodes[root].pre_activation or 0.0),
                completeness=float(shares[0]),
                error_share=float(shares[1]),
                pruned_share=float(shares[2]),
                shares=SharesRecord("mean", 0.9, 0.5, 0.1, -0.2, 1.1, 0.4) if nodes[root].kind is Kind.MLP else None,
            )
        )
    return tuple(circuits)
