"""The answers computed in pandas: prompts as tables, and each question asked of those, without a database."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from atlas.records import PromptRecord
from tests.graph import firing_rows

LABELS = {"toy/1/mlp/24": 'a "label" with `ticks` and [bold]brackets[/bold]', "toy/0/attn/11": "stones"}


@dataclass(frozen=True, eq=False)
class Tables:
    """Everything in some prompts: one row per node, edge, membership, circuit, firing and QK pair.

    `firings` has a list of positions, of values, and of all the prompt's `tokens` in each row; `labels` are the
    features' by their ids.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    members: pd.DataFrame
    circuits: pd.DataFrame
    firings: pd.DataFrame
    pairs: pd.DataFrame
    labels: dict[str, str]


def tables(prompts: list[PromptRecord]) -> Tables:
    nodes, edges, members, circuits, firings, pairs = [], [], [], [], [], []
    for p in prompts:
        ids = [n.id for n in p.nodes]
        for n in p.nodes:
            feature = f"{n.dictionary}/{n.index}" if n.dictionary else None
            site, label = n.site, LABELS.get(feature) if feature else None
            row = {"id": n.id, "name": n.name, "kind": str(n.kind), "layer": n.layer, "position": n.position}
            row |= {"feature": feature, "label": label, "site": site, "pre": n.pre_activation, "index": n.index}
            nodes.append(row | {"value": n.value, "token": p.token_texts[n.position], "prompt": p.id, "task": p.task})
        for s, t, w in zip(p.direct.source, p.direct.target, p.direct.weight, strict=True):
            edges.append({"source": ids[s], "target": ids[t], "via": "DIRECT", "weight": w})
        o = p.ov
        for s, t, la, h, w, a in zip(o.source, o.target, o.layer, o.head, o.weight, o.pattern, strict=True):
            row = {"source": ids[s], "target": ids[t], "via": "OV", "weight": w}
            edges.append(row | {"layer": la, "head": h, "pattern": a})
        for c in p.circuits:
            root = p.nodes[c.root]
            row = {"circuit": c.id, "prompt": p.id, "task": p.task, "text": p.text, "root": root.id}
            row |= {"root_name": root.name, "root_kind": str(root.kind), "root_position": root.position}
            row |= {"root_token": p.token_texts[root.position], "rule": c.rule, "threshold": c.threshold}
            row |= {"n_nodes": len(c.members), "n_edges": c.n_edges, "root_value": c.root_value}
            row |= {"completeness": c.completeness, "error_share": c.error_share, "pruned_share": c.pruned_share}
            row |= vars(c.shares) if c.shares else {}
            circuits.append(row)
            for m, a in zip(c.members, c.attribution, strict=True):
                members.append({"circuit": c.id, "node": ids[m], "attribution": a, "is_root": m == c.root})
        for f in firing_rows(p.firings):
            row = {"feature": f.feature, "prompt": p.id, "task": p.task, "tokens": p.token_texts}
            firings.append(row | {"positions": f.positions, "values": f.values})
        scores = {look[:4]: look[4:] for look in zip(*(a.tolist() for a in vars(p.scores).values()), strict=True)}
        for s, t, la, h, qk, lift in zip(*(a.tolist() for a in vars(p.qk).values()), strict=True):
            query, key = p.nodes[t].position, p.nodes[s].position
            row = {"prompt": p.id, "task": p.task, "layer": la, "head": h, "query": query, "key": key}
            row |= dict(zip(("score", "pattern", "unstored"), scores[la, h, query, key], strict=True))
            pairs.append(row | {"key_node": ids[s], "query_node": ids[t], "qk": qk, "lift": lift})
    return Tables(*(pd.DataFrame(rows) for rows in (nodes, edges, members, circuits, firings, pairs)), LABELS)


@cache
def ends(t: Tables) -> pd.DataFrame:
    """Every edge with both its nodes (columns source_* and target_*) and its share."""
    joined = t.edges
    for end in ("source", "target"):
        joined = joined.merge(t.nodes.add_prefix(f"{end}_"), left_on=end, right_on=f"{end}_id", validate="m:1")
    return joined.assign(share=joined["weight"] / joined["target_pre"])


