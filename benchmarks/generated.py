"""A store of any size made up from a seed, with the degree skew of a real one, and the fastest way to load it.

Of every 500 OV edges one prompt is made: 16 tokens, 130 activations of a stock of 98,304 features (12 layers, both
sites) whose popularity falls about as 1 / rank, 200 DIRECT edges, 200 firings and two circuits of 30 nodes. Edges run
upward in layers and forward in positions, and prefer few of the activations, so that in- and out-degrees are as skewed
as the popularity of features. FEEDS is what a scan of the edges gives.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import neo4j
import numpy as np
import pandas as pd

from atlas.schema import prepare
from atlas.store import Store
from tests import neo4j_server

EDGES_PER_PROMPT = 500
N_LAYERS, N_HEADS, D_SAE, N_TOKENS = 12, 12, 4096, 16
N_ACTIVE, N_DIRECT, N_MORE_FIRINGS, N_MEMBERS = 130, 200, 80, 30
TASKS = ["capitals", "states", "greater_than", "quotes", "plurals", "names"]
ROWS = 10_000
_TYPES = dict.fromkeys(("position", "layer", "head", "index", "n_tokens", "n_nodes", "n_edges", "n_prompts"), "int")
_TYPES |= dict.fromkeys(("prompt", "name", "site", "text", "task", "rule", "via"), "string")
_TYPES |= {"complete": "boolean", "positions": "int[]", "values": "double[]"}


@dataclass(frozen=True)
class Table:
    """Rows of one kind of node (`id` and `labels`) or of relationship (`type`, ends `source` and `target` by id)."""

    name: str
    rows: pd.DataFrame
    labels: str = ""
    ends: tuple[str, str] = ("", "")


def generate(n_edges: int, seed: int = 0) -> list[Table]:
    """All tables of a store with about `n_edges` OV edges."""
    rng = np.random.default_rng(seed)
    n_prompts = n_edges // EDGES_PER_PROMPT
    prompts = [f"{i:016x}" for i in range(n_prompts)]
    activations = _activations(n_prompts, rng)
    ov, direct = _edges(activations, n_prompts, rng)
    firings = _firings(activations, n_prompts, rng)
    members, roots = _members(activations, n_prompts, rng)
    ids = np.array(prompts)
    activations["prompt"] = ids[activations["p"]]
    place = activations["prompt"] + "/" + activations["position"].astype(str)
    site = np.where(activations["site"] == 1, "mlp", "attn")
    layer, index = activations["layer"].astype(str), activations["index"].astype(str)
    activations["id"] = place + "/" + layer + "/" + site + "/" + index
    activations["feature"] = "big/" + layer + "/" + site + "/" + index
    activations["name"] = "L" + layer + " " + site + " " + index
    node = activations["id"].to_numpy()
    for edges in (ov, direct):
        edges["share"] = edges["weight"] / activations["pre_activation"].to_numpy()[edges["t"]]
        edges["source"], edges["target"] = node[edges["s"]], node[edges["t"]]
    feeds = _feeds(activations, ov, direct)
    used = sorted(set(activations["feature"]) | set(firings["source"]))
    parts = [feature.split("/") for feature in used]
    features = pd.DataFrame({"id": used, "layer": [int(p[1]) for p in parts], "site": [p[2] for p in parts]})
    features["index"] = [int(p[3]) for p in parts]
    tokens = pd.DataFrame({"prompt": np.repeat(ids, N_TOKENS), "position": np.tile(np.arange(N_TOKENS), n_prompts)})
    tokens["id"] = tokens["prompt"] + "/" + tokens["position"].astype(str)
    tokens["text"] = " t" + tokens["position"].astype(str)
    prompt = pd.DataFrame({"id": prompts, "text": [" ".join(["t"] * 15)] * n_prompts, "n_tokens": N_TOKENS})
    prompt["task"] = [TASKS[i] for i in rng.integers(0, len(TASKS), n_prompts)]
    prompt["complete"] = True
    circuits = pd.DataFrame({"prompt": ids[np.repeat(np.arange(n_prompts), 2)], "node": node[roots]})
    circuits["id"] = circuits["node"] + "/relative"
    circuits["rule"], circuits["threshold"], circuits["n_nodes"] = "relative", 0.02, N_MEMBERS
    circuits["n_edges"], circuits["root_value"] = 60, rng.uniform(1, 9, len(circuits))
    circuits["faithfulness"] = rng.uniform(0, 1, len(circuits))
    circuits = circuits.assign(completeness=0.7, error_share=0.2, pruned_share=0.1).drop_duplicates("id")
    members = members[members["c"].isin(circuits.index)]
    members["source"] = circuits["id"].reindex(members["c"]).to_numpy()
    members["target"] = node[members["n"]]
    keep = ["id", "prompt", "layer", "position", "name", "site", "value", "pre_activation", "constant", "unstored"]
    activations["site"] = site
    return [
        Table("Prompt", prompt, "Prompt"),
        Table("Token", tokens, "Token"),
        Table("Feature", features, "Feature"),
        Table("MLP", activations.loc[site == "mlp", keep], "CircuitNode;Activation;MLP"),
        Table("Attn", activations.loc[site == "attn", keep], "CircuitNode;Activation;Attn"),
        Table("Circuit", circuits.drop(columns="node"), "Circuit"),
        Table("HAS_TOKEN", _link(tokens["prompt"], tokens["id"]), ends=("Prompt", "Token")),
        Table("OF", _link(activations["id"], activations["feature"]), ends=("CircuitNode", "Feature")),
        Table("AT", _link(activations["id"], place), ends=("CircuitNode", "Token")),
        Table("FIRES_ON", firings, ends=("Feature", "Prompt")),
        Table("HAS_CIRCUIT", _link(circuits["prompt"], circuits["id"]), ends=("Prompt", "Circuit")),
        Table("ROOT", _link(circuits["id"], circuits["node"]), ends=("Circuit", "CircuitNode")),
        Table("INCLUDES", members[["source", "target", "attribution"]], ends=("Circuit", "CircuitNode")),
        Table(
            "OV", ov[["source", "target", "layer", "head", "weight", "pattern"]], ends=("CircuitNode", "CircuitNode")
        ),
        Table("DIRECT", direct[["source", "target", "weight"]], ends=("CircuitNode", "CircuitNode")),
        Table("FEEDS", feeds, ends=("Feature", "Feature")),
    ]


def _popular(rng: np.random.Generator, n: int) -> np.ndarray:
    """Feature indices whose frequency falls a little faster than 1 / rank."""
    return np.minimum((D_SAE ** rng.uniform(0, 1, n) ** 2).astype(np.int64), D_SAE) - 1


def _activations(n_prompts: int, rng: np.random.Generator) -> pd.DataFrame:
    n = n_prompts * N_ACTIVE
    rows = pd.DataFrame({"p": np.repeat(np.arange(n_prompts), N_ACTIVE), "position": rng.integers(1, N_TOKENS, n)})
    rows["layer"], rows["site"] = rng.integers(0, N_LAYERS, n), rng.integers(0, 2, n)
    rows["index"] = _popular(rng, n)
    rows = rows.drop_duplicates(["p", "position", "layer", "site", "index"]).reset_index(drop=True)
    rows["value"] = rows["pre_activation"] = rng.uniform(0.5, 9, len(rows))
    return rows.assign(constant=0.0, unstored=0.0)


def _edges(activations: pd.DataFrame, n_prompts: int, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs of a prompt's activations that may feed each other, drawn until there are enough."""
    counts = activations["p"].value_counts(sort=False).sort_index().to_numpy()
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = (2 * activations["layer"] + activations["site"]).to_numpy()
    position, site = activations["position"].to_numpy(), activations["site"].to_numpy()

    def draw(n: int, allowed: Callable[[np.ndarray, np.ndarray], np.ndarray], keys: list[str]) -> pd.DataFrame:
        parts: list[pd.DataFrame] = []
        while sum(map(len, parts)) < n * n_prompts:
            p = np.repeat(np.arange(n_prompts), n)
            s = first[p] + (counts[p] * rng.beta(0.6, 1.2, len(p))).astype(np.int64)
            t = first[p] + (counts[p] * rng.beta(0.8, 1.2, len(p))).astype(np.int64)
            good = allowed(s, t)
            drawn = pd.DataFrame({"s": s[good], "t": t[good]})
            drawn["head"] = rng.integers(0, N_HEADS, len(drawn))
            parts = [pd.concat([*parts, drawn]).drop_duplicates(keys)]
        rows = parts[0].sample(n * n_prompts, random_state=0).sort_values(["t", "s"]).reset_index(drop=True)
        rows["weight"] = rng.normal(0, 1, len(rows))
        return rows

    ov = draw(
        EDGES_PER_PROMPT,
        lambda s, t: (site[t] == 0) & (rank[s] < rank[t]) & (position[s] <= position[t]),
        ["s", "t", "head"],
    )
    ov["layer"] = activations["layer"].to_numpy()[ov["t"]]
    ov["pattern"] = rng.uniform(0, 1, len(ov))
    direct = draw(
        N_DIRECT, lambda s, t: (site[t] == 1) & (rank[s] < rank[t]) & (position[s] <= position[t]), ["s", "t"]
    )
    return ov, direct


