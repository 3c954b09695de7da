"""The picture of a whole store: which feature feeds which, from FEEDS, over all prompts.

Features stand by layer; an edge is as strong as the number of prompts that show it. The columns are
communities: the graph of these edges, weighted by prompts, cut by Louvain's method, which is seeded and
so gives the same picture every time. A community is named by the labels of its busiest features.
"""

from collections import Counter
from typing import Any, cast

import networkx as nx

from atlas.store import Store
from atlas.views.circuit import Row, rows_of
from atlas.views.picture import KINDS, Column, Edge, Head, Node, Picture, caption, facts, number, percent, text

COMMUNITIES = 24  # most columns; smaller communities stand together in one more
NAMED_BY = 2  # labels that name a community
EDGES = 5000  # most that a map shows

_FEEDS = """
MATCH (a:Feature)-[e:FEEDS]->(b:Feature)
RETURN a.id AS source, b.id AS target, coalesce(e.layer, -1) AS layer, coalesce(e.head, -1) AS head,
       e.n_prompts AS n_prompts, e.mean_share AS mean_share
ORDER BY n_prompts DESC, abs(mean_share) DESC, source, target, layer, head LIMIT $limit
"""
_COUNT = "MATCH (:Feature)-[e:FEEDS]->(:Feature) RETURN count(e) AS n"
_FEATURES = """
UNWIND $ids AS id
MATCH (f:Feature {id: id})
RETURN f.id AS id, f.layer AS layer, f.site AS site, f.index AS index, f.label AS label, f.url AS url,
       f.density AS density
ORDER BY id
"""


def picture(store: Store, edges: int = EDGES) -> Picture:
    """The picture of the `edges` FEEDS of the store that the most prompts show."""
    feeds = rows_of(store.read(_FEEDS, limit=edges))
    total = int(store.read(_COUNT)["n"].iloc[0])
    ids = sorted({feed[end] for feed in feeds for end in ("source", "target")})
    features = rows_of(store.read(_FEATURES, ids=ids)) if ids else []
    pairs: dict[tuple[str, str], list[Row]] = {}
    for feed in feeds:
        pairs.setdefault((feed["source"], feed["target"]), []).append(feed)
    busy: Counter[str] = Counter()
    for pair, ways in pairs.items():
        for id in pair:
            busy[id] += _prompts(ways)
    communities = _communities(pairs)
    column = {id: i for i, members in enumerate(communities) for id in members}
    known = {feature["id"]: feature for feature in features}
    names = [_name([known[id] for id in members], busy) for members in communities[:COMMUNITIES]]
    if len(communities) > COMMUNITIES:
        names.append("others")
    places = sorted({(f["layer"], f["site"] == "mlp") for f in features})
    at = {feature["id"]: i for i, feature in enumerate(features)}
    fed, feeding = Counter(target for _, target in pairs), Counter(source for source, _ in pairs)
    return Picture(
        title="Which feature feeds which, over all prompts",
        prompts=[],
        lines=[f"{len(feeds):,} of {total:,} feeds, those in the most prompts, between {len(features):,} features"],
        columns_are="communities",
        columns=[Column(name) for name in names],
        rows=[f"L{layer} {'mlp' if mlp else 'attn'}" for layer, mlp in places],
        nodes=[
            Node(
                name=_title(f),
                caption=caption(_title(f), text(f["label"])),
                kind="MLP" if f["site"] == "mlp" else "Attn",
                row=places.index((f["layer"], f["site"] == "mlp")),
                column=min(column[f["id"]], COMMUNITIES),
                size=busy[f["id"]],
                facts=facts(
                    ("kind", KINDS["MLP" if f["site"] == "mlp" else "Attn"]),
                    ("edges", f"fed by {fed[f['id']]}, feeds {feeding[f['id']]}"),
                    ("community", names[min(column[f["id"]], COMMUNITIES)]),
                    ("feature", f["id"]),
                    ("fires on", None if number(f["density"]) is None else percent(f["density"]) + " of tokens"),
                ),
                label=text(f["label"]),
                url=text(f["url"]),
            )
            for f in features
        ],
        edges=[_edge(at[source], at[target], ways) for (source, target), ways in pairs.items()],
        strength="prompts",
        size="prompts of its edges",
        percent=False,
        empty="No feature feeds another in this store yet; `atlas ingest` adds prompts.",
        looks={},
        parts={},
    )


def _prompts(ways: list[Row]) -> int:
    """In how many prompts at least one feature feeds the other, by whichever head."""
    return max(way["n_prompts"] for way in ways)


def _edge(source: int, target: int, ways: list[Row]) -> Edge:
    most = _prompts(ways)
    strongest = max(ways, key=lambda way: abs(way["mean_share"]))
    heads = [
        Head(f"L{way['layer']}.H{way['head']} in {way['n_prompts']}, mean share {percent(way['mean_share'])}")
        for way in ways
        if way["head"] >= 0
    ]
    said = f"{most} {'prompt' if most == 1 else 'prompts'}"
    if not heads:
        said += f", mean share {percent(strongest['mean_share'])}"
    return Edge(source, target, most, strongest["mean_share"] < 0, said, heads)


def _communities(pairs: dict[tuple[str, str], list[Row]]) -> list[list[str]]:
    """Sets of features, the largest first."""
    networkx = cast(Any, nx)
    graph = networkx.Graph()
    for (source, target), ways in pairs.items():
        before = graph.get_edge_data(source, target, {"weight": 0})["weight"]
        graph.add_edge(source, target, weight=before + _prompts(ways))
    found: list[set[str]] = networkx.community.louvain_communities(graph, weight="weight", seed=0) if pairs else []
    return sorted((sorted(members) for members in found), key=lambda members: (-len(members), members))


def _name(members: list[Row], busy: Counter[str]) -> str:
    """The labels of a community's busiest features; where none has one, the busiest feature's name."""
    ranked = sorted(members, key=lambda feature: (-busy[feature["id"]], feature["id"]))
    labels = list(dict.fromkeys(label for f in ranked if (label := text(f["label"]))))
    return " · ".join(labels[:NAMED_BY]) if labels else _title(ranked[0])


def _title(feature: Row) -> str:
    return f"L{feature['layer']} {feature['site']} {feature['index']}"