def circuits(t: Tables, prompt=None, feature=None, task=None, rule=None) -> pd.DataFrame:
    found = t.circuits
    if feature is not None:
        of = set(t.nodes.loc[t.nodes["feature"] == feature, "id"])
        found = found[found["circuit"].isin(set(t.members.loc[t.members["node"].isin(of), "circuit"]))]
    for column, value in (("prompt", prompt), ("task", task), ("rule", rule)):
        found = found if value is None else found[found[column] == value]
    return found


def circuit(t: Tables, circuit: str) -> pd.DataFrame:
    given = t.members[t.members["circuit"] == circuit].set_index("node")["attribution"]
    edges = ends(t)
    edges = edges[edges["source"].isin(given.index) & edges["target"].isin(given.index)]
    return edges.assign(source_attribution=edges["source"].map(given), target_attribution=edges["target"].map(given))


def circuit_nodes(t: Tables, circuit: str) -> pd.DataFrame:
    found = t.members[t.members["circuit"] == circuit].merge(t.nodes, left_on="node", right_on="id", validate="1:1")
    return found.rename(columns={"pre": "pre_activation", "is_root": "root"})


def upstream(t: Tables, feature=None, node=None, hops=2, min_share=0.05, via=None) -> pd.DataFrame:
    edges = ends(t)
    edges = edges[edges["share"].abs() >= min_share]
    edges = edges if via is None else edges[edges["via"] == via]
    near = {node} if node else set(t.nodes.loc[t.nodes["feature"] == feature, "id"])
    hop_of: dict[int, int] = {}
    for hop in range(1, hops + 1):
        step = edges[edges["target"].isin(near)]
        for place in step.index:
            hop_of.setdefault(place, hop)
        near = set(step["source"])
    edges = edges.loc[list(hop_of)].assign(hop=list(hop_of.values()))
    keys = ["hop", "source", "source_kind", "source_label", "target", "target_kind", "target_label"]
    keys += ["via", "layer", "head"]
    named = edges.assign(
        source=[_source(row) for row in edges.to_dict("records")],
        target=edges["target_feature"].where(edges["target_feature"].notna(), edges["target_name"]),
    )
    return (
        named.groupby(keys, dropna=False)
        .agg(
            n_prompts=("source_prompt", "nunique"),
            n_edges=("weight", "size"),
            mean_weight=("weight", "mean"),
            mean_share=("share", "mean"),
        )
        .reset_index()
    )


def _source(row: dict) -> str:
    if isinstance(row["source_feature"], str):
        return row["source_feature"]
    if row["source_kind"] == "Embedding":
        return f'embedding of "{row["source_token"]}"'
    if row["source_kind"] == "PositionEmbedding":
        return f"position {row['source_position']}"
    return f"L{row['source_layer']} {row['source_site']} {row['source_kind'].lower()}"


def prompts_of(t: Tables, feature: str, task=None) -> pd.DataFrame:
    rows = []
    for fires in t.firings[t.firings["feature"] == feature].itertuples(index=False):
        if task is not None and fires.task != task:
            continue
        marked = [f"«{text}»" if i in fires.positions else text for i, text in enumerate(fires.tokens)]
        row = {"prompt": fires.prompt, "task": fires.task, "max": max(fires.values), "values": fires.values}
        row |= {"positions": fires.positions, "n_positions": len(fires.positions)}
        row |= {"tokens": [fires.tokens[i] for i in fires.positions], "text": "".join(marked[1:])}
        rows.append(row)
    return pd.DataFrame(rows)


def edges_between(t: Tables, a: str, b: str, via=None, head=None) -> pd.DataFrame:
    found = ends(t)
    found = found[(found["source_feature"] == a) & (found["target_feature"] == b)]
    found = found if via is None else found[found["via"] == via]
    found = found if head is None else found[found["head"] == head]
    return found.assign(prompt=found["source_prompt"], task=found["source_task"])


