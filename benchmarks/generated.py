"""A store of any size made up from a seed, with the degree skew of a real one, and the fastest way to load it.

Of every 500 OV edges one prompt is made: 16 tokens, 130 activations of 98,304 features (12 layers, both sites) whose
popularity falls about as 1 / rank, embeddings, errors and a logit, 100 DIRECT edges, 10 attention scores with their QK
edges, 210 firings with their spans, and two circuits of about 30 nodes. Edges run upward in layers and forward in
positions (DIRECT at one position), and prefer early positions and a few targets, so that in- and out-degrees are as
skewed as the popularity of features. FEEDS is what a scan of the edges gives, and TaskPart what one of the circuits
gives. Virtual weights, which no prompt adds to, are the same in every store. Everything is columns of numbers until it
is loaded, with six decimals at most: no format on the way to an engine rounds them.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import compute, csv

from atlas.schema import prepare
from atlas.store import connect
from atlas.taskparts import SHARE_LOGS, Count
from tests import neo4j_server

EDGES_PER_PROMPT = 500
N_LAYERS, N_HEADS, D_SAE, N_TOKENS = 12, 12, 4096, 16
N_ACTIVE, N_ERRORS, N_DIRECT, N_MORE_FIRINGS, N_MEMBERS, N_SCORES, N_QK = 130, 8, 100, 80, 45, 10, 30
N_WIRES = 5  # into each feature
TASKS = ["capitals", "states", "greater_than", "quotes", "plurals", "names"]
ROWS = 100_000  # at a time on their way into an engine
_INTEGERS = ("position", "layer", "head", "index", "n_tokens", "n_nodes", "n_edges", "n_prompts", "query", "key")
_INTEGERS += ("start", "end", "length", "rank", "token_id", "log2_prompts", "log2_circuits", "log2_share")
_INTEGERS += ("n_circuits", "n_prompts_as_root", "n_shares")
_STRINGS = ("id", "prompt", "name", "site", "text", "task", "rule", "via", "label", "part", "source", "target")
_TYPES = dict.fromkeys(_INTEGERS, "int") | dict.fromkeys(_STRINGS, "string")
_TYPES |= {"complete": "boolean", "positions": "int[]", "values": "double[]", "rules": "string[]"}
_TYPES |= {f"{name}_by_rule": _TYPES.get(name, "double") + "[]" for name in Count._fields}


@dataclass(frozen=True)
class Table:
    """Rows of one kind of node (`labels`, the key label first) or of relationship (`name`).

    A node has its number among those of its key label in `#`; a relationship's `source` and `target` are such
    numbers, among the key labels `ends`.
    """

    name: str
    rows: pd.DataFrame
    labels: str = ""
    ends: tuple[str, str] = ("", "")


def generate(n_edges: int, seed: int = 0) -> list[Table]:
    """All tables of a store with about `n_edges` OV edges, nodes first."""
    rng = np.random.default_rng(seed)
    n_prompts = n_edges // EDGES_PER_PROMPT
    prompts = pd.Series([f"{i:016x}" for i in range(n_prompts)], dtype=object).to_numpy()
    nodes = _nodes(n_prompts, rng)
    ov = _ov(nodes, n_prompts, rng)
    direct = _direct(nodes, n_prompts, rng)
    firings = _firings(nodes, n_prompts, rng)
    features = _features(rng)
    features["n_prompts"] = np.bincount(_pairs(firings)[0], minlength=len(features))
    # What draws, in the order in which it always drew: a seed gives one store.
    texts, circuits = _prompt_tables(prompts, rng), _circuit_tables(nodes, ov, prompts, rng)
    scores = _score_tables(nodes, ov, prompts, rng)
    rows = {table.name: table.rows for table in (*texts, *circuits)}
    return [
        *texts,
        Table("Feature", features, "Feature"),
        *_node_tables(nodes, prompts),
        *_firing_tables(firings, prompts, features["id"].to_numpy()),
        Table("OV", _numbered(ov, ["layer", "head", "weight", "pattern"]), ends=("CircuitNode", "CircuitNode")),
        Table("DIRECT", _numbered(direct, ["weight"]), ends=("CircuitNode", "CircuitNode")),
        *circuits,
        *scores,
        *_feeds_tables(nodes, ov, direct),
        *_task_tables(nodes, {"OV": ov, "DIRECT": direct}, rows, features["id"].to_numpy()),
        *_wire_tables(np.random.default_rng(seed)),
    ]


def _n_features() -> int:
    return 2 * N_LAYERS * D_SAE


def _popular(rng: np.random.Generator, n: int) -> np.ndarray:
    """Feature indices whose frequency falls a little faster than 1 / rank."""
    return np.minimum((D_SAE ** rng.uniform(0, 1, n) ** 2).astype(np.int64), D_SAE) - 1


def _decimals(values: np.ndarray) -> np.ndarray:
    return np.round(values, 6)


def _numbered(edges: pd.DataFrame, keep: list[str]) -> pd.DataFrame:
    return edges.rename(columns={"s": "source", "t": "target"})[["source", "target", *keep]]


def _feature_number(layer: np.ndarray, mlp: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (2 * layer + mlp) * D_SAE + index


def _features(rng: np.random.Generator) -> pd.DataFrame:
    number = np.arange(_n_features())
    place, index = number // D_SAE, number % D_SAE
    rows = pd.DataFrame({"#": number, "layer": place // 2, "site": np.where(place % 2, "mlp", "attn"), "index": index})
    rows["id"] = "big/" + rows["layer"].astype(str) + "/" + rows["site"] + "/" + rows["index"].astype(str)
    rows["label"] = [f"{TASKS[i]} {j}" for i, j in zip(rng.integers(0, len(TASKS), len(rows)), index, strict=True)]
    return rows


def _prompt_tables(prompts: np.ndarray, rng: np.random.Generator) -> list[Table]:
    n = len(prompts)
    rows = pd.DataFrame({"#": np.arange(n), "id": prompts, "n_tokens": N_TOKENS, "complete": True})
    rows["text"] = "".join(f" t{i}" for i in range(1, N_TOKENS))
    rows["task"] = np.array(TASKS, dtype=object)[rng.permutation(n) % len(TASKS)]
    tokens = pd.DataFrame({"#": np.arange(n * N_TOKENS), "position": np.tile(np.arange(N_TOKENS), n)})
    tokens["token_id"] = tokens["position"]
    tokens["prompt"] = np.repeat(prompts, N_TOKENS)
    tokens["id"] = tokens["prompt"] + "/" + tokens["position"].astype(str)
    tokens["text"] = " t" + tokens["position"].astype(str)
    has = pd.DataFrame({"source": np.repeat(np.arange(n), N_TOKENS), "target": tokens["#"]})
    following = pd.DataFrame({"source": tokens["#"], "target": tokens["#"] + 1})[tokens["position"] < N_TOKENS - 1]
    return [
        Table("Prompt", rows, "Prompt"),
        Table("Token", tokens, "Token"),
        Table("HAS_TOKEN", has, ends=("Prompt", "Token")),
        Table("NEXT", following, ends=("Token", "Token")),
    ]


KINDS = ["Attn", "MLP", "Embedding", "Error", "Logit"]
ATTN, MLP, EMBEDDING, ERROR, LOGIT = range(5)


def _nodes(n_prompts: int, rng: np.random.Generator) -> pd.DataFrame:
    """Nodes of all prompts by prompt, position and `rank`, the order in which the model computes them."""
    n = n_prompts * N_ACTIVE
    active = pd.DataFrame({"p": np.repeat(np.arange(n_prompts), N_ACTIVE), "kind": rng.integers(0, 2, n)})
    active["position"], active["layer"] = rng.integers(1, N_TOKENS, n), rng.integers(0, N_LAYERS, n)
    active["mlp"], active["index"] = active["kind"], _popular(rng, n)
    m = n_prompts * N_ERRORS
    errors = pd.DataFrame({"p": np.repeat(np.arange(n_prompts), N_ERRORS), "mlp": rng.integers(0, 2, m)})
    errors["position"], errors["layer"] = rng.integers(1, N_TOKENS, m), rng.integers(0, N_LAYERS, m)
    tokens = pd.DataFrame({"p": np.repeat(np.arange(n_prompts), N_TOKENS - 1), "layer": -1})
    tokens["position"] = np.tile(np.arange(1, N_TOKENS), n_prompts)
    logits = pd.DataFrame({"p": np.arange(n_prompts), "layer": N_LAYERS, "position": N_TOKENS - 1})
    others = [tokens.assign(kind=EMBEDDING), errors.assign(kind=ERROR), logits.assign(kind=LOGIT)]
    rows = pd.concat([active, *others]).fillna(0).astype(np.int64)
    rows["rank"] = 2 * rows["layer"] + rows["mlp"]
    key = np.zeros(len(rows), np.int64)
    sizes = {"p": n_prompts, "position": N_TOKENS, "rank": 40, "kind": len(KINDS), "index": D_SAE}
    for name, size in sizes.items():
        key = key * size + rows[name].to_numpy() + (2 if name == "rank" else 0)
    _, kept = np.unique(key, return_index=True)
    rows = rows.iloc[kept].reset_index(drop=True)
    fires = rows["kind"].to_numpy() <= MLP
    reads = fires | (rows["kind"].to_numpy() == LOGIT)
    value = _decimals(rng.uniform(0.5, 9, len(rows)))
    rows["value"], rows["pre_activation"] = np.where(fires, value, np.nan), np.where(reads, value, np.nan)
    numbers = _feature_number(rows["layer"].to_numpy(), rows["mlp"].to_numpy(), rows["index"].to_numpy())
    rows["feature"] = np.where(fires, numbers, -1)
    return rows


def _node_tables(nodes: pd.DataFrame, prompts: np.ndarray) -> list[Table]:
    rows = nodes[["layer", "position", "value", "pre_activation"]].copy()
    rows["#"] = np.arange(len(rows))
    rows["prompt"] = prompts[nodes["p"]]
    rows["site"] = np.where(nodes["mlp"] == 1, "mlp", "attn")
    place = rows["prompt"] + "/" + rows["position"].astype(str)
    layer, index = rows["layer"].astype(str), nodes["index"].astype(str)
    tables: list[Table] = []
    for kind, name in enumerate(KINDS):
        of_kind = (nodes["kind"] == kind).to_numpy()
        part = rows[of_kind].copy()
        at, in_layer, site = place[of_kind], layer[of_kind], part["site"]
        if kind <= MLP:
            part["id"] = at + "/" + in_layer + "/" + site + "/" + index[of_kind]
            part["name"] = "L" + in_layer + " " + site + " " + index[of_kind]
            part["constant"] = part["unstored"] = 0.0
        elif kind == ERROR:
            part["id"], part["name"] = (
                at + "/" + in_layer + "/" + site + "/error",
                "L" + in_layer + " " + site + " error",
            )
        elif kind == EMBEDDING:
            part["id"], part["name"] = at + "/embedding", "embedding @ t" + part["position"].astype(str)
        else:
            part["id"], part["name"] = at + "/logit/7", "logit of t7"
        empty = [column for column in part.columns if part[column].isna().all()]
        labels = f"CircuitNode;Activation;{name}" if kind <= MLP else f"CircuitNode;{name}"
        unused = [*empty, "site"] if kind in (EMBEDDING, LOGIT) else empty
        tables.append(Table(name, part.drop(columns=unused), labels))
    of = pd.DataFrame({"source": rows["#"], "target": nodes["feature"]})[nodes["feature"] >= 0]
    at_token = pd.DataFrame({"source": rows["#"], "target": nodes["p"] * N_TOKENS + nodes["position"]})
    return [
        *tables,
        Table("OF", of, ends=("CircuitNode", "Feature")),
        Table("AT", at_token, ends=("CircuitNode", "Token")),
    ]


def _unique(draw: Callable[[], np.ndarray], n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` different ones of the keys that `draw` gives, in order."""
    keys = np.unique(draw())
    while len(keys) < n:
        keys = np.union1d(keys, draw())
    return np.sort(rng.choice(keys, n, replace=False, shuffle=False))