def _firings(activations: pd.DataFrame, n_prompts: int, rng: np.random.Generator) -> pd.DataFrame:
    """Every activation's feature, and more that are in no circuit."""
    n = n_prompts * N_MORE_FIRINGS
    more = pd.DataFrame(
        {"p": np.repeat(np.arange(n_prompts), N_MORE_FIRINGS), "position": rng.integers(1, N_TOKENS, n)}
    )
    more["layer"], more["site"], more["index"] = rng.integers(0, N_LAYERS, n), rng.integers(0, 2, n), _popular(rng, n)
    more["value"] = rng.uniform(0.5, 9, n)
    both = pd.concat([activations[more.columns], more])
    both = both.sort_values(["p", "layer", "site", "index", "position"])
    both = both.drop_duplicates(["p", "layer", "site", "index", "position"])
    grouped = both.groupby(["p", "layer", "site", "index"], sort=False)
    rows = grouped["value"].max().reset_index(name="max")
    rows["positions"] = grouped["position"].agg(list).to_list()
    rows["values"] = grouped["value"].agg(list).to_list()
    site = np.where(rows["site"] == 1, "mlp", "attn")
    rows["source"] = "big/" + rows["layer"].astype(str) + "/" + site + "/" + rows["index"].astype(str)
    rows["target"] = [f"{p:016x}" for p in rows["p"]]
    return rows[["source", "target", "positions", "values", "max"]]