def shared_features(t: Tables, task: str, min_share_of_prompts=0.5, layer=None, site=None, rule=None) -> pd.DataFrame:
    chosen = circuits(t, task=task, rule=rule)
    total = chosen["prompt"].nunique()
    rows = t.members.merge(chosen, on="circuit").merge(
        t.nodes[["id", "feature", "label", "layer", "site", "index"]], left_on="node", right_on="id"
    )
    rows = rows[rows["feature"].notna()]
    rows = rows if layer is None else rows[rows["layer"] == layer]
    rows = rows if site is None else rows[rows["site"] == site]
    rows = rows.assign(
        share=rows["attribution"] / rows["root_value"], root_prompt=rows["prompt"].where(rows["is_root"], np.nan)
    )
    found = (
        rows.groupby(["feature", "label", "layer", "site", "index"], dropna=False)
        .agg(
            n_prompts=("prompt", "nunique"),
            n_prompts_as_root=("root_prompt", "nunique"),
            n_circuits=("circuit", "nunique"),
            mean_share=("share", "mean"),
        )
        .reset_index()
    )
    found["share_of_prompts"] = found["n_prompts"] / total
    return found[found["n_prompts"] >= min_share_of_prompts * total]


def pairs(t: Tables) -> pd.DataFrame:
    """Every QK pair with what is known of its two nodes."""
    joined = t.pairs
    for end in ("query", "key"):
        known = t.nodes[["id", "name", "feature", "label", "token"]].add_prefix(f"{end}_")
        joined = joined.merge(known, left_on=f"{end}_node", right_on=f"{end}_id", validate="m:1")
    return joined


def attention(t: Tables, circuit: str) -> pd.DataFrame:
    edges = ends(t)
    inside = set(t.members.loc[t.members["circuit"] == circuit, "node"])
    edges = edges[edges["source"].isin(inside) & edges["target"].isin(inside) & (edges["via"] == "OV")]
    moved = edges.groupby(["target", "layer", "head", "source_prompt", "target_position", "source_position"])["share"]
    share = moved.sum().abs().groupby(level=[1, 2, 3, 4, 5]).max().reset_index()
    share = share.rename(columns={"source_prompt": "prompt", "target_position": "query", "source_position": "key"})
    return pairs(t).merge(share, on=["prompt", "layer", "head", "query", "key"])


def qk_between(t: Tables, a: str, b: str) -> pd.DataFrame:
    found = pairs(t)
    return found[(found["key_feature"] == a) & (found["query_feature"] == b)]


KEYS = ["source_feature", "target_feature", "via", "layer", "head"]


def feeds(t: Tables) -> pd.DataFrame:
    """What features feed each other, one row per pair and head, from a scan of the edges."""
    pairs = ends(t).dropna(subset=["source_feature", "target_feature"])
    return pairs.groupby(KEYS, dropna=False, as_index=False).agg(
        n_prompts=("source_prompt", "nunique"),
        n_edges=("weight", "size"),
        mean_weight=("weight", "mean"),
        mean_share=("share", "mean"),
        total_share=("share", "sum"),
        source_label=("source_label", "first"),
        target_label=("target_label", "first"),
    )


def features(t: Tables) -> pd.DataFrame:
    """Every feature that is a node or fires, with its label, and the prompts in which it fires."""
    ids = sorted(set(t.nodes["feature"].dropna()) | set(t.firings["feature"]))
    fires = t.firings.groupby("feature").size()
    parts = [id.split("/") for id in ids]
    return pd.DataFrame(
        {
            "feature": ids,
            "label": [t.labels.get(id) for id in ids],
            "layer": [int(part[1]) for part in parts],
            "site": [part[2] for part in parts],
            "index": [int(part[3]) for part in parts],
            "n_prompts": [int(fires.get(id, 0)) for id in ids],
            "density": None,
            "max_activation": None,
        }
    )


def find_features(t: Tables, text=None, layer=None, site=None, min_prompts=0, max_prompts=None) -> pd.DataFrame:
    found = features(t)
    if text is not None:
        found = found[[isinstance(label, str) and text.lower() in label.lower() for label in found["label"]]]
    for column, value in (("layer", layer), ("site", site)):
        found = found if value is None else found[found[column] == value]
    found = found[found["n_prompts"] >= min_prompts]
    return found if max_prompts is None else found[found["n_prompts"] <= max_prompts]


