"""The answers computed without a database: the records as pandas tables, and each question asked of those."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from atlas.records import PromptRecord

LABELS = {"toy/1/mlp/24": 'a "label" with `ticks` and [bold]brackets[/bold]', "toy/0/attn/11": "stones"}


@dataclass(frozen=True)
class Tables:
    """Everything in some prompts: one row per node, edge, membership, circuit, firing and QK pair."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    members: pd.DataFrame
    circuits: pd.DataFrame
    firings: pd.DataFrame
    pairs: pd.DataFrame


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
            circuits.append(row)
            for m, a in zip(c.members, c.attribution, strict=True):
                members.append({"circuit": c.id, "node": ids[m], "attribution": a, "is_root": m == c.root})
        for f in p.firings:
            firings.append({"feature": f"{f.dictionary}/{f.index}", "record": p, "firing": f})
        scores = {look[:4]: look[4:] for look in zip(*(a.tolist() for a in vars(p.scores).values()), strict=True)}
        for s, t, la, h, qk, lift in zip(*(a.tolist() for a in vars(p.qk).values()), strict=True):
            query, key = p.nodes[t].position, p.nodes[s].position
            row = {"prompt": p.id, "task": p.task, "layer": la, "head": h, "query": query, "key": key}
            row |= dict(zip(("score", "pattern", "unstored"), scores[la, h, query, key], strict=True))
            pairs.append(row | {"key_node": ids[s], "query_node": ids[t], "qk": qk, "lift": lift})
    return Tables(*(pd.DataFrame(rows) for rows in (nodes, edges, members, circuits, firings, pairs)))


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
    for record, firing in t.firings.loc[t.firings["feature"] == feature, ["record", "firing"]].itertuples(index=False):
        if task is not None and record.task != task:
            continue
        fires = set(firing.positions)
        marked = [f"«{text}»" if i in fires else text for i, text in enumerate(record.token_texts)]
        row = {"prompt": record.id, "task": record.task, "max": max(firing.values), "n_positions": len(fires)}
        row |= {"positions": list(firing.positions), "values": list(firing.values)}
        row |= {"tokens": [record.token_texts[i] for i in firing.positions], "text": "".join(marked[1:])}
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