def _targets(nodes: pd.DataFrame, kinds: list[int], n_prompts: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` nodes of these kinds from every prompt, some of them far more often than others."""
    of_kind = np.flatnonzero(nodes["kind"].isin(kinds))
    p = nodes["p"].to_numpy()[of_kind]
    of_kind = of_kind[np.lexsort((rng.uniform(size=len(p)), p))]
    count = np.bincount(p, minlength=n_prompts)
    first = np.cumsum(count) - count
    p = np.repeat(np.arange(n_prompts), n)
    return of_kind[first[p] + (count[p] * rng.beta(0.8, 1.2, len(p))).astype(np.int64)]


def _ov(nodes: pd.DataFrame, n_prompts: int, rng: np.random.Generator) -> pd.DataFrame:
    p, position, rank = (nodes[name].to_numpy() for name in ("p", "position", "rank"))
    first = np.searchsorted(p, np.arange(n_prompts))
    end = np.searchsorted(p * N_TOKENS + position, p * N_TOKENS + position, side="right")

    def draw() -> np.ndarray:
        t = _targets(nodes, [ATTN], n_prompts, EDGES_PER_PROMPT, rng)
        start = first[p[t]]
        s = start + ((end[t] - start) * rng.beta(0.6, 1.2, len(t))).astype(np.int64)
        key = (t * 1024 + s - start) * N_HEADS + rng.integers(0, N_HEADS, len(t))
        return key[rank[s] < rank[t]]

    key = _unique(draw, n_prompts * EDGES_PER_PROMPT, rng)
    t = key // N_HEADS // 1024
    rows = pd.DataFrame({"s": first[p[t]] + key // N_HEADS % 1024, "t": t, "head": key % N_HEADS})
    rows["layer"] = nodes["layer"].to_numpy()[t]
    rows["weight"] = _decimals(rng.normal(0, 1, len(rows)))
    rows["pattern"] = _decimals(rng.uniform(0, 1, len(rows)))
    return rows


def _direct(nodes: pd.DataFrame, n_prompts: int, rng: np.random.Generator) -> pd.DataFrame:
    rank = nodes["rank"].to_numpy()
    place = nodes["p"].to_numpy() * N_TOKENS + nodes["position"].to_numpy()
    first = np.searchsorted(place, place)

    def draw() -> np.ndarray:
        t = _targets(nodes, [MLP, LOGIT], n_prompts, N_DIRECT, rng)
        s = first[t] + ((t - first[t]) * rng.uniform(0, 1, len(t))).astype(np.int64)
        return (t * 1024 + t - s)[rank[s] < rank[t]]

    key = _unique(draw, n_prompts * N_DIRECT, rng)
    t = key // 1024
    return pd.DataFrame({"s": t - key % 1024, "t": t, "weight": _decimals(rng.normal(0, 1, len(t)))})


def _firings(nodes: pd.DataFrame, n_prompts: int, rng: np.random.Generator) -> pd.DataFrame:
    """Every activation, and more that are in no circuit: prompt, feature, position and value, in this order."""
    active = nodes.loc[nodes["feature"] >= 0, ["p", "feature", "position", "value"]]
    n = n_prompts * N_MORE_FIRINGS
    more = pd.DataFrame({"p": np.repeat(np.arange(n_prompts), N_MORE_FIRINGS)})
    more["feature"] = _feature_number(rng.integers(0, N_LAYERS, n), rng.integers(0, 2, n), _popular(rng, n))
    more["position"], more["value"] = rng.integers(1, N_TOKENS, n), _decimals(rng.uniform(0.5, 9, n))
    rows = pd.concat([active, more], ignore_index=True)
    key = (rows["p"].to_numpy() * _n_features() + rows["feature"].to_numpy()) * N_TOKENS + rows["position"].to_numpy()
    _, kept = np.unique(key, return_index=True)
    return rows.iloc[kept].reset_index(drop=True)


def _pairs(firings: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The feature of every pair of a prompt and a feature that fires in it, and where the pair's firings begin."""
    pair = firings["p"].to_numpy() * _n_features() + firings["feature"].to_numpy()
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    return firings["feature"].to_numpy()[first], first


def _firing_tables(firings: pd.DataFrame, prompts: np.ndarray, features: np.ndarray) -> list[Table]:
    p, feature, position, value = (firings[name].to_numpy() for name in ("p", "feature", "position", "value"))
    fires, first = _pairs(firings)
    rows = pd.DataFrame({"source": fires, "target": p[first], "max": np.maximum.reduceat(value, first)})
    rows["positions"] = np.split(position, first[1:])
    rows["values"] = np.split(value, first[1:])
    place = (p * _n_features() + feature) * N_TOKENS + position
    begin = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    length = np.diff(begin, append=len(place))
    mean = _decimals(np.add.reduceat(value, begin) / length)
    long = length > 1
    begin, length = begin[long], length[long]
    spans = pd.DataFrame({"#": np.arange(len(begin)), "prompt": prompts[p[begin]], "start": position[begin]})
    spans["end"], spans["length"], spans["mean"] = spans["start"] + length - 1, length, mean[long]
    spans["id"] = spans["prompt"] + "/" + features[feature[begin]] + "/"
    spans["id"] += spans["start"].astype(str) + "-" + spans["end"].astype(str)
    texts = [["".join(f" t{k}" for k in range(i, j)) for j in range(N_TOKENS + 1)] for i in range(N_TOKENS)]
    spans["text"] = [texts[i][j + 1] for i, j in zip(spans["start"], spans["end"], strict=True)]
    return [
        Table("FIRES_ON", rows, ends=("Feature", "Prompt")),
        Table("Span", spans, "Span"),
        Table("HAS_SPAN", pd.DataFrame({"source": p[begin], "target": spans["#"]}), ends=("Prompt", "Span")),
        Table("SPAN_OF", pd.DataFrame({"source": spans["#"], "target": feature[begin]}), ends=("Span", "Feature")),
    ]


def _circuit_tables(
    nodes: pd.DataFrame, ov: pd.DataFrame, prompts: np.ndarray, rng: np.random.Generator
) -> list[Table]:
    """Of each prompt two circuits: its nodes with most OV edges as roots, early nodes as members as a rule."""
    p, n_prompts = nodes["p"].to_numpy(), len(prompts)
    count = np.bincount(p, minlength=n_prompts)
    first = np.cumsum(count) - count
    degree = np.bincount(ov["t"], minlength=len(nodes))
    order = np.lexsort((-degree, p))
    roots = np.concatenate([order[first], order[first + 1]])
    c = np.repeat(np.arange(len(roots)), N_MEMBERS)
    of = p[roots][c]
    n = first[of] + (count[of] * rng.beta(0.6, 1.2, len(c))).astype(np.int64)
    pair = np.unique(np.concatenate([c * len(nodes) + n, np.arange(len(roots)) * len(nodes) + roots]))
    members = pd.DataFrame({"source": pair // len(nodes), "target": pair % len(nodes)})
    members["attribution"] = _decimals(rng.normal(0, 1, len(members)))
    site, layer = np.where(nodes["mlp"] == 1, "mlp", "attn")[roots], nodes["layer"].to_numpy()[roots].astype(str)
    place = prompts[p[roots]] + "/" + nodes["position"].to_numpy()[roots].astype(str).astype(object)
    rows = pd.DataFrame({"#": np.arange(len(roots)), "prompt": prompts[p[roots]], "rule": "relative"})
    rows["id"] = place + "/" + layer + "/" + site + "/" + nodes["index"].to_numpy()[roots].astype(str) + "/relative"
    rows["threshold"], rows["root_value"] = 0.02, nodes["pre_activation"].to_numpy()[roots]
    rows["n_nodes"], rows["n_edges"] = np.bincount(members["source"]), 60
    rows["faithfulness"] = _decimals(rng.uniform(0, 1, len(rows)))
    rows["completeness"], rows["error_share"], rows["pruned_share"] = 0.7, 0.2, 0.1
    link = pd.DataFrame({"source": p[roots], "target": rows["#"]})
    return [
        Table("Circuit", rows, "Circuit"),
        Table("HAS_CIRCUIT", link, ends=("Prompt", "Circuit")),
        Table("ROOT", pd.DataFrame({"source": rows["#"], "target": roots}), ends=("Circuit", "CircuitNode")),
        Table("INCLUDES", members, ends=("Circuit", "CircuitNode")),
    ]


def _score_tables(nodes: pd.DataFrame, ov: pd.DataFrame, prompts: np.ndarray, rng: np.random.Generator) -> list[Table]:
    """Scores of some of the (head, query, key) that OV edges go through, made of the nodes at both tokens."""
    p, position, rank = (nodes[name].to_numpy() for name in ("p", "position", "rank"))
    some = rng.choice(len(ov), len(prompts) * N_SCORES, replace=False)
    s, t, layer, head = (ov[name].to_numpy()[some] for name in ("s", "t", "layer", "head"))
    key = (((p[t] * N_TOKENS + position[t]) * N_TOKENS + position[s]) * N_LAYERS + layer) * N_HEADS + head
    _, kept = np.unique(key, return_index=True)
    s, t, layer, head = (column[kept] for column in (s, t, layer, head))
    rows = pd.DataFrame({"#": np.arange(len(s)), "prompt": prompts[p[t]], "layer": layer, "head": head})
    rows["query"], rows["key"] = position[t], position[s]
    rows["score"], rows["pattern"] = _decimals(rng.normal(0, 4, len(rows))), _decimals(rng.uniform(0, 1, len(rows)))
    rows["unstored"] = 0.0
    place = p * N_TOKENS + position
    texts = [rows[name].astype(str) for name in ("layer", "head", "query", "key")]
    rows["id"] = rows["prompt"] + "/" + texts[0] + "." + texts[1] + "/" + texts[2] + "-" + texts[3]

    def drawn(at: np.ndarray) -> np.ndarray:
        first, end = np.searchsorted(place, at), np.searchsorted(place, at, side="right")
        return first + ((end - first) * rng.uniform(0, 1, len(at))).astype(np.int64)

    a = np.repeat(np.arange(len(rows)), N_QK)
    u, v = drawn(place[t][a]), drawn(place[s][a])
    below = (rank[u] < 2 * layer[a]) & (rank[v] < 2 * layer[a])
    pair = np.unique(
        (a * 1024 + u - np.searchsorted(place, place[u]))[below] * 1024 + (v - np.searchsorted(place, place[v]))[below]
    )
    a = pair // 1024 // 1024
    u = np.searchsorted(place, place[t][a]) + pair // 1024 % 1024
    v = np.searchsorted(place, place[s][a]) + pair % 1024
    qk = pd.DataFrame({"source": v, "target": u, "layer": layer[a], "head": head[a]})
    qk["score"], qk["lift"] = _decimals(rng.normal(0, 1, len(qk))), _decimals(rng.normal(0, 1, len(qk)))
    return [
        Table("AttentionScore", rows, "AttentionScore"),
        Table("QUERY", pd.DataFrame({"source": rows["#"], "target": place[t]}), ends=("AttentionScore", "Token")),
        Table("KEY", pd.DataFrame({"source": rows["#"], "target": place[s]}), ends=("AttentionScore", "Token")),
        Table("QK", qk, ends=("CircuitNode", "CircuitNode")),
    ]


def _feeds_tables(nodes: pd.DataFrame, ov: pd.DataFrame, direct: pd.DataFrame) -> list[Table]:
    tables: list[Table] = []
    for via, edges in (("OV", ov), ("DIRECT", direct)):
        feeds = _feeds(nodes, edges)
        feeds["via"] = via
        if via == "OV":
            feeds["layer"] = feeds["target"] // (2 * D_SAE)
        else:
            feeds = feeds.drop(columns="head")
        tables.append(Table("FEEDS", feeds, ends=("Feature", "Feature")))
    return tables


def _feeds(nodes: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    feature, p = nodes["feature"].to_numpy(), nodes["p"].to_numpy()
    s, t = edges["s"].to_numpy(), edges["t"].to_numpy()
    known = (feature[s] >= 0) & (feature[t] >= 0)
    s, t, weight = s[known], t[known], edges["weight"].to_numpy()[known]
    head = edges["head"].to_numpy()[known] if "head" in edges else np.zeros(len(s), np.int64)
    key = (feature[s] * _n_features() + feature[t]) * N_HEADS + head
    # By pair and then by prompt: edges lie by prompt already.
    order = np.argsort(key, kind="stable")
    key, p, weight, share = (
        key[order],
        p[t][order],
        weight[order],
        (weight / nodes["pre_activation"].to_numpy()[t])[order],
    )
    new = np.diff(key, prepend=-1) != 0
    first = np.flatnonzero(new)
    rows = pd.DataFrame(
        {"source": key[first] // N_HEADS // _n_features(), "target": key[first] // N_HEADS % _n_features()}
    )
    rows["head"] = key[first] % N_HEADS
    rows["n_prompts"] = np.add.reduceat(new | (np.diff(p, prepend=-1) != 0), first, dtype=np.int64)
    rows["log2_prompts"] = np.log2(rows["n_prompts"]).astype(np.int64)
    rows["n_edges"] = np.diff(first, append=len(key))
    for name, values in (("weight", weight), ("share", share)):
        rows[f"total_{name}"] = np.add.reduceat(values, first)
        rows[f"mean_{name}"] = rows[f"total_{name}"] / rows["n_edges"]
    return rows


def _task_tables(
    nodes: pd.DataFrame, edges: dict[str, pd.DataFrame], of: dict[str, pd.DataFrame], features: np.ndarray
) -> list[Table]:
    """TaskPart, as a scan of the circuits gives it: every prompt has a task, and the second half of the circuits
    belongs to the same prompts, in order, as the first."""
    p, names, name = nodes["p"].to_numpy(), *_names(nodes, features)
    task = pd.Categorical(of["Prompt"]["task"], TASKS).codes.astype(np.int64)
    n_prompts, m = len(task), len(names)
    c, n, attribution = (of["INCLUDES"][column].to_numpy() for column in ("source", "target", "attribution"))
    rows = _counted(task[p[n]] * m + name[n], c, n_prompts, attribution / of["Circuit"]["root_value"].to_numpy()[c])
    rooted = np.unique((task[p] * m + name)[of["ROOT"]["target"]] * n_prompts + p[of["ROOT"]["target"]]) // n_prompts
    rows["n_prompts_as_root"] = np.bincount(np.searchsorted(rows["key"], rooted), minlength=len(rows))
    whole = pd.DataFrame({"n_prompts": np.bincount(task, minlength=len(TASKS)), "key": np.arange(len(TASKS)) * m})
    whole = whole[whole["n_prompts"] > 0].assign(n_shares=0, total_share=0.0, n_prompts_as_root=0)
    whole["n_circuits"] = 2 * whole["n_prompts"]
    parts = [whole.assign(part="circuit"), rows.assign(part="node", source=names[rows["key"] % m])]
    for via, found in edges.items():
        s, t, weight = (found[column].to_numpy() for column in ("s", "t", "weight"))
        head = found["head"].to_numpy() if via == "OV" else np.zeros(len(s), np.int64)
        share = weight / nodes["pre_activation"].to_numpy()[t]
        of_circuits: list[np.ndarray] = []
        for half in range(2):
            inside = np.zeros(len(nodes), bool)
            inside[n[c // n_prompts == half]] = True
            of_circuits.append(np.flatnonzero(inside[s] & inside[t]))
        e, c_of = np.concatenate(of_circuits), np.repeat([0, n_prompts], [len(kept) for kept in of_circuits])
        key = ((name[s] * m + name[t]) * N_HEADS + head + task[p[t]] * m * m * N_HEADS)[e]
        rows = _counted(key, c_of + p[t[e]], n_prompts, share[e]).assign(part="edge", n_prompts_as_root=0, via=via)
        key = rows["key"].to_numpy()
        rows["source"], rows["target"] = names[key // N_HEADS // m % m], names[key // N_HEADS % m]
        if via == "OV":
            rows["layer"], rows["head"] = key // N_HEADS % m // (2 * D_SAE), key % N_HEADS
        parts.append(rows.assign(key=key // (m * N_HEADS)))
    begin = np.cumsum([0, *(len(rows) for rows in parts)])
    return [_task_table(rows, m, start) for rows, start in zip(parts, begin, strict=False)]


def _names(nodes: pd.DataFrame, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What nodes are called where the prompt does not matter, and of every node which of these it is."""
    errors = [f"L{layer} {site} error" for layer in range(N_LAYERS) for site in ("attn", "mlp")]
    others = [*(f"embedding @ t{position}" for position in range(N_TOKENS)), *errors, "logit of t7"]
    kind = nodes["kind"].to_numpy()
    name = np.where(kind == EMBEDDING, nodes["position"], N_TOKENS + nodes["rank"])
    name = len(features) + np.where(kind == LOGIT, len(others) - 1, name)
    return np.concatenate([features, np.array(others, dtype=object)]), np.where(kind <= MLP, nodes["feature"], name)


def _counted(key: np.ndarray, c: np.ndarray, n_prompts: int, share: np.ndarray) -> pd.DataFrame:
    """How many circuits and prompts have each key, of which circuit `c` % n_prompts is the prompt, and the shares."""
    order = np.lexsort((c, c % n_prompts, key))
    key, c = key[order], c[order]
    new = np.diff(key, prepend=-1) != 0
    first = np.flatnonzero(new)
    rows = pd.DataFrame({"key": key[first], "n_shares": np.diff(first, append=len(key))})
    for name, of in (("n_circuits", c), ("n_prompts", c % n_prompts)):
        rows[name] = np.add.reduceat(new | (np.diff(of, prepend=-1) != 0), first, dtype=np.int64)
    rows["total_share"] = np.add.reduceat(share[order], first)
    return rows


def _task_table(rows: pd.DataFrame, n_names: int, start: int) -> Table:
    part = rows["part"].iloc[0]
    task = np.array(TASKS, dtype=object)[rows["key"] // n_names]
    made = rows.drop(columns="key").assign(task=task)
    made["#"] = np.arange(start, start + len(rows))
    if part == "circuit":
        made["id"] = "circuits in " + task
    elif part == "node":
        made["id"] = '"' + made["source"] + '" in ' + task
    else:
        via = "L" + made["layer"].astype(str) + ".H" + made["head"].astype(str) if "head" in made else made["via"]
        made["id"] = '"' + made["source"] + '" -> "' + made["target"] + '" ' + via + " in " + task
    total = made["total_share"].to_numpy()
    made["log2_circuits"] = np.frexp(made["n_circuits"])[1] - 1
    made["log2_share"] = np.where(total == 0, SHARE_LOGS[0], np.clip(np.frexp(total)[1] - 1, *SHARE_LOGS))
    made["rules"] = [["relative"]] * len(made)
    for name in Count._fields:
        made[f"{name}_by_rule"] = [[value] for value in made[name].tolist()]
    return Table("TaskPart", made, "TaskPart")


def _wire_tables(rng: np.random.Generator) -> list[Table]:
    target = np.repeat(np.arange(2 * D_SAE, _n_features()), N_WIRES)  # nothing is wired into the first layer here
    place = target // D_SAE
    source = (place * rng.uniform(0, 1, len(target))).astype(np.int64) * D_SAE + _popular(rng, len(target))
    weight = _decimals(rng.normal(0, 1, len(target)))
    order = np.lexsort((-np.abs(weight), target))
    rows = pd.DataFrame({"source": source, "target": target, "weight": weight[order]})
    rows["rank"] = np.tile(np.arange(1, N_WIRES + 1), len(target) // N_WIRES)
    mlp = place % 2 == 1
    through = rows[~mlp].assign(via="OV", layer=place[~mlp] // 2, head=rng.integers(0, N_HEADS, (~mlp).sum()))
    ends = ("Feature", "Feature")
    return [
        Table("VIRTUAL_WEIGHT", through, ends=ends),
        Table("VIRTUAL_WEIGHT", rows[mlp].assign(via="MLP"), ends=ends),
    ]


def _type(table: Table) -> str:
    return "OF" if table.name == "SPAN_OF" else table.name


def _parts(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    return (rows.iloc[start : start + ROWS] for start in range(0, len(rows), ROWS))


def load_embedded(folder: Path, tables: list[Table]) -> None:
    """Into a new store of the embedded engine, by its own loader and not through Bolt."""
    import arcadedb_embedded  # type: ignore[import-untyped]
    import jpype  # type: ignore[import-untyped]

    with connect(folder) as store:
        prepare(store)
        # The engine makes its types when Cypher first names them, and the loader needs them.
        for labels in (table.labels for table in tables if table.labels):
            store.change(f"CREATE (n:{labels.replace(';', ':')} {{id: '-'}}) DELETE n")
        for name in dict.fromkeys(_type(table) for table in tables if not table.labels):
            store.change(f"CREATE (a:Schema {{id: 'a'}})-[r:{name}]->(b:Schema {{id: 'b'}}) DELETE r, a, b")
    rids: dict[str, np.ndarray] = {}
    with arcadedb_embedded.open_database(str(folder / "databases" / "atlas")) as database:
        vertices, edges = (jpype.JClass(f"com.arcadedb.python.{name}Batcher") for name in ("Vertex", "Edge"))
        for label in dict.fromkeys(table.labels.split(";")[0] for table in tables if table.labels):
            rids[label] = np.empty(sum(len(t.rows) for t in tables if t.labels.split(";")[0] == label), dtype=object)
        with database.graph_batch(batch_size=500_000) as batch:
            java = batch._java_graph_batch
            for table in tables:
                if table.labels:
                    name = "~".join(sorted(table.labels.split(";")))
                    for part in _parts(table.rows):
                        text = part.drop(columns="#").to_json(orient="records", double_precision=15)
                        made = str(vertices.createVerticesJson(java, name, text))
                        rids[table.labels.split(";")[0]][part["#"].to_numpy()] = made.split(";")
                    continue
                a, b = (rids[end] for end in table.ends)
                for part in _parts(table.rows):
                    ends = {"_src": a[part["source"].to_numpy()], "_dst": b[part["target"].to_numpy()]}
                    rows = pd.concat(
                        [pd.DataFrame(ends, index=part.index), part.drop(columns=["source", "target"])], axis=1
                    )
                    edges.newEdgesJson(java, _type(table), rows.to_json(orient="records", double_precision=15))


def load_neo4j(home: Path, tables: list[Table]) -> None:
    """Into the folder of a Neo4j that does not run, by neo4j-admin; the server's `conf` must be there."""
    folder = home / "csv"
    folder.mkdir()
    arguments: list[str] = []
    for number, table in enumerate(tables):
        path = folder / f"{number}.csv"
        _write_csv(table, path)
        what = f"nodes={table.labels.replace(';', ':')}" if table.labels else f"relationships={_type(table)}"
        arguments.append(f"--{what}={path}")
    jars = f"{neo4j_server.CACHE / 'lib'}/*"
    command = [*neo4j_server.JAVA, "-Xmx1g", "-cp", jars, "org.neo4j.server.startup.Neo4jAdminCommand"]
    command += ["database", "import", "full", "neo4j", "--overwrite-destination", "--id-type=integer", *arguments]
    places = {"NEO4J_HOME": str(home), "NEO4J_CONF": str(home / "conf")}
    subprocess.run(command, check=True, cwd=home, env={**os.environ, **places}, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder)


def _write_csv(table: Table, path: Path) -> None:
    columns = {name: _column(name, table.rows[name]) for name in table.rows.columns}
    with path.open("wb") as file:
        file.write((",".join(_header(table, name) for name in columns) + "\n").encode())
        csv.write_csv(pa.table(columns), file, csv.WriteOptions(include_header=False))


def _column(name: str, values: pd.Series) -> pa.Array:
    if not _TYPES.get(name, "").endswith("[]"):
        return pa.array(values, from_pandas=True)
    ends = np.cumsum([len(items) for items in values], dtype=np.int32)
    items = pa.array(np.concatenate(values.to_numpy())).cast(pa.string())
    return compute.binary_join(pa.ListArray.from_arrays(np.concatenate([np.zeros(1, np.int32), ends]), items), ";")


def _header(table: Table, name: str) -> str:
    """A column's heading with its type; numbers are looked up among the nodes of one key label."""
    if name == "#":
        return f":ID({table.labels.split(';')[0]})"
    if name == "source" and not table.labels:
        return f":START_ID({table.ends[0]})"
    if name == "target" and not table.labels:
        return f":END_ID({table.ends[1]})"
    return f"{name}:{_TYPES.get(name, 'double')}"