def feature(t: Tables, feature: str, top=5) -> pd.DataFrame:
    fires = prompts_of(t, feature).sort_values(["max", "prompt"], ascending=[False, True])
    of = t.nodes[t.nodes["feature"] == feature]
    inside = t.members[t.members["node"].isin(of["id"])]
    card = [{"part": "feature", "rank": 0, "id": feature, "text": t.labels.get(feature), "n_prompts": len(fires)}]
    card[0] |= {"n_circuits": inside["circuit"].nunique(), "max": fires["max"].max()}
    for rank, row in enumerate(fires.head(top).to_dict("records"), 1):
        card.append({"part": "prompt", "rank": rank, "id": row["prompt"], "text": row["text"], "max": row["max"]})
    sums = feeds(t)
    for part, mine, other in (("driver", "target", "source"), ("driven", "source", "target")):
        pairs = sums[sums[f"{mine}_feature"] == feature]
        order = pairs["total_share"].abs().sort_values(ascending=False).index[:top]
        for rank, row in enumerate(pairs.loc[order].to_dict("records"), 1):
            named = {"part": part, "rank": rank, "id": row[f"{other}_feature"], "text": row[f"{other}_label"]}
            card.append(named | {key: row[key] for key in ("via", "layer", "head", "n_prompts", "mean_share")})
    columns = ["part", "rank", "id", "text", "via", "layer", "head", "n_prompts", "n_circuits", "mean_share", "max"]
    return pd.DataFrame(card, columns=columns)


def coactive(t: Tables, feature: str, task=None, prompts=20) -> pd.DataFrame:
    looked_at = prompts_of(t, feature, task).sort_values(["max", "prompt"], ascending=[False, True]).head(prompts)
    tokens = {(p, x) for p, xs in zip(looked_at["prompt"], looked_at["positions"], strict=True) for x in xs}
    others: dict[str, set] = {}
    for fires in t.firings[t.firings["prompt"].isin(looked_at["prompt"])].itertuples(index=False):
        if fires.feature != feature:
            others.setdefault(fires.feature, set()).update((fires.prompt, x) for x in fires.positions)
    rows = [
        {
            "feature": other,
            "n_prompts": len({p for p, _ in tokens & theirs}),
            "n_tokens": len(tokens & theirs),
            "overlap": len(tokens & theirs) / len(tokens | theirs),
        }
        for other, theirs in others.items()
        if tokens & theirs
    ]
    return pd.DataFrame(rows).merge(features(t)[["feature", "label", "layer", "site"]], on="feature")


def spans(t: Tables, feature=None, prompt=None, min_length=2) -> pd.DataFrame:
    """Runs of positions taken from the firings, not from the spans that were stored."""
    rows = []
    for fires in t.firings.itertuples(index=False):
        values = dict(zip(fires.positions, fires.values, strict=True))
        for start in values:
            if start - 1 in values:
                continue
            end = start
            while end + 1 in values:
                end += 1
            row = {"span": f"{fires.prompt}/{fires.feature}/{start}-{end}", "feature": fires.feature}
            row |= {"label": t.labels.get(fires.feature), "prompt": fires.prompt, "task": fires.task}
            row |= {"start": start, "end": end, "length": end - start + 1}
            mean = sum(values[i] for i in range(start, end + 1)) / (end - start + 1)
            rows.append(row | {"mean": mean, "text": "".join(fires.tokens[start : end + 1])})
    found = pd.DataFrame(rows)
    found = found[found["length"] >= min_length]
    found = found if feature is None else found[found["feature"] == feature]
    return found if prompt is None else found[found["prompt"] == prompt]


def downstream(t: Tables, feature=None, node=None, hops=2, min_share=0.05, via=None) -> pd.DataFrame:
    """As upstream, on the edges walked the other way."""
    edges = ends(t)
    edges = edges[edges["share"].abs() >= min_share]
    edges = edges if via is None else edges[edges["via"] == via]
    near = {node} if node else set(t.nodes.loc[t.nodes["feature"] == feature, "id"])
    hop_of: dict[int, int] = {}
    for hop in range(1, hops + 1):
        step = edges[edges["source"].isin(near)]
        for place in step.index:
            hop_of.setdefault(place, hop)
        near = set(step["target"])
    edges = edges.loc[list(hop_of)].assign(hop=list(hop_of.values()))
    keys = ["hop", "source", "source_kind", "source_label", "target", "target_kind", "target_label"]
    keys += ["via", "layer", "head"]
    named = edges.assign(
        source=[_source(row) for row in edges.to_dict("records")],
        target=edges["target_feature"].where(edges["target_feature"].notna(), edges["target_name"]),
    )
    sums = {"n_prompts": ("source_prompt", "nunique"), "n_edges": ("weight", "size")}
    sums |= {"mean_weight": ("weight", "mean"), "mean_share": ("share", "mean")}
    return named.groupby(keys, dropna=False).agg(**sums).reset_index()