def _members(activations: pd.DataFrame, n_prompts: int, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    counts = activations["p"].value_counts(sort=False).sort_index().to_numpy()
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    p = np.repeat(np.arange(n_prompts), 2)
    roots = first[p] + rng.integers(0, counts[p])
    c = np.repeat(np.arange(len(p)), N_MEMBERS)
    n = first[p[c]] + rng.integers(0, counts[p[c]])
    rows = pd.DataFrame({"c": np.concatenate([c, np.arange(len(p))]), "n": np.concatenate([n, roots])})
    rows["attribution"] = rng.normal(0, 1, len(rows))
    return rows.drop_duplicates(["c", "n"]), roots


def _feeds(activations: pd.DataFrame, ov: pd.DataFrame, direct: pd.DataFrame) -> pd.DataFrame:
    feature, p = activations["feature"].to_numpy(), activations["p"].to_numpy()
    edges = pd.concat([ov.assign(via="OV"), direct.assign(via="DIRECT", layer=-1, head=-1)])
    edges = pd.DataFrame(
        {
            "source": feature[edges["s"]],
            "target": feature[edges["t"]],
            "via": edges["via"].to_numpy(),
            "layer": edges["layer"].to_numpy(),
            "head": edges["head"].to_numpy(),
            "prompt": p[edges["t"]],
            "weight": edges["weight"].to_numpy(),
            "share": edges["share"].to_numpy(),
        }
    )
    grouped = edges.groupby(["source", "target", "via", "layer", "head"])
    feeds = grouped.agg(
        n_prompts=("prompt", "nunique"),
        n_edges=("weight", "size"),
        total_weight=("weight", "sum"),
        total_share=("share", "sum"),
    ).reset_index()
    feeds["mean_weight"] = feeds["total_weight"] / feeds["n_edges"]
    feeds["mean_share"] = feeds["total_share"] / feeds["n_edges"]
    feeds[["layer", "head"]] = feeds[["layer", "head"]].astype("Int64").where(feeds["layer"] >= 0)
    return feeds


def _link(source: pd.Series, target: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({"source": source.to_numpy(), "target": target.to_numpy()})


def load_by_rows(store: Store, tables: list[Table]) -> None:
    """Into an open, empty store: UNWIND in batches, each a transaction."""
    prepare(store)
    for table in tables:
        names = [c for c in table.rows.columns if c not in ("source", "target") or table.labels]
        values = ", ".join(f"{name}: row.{name}" for name in names)
        cypher = f"CREATE (:{table.labels.replace(';', ':')} {{{values}}})"
        if not table.labels:
            a, b = table.ends
            find = f"MATCH (a:{a} {{id: row.source}}) MATCH (b:{b} {{id: row.target}})"
            cypher = f"{find} CREATE (a)-[:{table.name} {{{values}}}]->(b)"
        for start in range(0, len(table.rows), ROWS):
            part = table.rows.iloc[start : start + ROWS].astype(object)
            rows = part.where(part.notna(), None).to_dict("records")
            store.write(lambda transaction, c=cypher, r=rows: _run(transaction, c, r))


def _run(transaction: neo4j.ManagedTransaction, cypher: str, rows: list[dict[str, object]]) -> None:
    transaction.run(f"UNWIND $rows AS row {cypher}", rows=rows).consume()  # type: ignore[arg-type]


def load_by_import(home: Path, tables: list[Table]) -> None:
    """Into the folder of a Neo4j that does not run, by neo4j-admin; the server's `conf` must be there."""
    folder = home / "csv"
    folder.mkdir()
    arguments: list[str] = []
    for table in tables:
        rows = table.rows.copy()
        for name in rows.columns:
            if isinstance(rows[name].iloc[0], list):
                rows[name] = [";".join(map(str, items)) for items in rows[name]]
        path = folder / f"{table.name}.csv"
        rows.to_csv(path, index=False, header=[_header(table, name) for name in rows.columns])
        what = f"nodes={table.labels.replace(';', ':')}" if table.labels else f"relationships={table.name}"
        arguments.append(f"--{what}={path}")
    jars = f"{neo4j_server.CACHE / 'lib'}/*"
    command = [*neo4j_server.JAVA, "-cp", jars, "org.neo4j.server.startup.Neo4jAdminCommand"]
    command += ["database", "import", "full", "neo4j", "--overwrite-destination", *arguments]
    places = {"NEO4J_HOME": str(home), "NEO4J_CONF": str(home / "conf")}
    subprocess.run(command, check=True, cwd=home, env={**os.environ, **places}, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder)


def _header(table: Table, name: str) -> str:
    """A column's heading with its type; ids are looked up among the nodes of one key label."""
    if name == "id":
        return f"id:ID({table.labels.split(';')[0]})"
    if name == "source":
        return f":START_ID({table.ends[0]})"
    if name == "target":
        return f":END_ID({table.ends[1]})"
    return f"{name}:{_TYPES.get(name, 'double')}"