def strongest_paths(t: Tables, circuit: str, source=None, hops=6, min_product=0.005) -> pd.DataFrame:
    """Every path, grown backwards from the root one edge at a time."""
    name, members = circuit, t.members[t.members["circuit"] == circuit]
    edges = ends(t)
    edges = edges[edges["source"].isin(members["node"]) & edges["target"].isin(members["node"])]
    into = {target: rows.to_dict("records") for target, rows in edges.groupby("target")}
    root = t.circuits.loc[t.circuits["circuit"] == name, "root"].iloc[0]
    growing, rows = [(1.0, [])], []
    for _ in range(hops):
        grown = []
        for product, path in growing:
            for edge in into.get(path[0]["source"] if path else root, []):
                if abs(product * edge["weight"]) >= min_product * abs(edge["target_pre"]):
                    grown.append((product * edge["share"], [edge, *path]))
        growing = grown
        for product, path in grown:
            first = path[0]
            if first["source_feature"] != source if source else first["source_kind"] != "Embedding":
                continue
            heads = ["" if e["via"] == "DIRECT" else f"L{e['layer']:.0f}.H{e['head']:.0f}" for e in path]
            text = first["source_name"]
            for e, head in zip(path, heads, strict=True):
                text += (f" →{head}→ " if head else " → ") + e["target_name"]
            nodes = [first["source"], *(e["target"] for e in path)]
            row = {"product": product, "n_hops": len(path), "path": text, "nodes": nodes, "heads": heads}
            rows.append(row | {"shares": [e["share"] for e in path]})
    return pd.DataFrame(rows)


def drivers_of_head(t: Tables, layer: int, head: int, via=None, min_prompts=1) -> pd.DataFrame:
    carried = feeds(t).query("via == 'OV' and layer == @layer and head == @head")
    carried = carried.assign(source=carried["source_feature"], target=carried["target_feature"])
    carried = carried.assign(mean=carried["mean_weight"])
    looked = (
        pairs(t)
        .query("layer == @layer and head == @head")
        .dropna(subset=["key_feature", "query_feature"])
        .groupby(["key_feature", "query_feature"], as_index=False)
        .agg(
            n_prompts=("prompt", "nunique"),
            n_edges=("qk", "size"),
            mean=("qk", "mean"),
            source_label=("key_label", "first"),
            target_label=("query_label", "first"),
        )
        .rename(columns={"key_feature": "source", "query_feature": "target"})
        .assign(via="QK", layer=layer, head=head, mean_share=np.nan)
    )
    found = pd.concat([carried, looked])
    found = found if via is None else found[found["via"] == via]
    return found[found["n_prompts"] >= min_prompts]


def motifs(t: Tables, min_prompts=2, feature=None, via=None) -> pd.DataFrame:
    found = feeds(t)
    found = found[found["n_prompts"] >= min_prompts]
    found = found if via is None else found[found["via"] == via]
    if feature is not None:
        found = found[(found["source_feature"] == feature) | (found["target_feature"] == feature)]
    found = found.assign(a=found["source_feature"], b=found["target_feature"], ab=_way(found), bc=None, c=None)
    return found.assign(a_label=found["source_label"], b_label=found["target_label"], c_label=None)


def chains(t: Tables, min_prompts=2, feature=None, via=None) -> pd.DataFrame:
    """Motifs of length 3: every two edges that meet in a node."""
    edges = ends(t).dropna(subset=["source_feature", "target_feature"])
    edges = edges if via is None else edges[edges["via"] == via]
    edges = edges.assign(way=_way(edges))
    met = edges.merge(edges, left_on="target", right_on="source", suffixes=("", "_on"))
    met = met.assign(product=met["share"] * met["share_on"])
    keys = ["source_feature", "way", "target_feature", "way_on", "target_feature_on"]
    found = met.groupby(keys, as_index=False).agg(
        n_prompts=("source_prompt", "nunique"),
        n_edges=("product", "size"),
        mean_share=("product", "mean"),
        a_label=("source_label", "first"),
        b_label=("target_label", "first"),
        c_label=("target_label_on", "first"),
    )
    found = found.set_axis(["a", "ab", "b", "bc", "c", *found.columns[5:]], axis=1)
    found = found if feature is None else found[found["b"] == feature]
    return found[found["n_prompts"] >= min_prompts]


def _way(edges: pd.DataFrame) -> list[str]:
    columns = (edges["via"], edges["layer"], edges["head"])
    return [v if v == "DIRECT" else f"L{la:.0f}.H{h:.0f}" for v, la, h in zip(*columns, strict=True)]


def inside(t: Tables, chosen: pd.DataFrame) -> pd.DataFrame:
    """The nodes and edges of the chosen circuits, one row per circuit, with what each gives."""
    nodes = t.members.merge(chosen[["circuit", "root_value"]], on="circuit").merge(
        t.nodes.add_prefix("source_"), left_on="node", right_on="source_id"
    )
    nodes = nodes.assign(part="node", share=nodes["attribution"] / nodes["root_value"])
    edges = [circuit(t, name).assign(part="edge", circuit=name) for name in chosen["circuit"]]
    return pd.concat([nodes, *edges], ignore_index=True).reindex(
        columns=[*nodes.columns, *ends(t).columns.difference(nodes.columns)]
    )


def consensus(t: Tables, task: str, min_share=0.5, rule=None) -> pd.DataFrame:
    chosen = circuits(t, task=task, rule=rule)
    rows = inside(t, chosen)
    rows = rows[rows["source_feature"].notna() & ((rows["part"] == "node") | rows["target_feature"].notna())]
    keys = ["part", "source_feature", "source_label", "target_feature", "target_label", "via", "layer", "head"]
    found = rows.groupby(keys, dropna=False).agg(n_circuits=("circuit", "nunique"), share=("share", "sum"))
    found = found.reset_index().rename(columns={"source_feature": "source", "target_feature": "target"})
    found["share_of_circuits"] = found["n_circuits"] / len(chosen)
    found["mean_share"] = found["share"] / found["n_circuits"]
    return found[found["n_circuits"] >= min_share * len(chosen)]


def diff(t: Tables, a: str, b: str) -> pd.DataFrame:
    sides = []
    keys = ["part", "source", "source_label", "target", "target_label", "via", "layer", "head"]
    for name in (a, b):
        chosen = t.circuits[(t.circuits[["circuit", "prompt", "task"]] == name).any(axis=1)]
        rows = inside(t, chosen)
        other = {"Error": "error", "Bias": "bias"}
        plain = [
            feature if isinstance(feature, str) else f"L{layer} {site} {other[kind]}" if kind in other else name
            for feature, kind, layer, site, name in rows[
                [f"source_{c}" for c in ("feature", "kind", "layer", "site", "name")]
            ].itertuples(index=False)
        ]
        target = rows["target_feature"].where(rows["target_feature"].notna(), rows["target_name"])
        found = rows.assign(source=plain, target=target).groupby(keys, dropna=False)
        found = found.agg(n_circuits=("circuit", "nunique"), share=("share", "sum")).reset_index()
        sides.append(found.assign(share=found["share"] / len(chosen)))
    both = sides[0].merge(sides[1], on=keys, how="outer", suffixes=("_a", "_b"))
    both = both.fillna({"n_circuits_a": 0, "n_circuits_b": 0, "share_a": 0.0, "share_b": 0.0})
    found = np.select([both["n_circuits_b"] == 0, both["n_circuits_a"] == 0], ["only a", "only b"], "both")
    return both.assign(found=found, change=both["share_b"] - both["share_a"])


def similar_circuits(t: Tables, circuit: str, among: int) -> pd.DataFrame:
    rows = inside(t, t.circuits).query("part == 'node'").dropna(subset=["source_feature"])
    weights = rows.assign(w=rows["share"].abs()).pivot_table(
        index="source_feature", columns="circuit", values="w", aggfunc="sum", fill_value=0.0
    )
    own = weights[circuit]
    fires = t.firings.groupby("feature").size().reindex(own[own > 0].index, fill_value=0)
    fires = fires.sort_index().sort_values(kind="stable")
    rarest = fires.index[(fires.cumsum() <= among) | (np.arange(len(fires)) == 0)]
    found = pd.DataFrame(
        {
            "n_shared": weights[own > 0].gt(0).sum(),
            "shared": weights.apply(lambda other: np.minimum(own, other).sum()),
            "similarity": weights.apply(lambda o: np.minimum(own, o).sum() / np.maximum(own, o).sum()),
        }
    ).drop(index=circuit)
    with_one = weights.loc[rarest].gt(0).any()
    return found[with_one.reindex(found.index)].reset_index(names="circuit").merge(t.circuits, on="circuit")


def specificity(t: Tables, a: str, b: str, c=None, task=None, via=None, head=None) -> pd.DataFrame:
    found = edges_between(t, a, b, via, head)
    if c is not None:
        onward = edges_between(t, b, c)
        found = found[found["target"].isin(onward["source"])]
    tasks = t.nodes.groupby("prompt")["task"].first()
    n_all, motif = len(tasks), tasks[tasks.index.isin(found["prompt"])]
    rows = []
    for name in [task] if task else sorted(motif.dropna().unique()):
        n_task, n_with = int((tasks == name).sum()), int((motif == name).sum())
        chances = [
            math.comb(len(motif), x) * math.comb(n_all - len(motif), n_task - x) / math.comb(n_all, n_task)
            for x in range(n_with, min(len(motif), n_task) + 1)
        ]
        row = {"task": name, "n_with": n_with, "n_task": n_task, "rate": n_with / n_task}
        row |= {"n_with_elsewhere": len(motif) - n_with, "n_elsewhere": n_all - n_task}
        rows.append(row | {"rate_elsewhere": (len(motif) - n_with) / (n_all - n_task), "p_value": sum(chances)})
    return pd.DataFrame(rows)


def errors(t: Tables, task=None, rule=None) -> pd.DataFrame:
    chosen = circuits(t, task=task, rule=rule)
    rows = t.members.merge(chosen, on="circuit").merge(
        t.nodes.loc[t.nodes["kind"] == "Error", ["id", "layer", "site"]], left_on="node", right_on="id"
    )
    rows = rows.assign(share=rows["attribution"] / rows["root_value"])
    rows = rows.assign(size=rows["share"].abs())
    found = rows.groupby(["task", "layer", "site"], dropna=False, as_index=False).agg(
        n_with=("circuit", "nunique"), share=("share", "sum"), size=("size", "sum")
    )
    total = [int((chosen["task"].isna() if pd.isna(x) else chosen["task"] == x).sum()) for x in found["task"]]
    return found.assign(n_circuits=total, mean_share=found["share"] / total, mean_size=found["size"] / total)


def faithful(t: Tables, task=None, rule=None, min_faithfulness=None) -> pd.DataFrame:
    found = circuits(t, task=task, rule=rule).dropna(subset=["faithfulness"])
    return found if min_faithfulness is None else found[found["faithfulness"] >= min_faithfulness]


def wired(t: Tables, wires: pd.DataFrame, show="unused", feature=None, via=None) -> pd.DataFrame:
    """`wires` has source, target, via (MLP or OV), layer, head, weight and rank."""
    found = _wires_and_feeds(t, wires, "left", feature)
    found = found if via is None else found[found["wire_via"] == via]
    found = found if show == "all" else found[found["n_prompts"].isna()]
    return found.assign(via=found["wire_via"], n_prompts=found["n_prompts"].fillna(0))


def used(t: Tables, wires: pd.DataFrame, show="weak", feature=None, via=None) -> pd.DataFrame:
    found = _wires_and_feeds(t, wires, "right", feature)
    computed = set(zip(wires["target"], wires["via"].replace("MLP", "DIRECT"), strict=True))
    known = [key in computed for key in zip(found["target"], found["via"], strict=True)]
    found = found.loc[known]
    found = found if via is None else found[found["via"] == via]
    return found if show == "all" else found[found["weight"].isna()]


def _wires_and_feeds(t: Tables, wires: pd.DataFrame, how: str, feature: str | None) -> pd.DataFrame:
    sums = feeds(t).rename(columns={"source_feature": "source", "target_feature": "target"})
    sums = sums.drop(columns=["source_label", "target_label"])
    wires = wires.assign(wire_via=wires["via"], via=wires["via"].replace("MLP", "DIRECT"))
    both = wires.merge(sums, on=["source", "target", "via", "layer", "head"], how=how)
    both = both if feature is None else both[(both["source"] == feature) | (both["target"] == feature)]
    return both.assign(source_label=both["source"].map(t.labels.get), target_label=both["target"].map(t.labels.get))
