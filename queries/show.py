"""`atlas show CIRCUIT`: a circuit as a tree that a person can read in a terminal.

Under each node stand its drivers: the circuit's nodes with an edge into it, with the share of its
pre-activation that each accounts for, summed over the heads that carry it, and below it why each of these heads
looked there, where a stored pair of nodes speaks for it: the one that does most, with its figures where the tree
first tells of that score, and after that only by name, the heads of one pair together. The strongest `top` of
at least `min_share` are shown, and their drivers below them, `depth` levels down. A node that stands in several
places is opened where it stands highest, and marked with an arrow elsewhere. What is left of the whole is the
rest: the weaker drivers, the constant, and what the circuit does not keep.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import pandas as pd
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

import atlas
import queries
from atlas.cli import store_option
from atlas.views.circuit import picture
from queries.find import find
from queries.pictures import picture_options, write_picture
from queries.render import visible

_STYLES = {
    "MLP": "green",
    "Attn": "cyan",
    "Embedding": "yellow",
    "PositionEmbedding": "yellow",
    "Error": "red",
    "Bias": "magenta",
    "Logit": "blue",
}

_HEAD = """
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit {id: $circuit})-[:ROOT]->(root:CircuitNode)-[:AT]->(token:Token)
OPTIONAL MATCH (root)-[:OF]->(f:Feature)
RETURN p.id AS prompt, p.text AS text, c.rule AS rule, c.threshold AS threshold, c.n_nodes AS n_nodes,
       c.n_edges AS n_edges, c.root_value AS root_value, c.completeness AS completeness,
       c.error_share AS error_share, c.pruned_share AS pruned_share, c.faithfulness AS faithfulness,
       c.random_faithfulness AS random_faithfulness, c.top_faithfulness AS top_faithfulness,
       c.necessity AS necessity, c.ablation AS ablation, root.id AS root, root.name AS name,
       [label IN labels(root) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS kind,
       f.label AS label, root.position AS position, token.text AS token
ORDER BY position
"""
_ALL = 1_000_000  # rows: every pair of a circuit
_TOKENS = """
MATCH (:Prompt {id: $prompt})-[:HAS_TOKEN]->(t:Token)
RETURN t.position AS position, t.text AS text ORDER BY position
"""


@dataclass(frozen=True)
class Node:
    """One node of the circuit, as the tree names it; `token` is the text at its position."""

    id: str
    name: str
    kind: str
    label: str | None
    token: str


@dataclass(frozen=True)
class Look:
    """The pair that speaks most for one head's look from a query to a key: `qk` of its score, from a node at either.

    `lift` is what the node at the query gives to this key beyond what it gives to the others on average.
    """

    layer: int
    head: int
    query_name: str
    key_name: str
    qk: float
    score: float
    lift: float


@dataclass(frozen=True)
class Driver:
    """All that one node adds to another: `share` of its pre-activation, `heads` as (layer, head, share).

    `looks` are those heads' reasons to look there, as far as they are stored.
    """

    node: Node
    share: float
    heads: tuple[tuple[int, int, float], ...]
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class Branch:
    """A node of the tree and what stands below it.

    `driver` says how it feeds the node above (None at the root). `seen` is true where its drivers stand
    elsewhere; `hidden` counts its drivers that are not shown, and `rest` is the share of its
    pre-activation that those below do not account for, None where nothing stands below.
    """

    node: Node
    driver: Driver | None
    seen: bool = False
    branches: tuple["Branch", ...] = ()
    hidden: int = 0
    rest: float | None = None


@dataclass(frozen=True)
class _Grower:
    """Grows the tree; `home` says under which parent a node that stands in several places is opened."""

    drivers: dict[str, list[Driver]]
    top: int
    min_share: float
    home: dict[str, str | None]

    def shown(self, node: Node) -> list[Driver]:
        return [d for d in self.drivers.get(node.id, []) if abs(d.share) >= self.min_share][: self.top]

    def settle(self, root: Node, depth: int) -> None:
        """Level by level from the root: a node is opened where it stands highest."""
        self.home[root.id] = None
        level = [root]
        for _ in range(depth - 1):
            below = [(node, driver.node) for node in level for driver in self.shown(node)]
            level: list[Node] = []
            for parent, node in below:
                if node.id not in self.home:
                    self.home[node.id] = parent.id
                    level.append(node)

    def grow(self, node: Node, driver: Driver | None, parent: str | None) -> Branch:
        if node.id not in self.drivers or node.id not in self.home:
            return Branch(node, driver)
        if self.home[node.id] != parent:
            return Branch(node, driver, seen=True)
        shown = self.shown(node)
        branches = tuple(self.grow(d.node, d, node.id) for d in shown)
        rest = 1 - sum(d.share for d in shown)
        return Branch(node, driver, branches=branches, hidden=len(self.drivers[node.id]) - len(shown), rest=rest)


def tree(edges: pd.DataFrame, pairs: pd.DataFrame, root: Node, *, depth: int, top: int, min_share: float) -> Branch:
    """The tree below `root` from the rows of `queries.circuit` and of `queries.attention`."""
    grower = _Grower(drivers(edges, pairs), top, min_share, {})
    grower.settle(root, depth)
    return grower.grow(root, None, None)


def drivers(edges: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, list[Driver]]:
    """For every target's id its drivers, strongest first, the heads of each pair of nodes together."""
    speaking = _speaking(pairs)
    found: dict[str, list[Driver]] = {}
    for (target, _), rows in edges.groupby(["target", "source"], sort=False):
        records = cast(list[dict[str, Any]], rows.fillna({"share": 0.0}).to_dict("records"))
        heads = [(int(r["layer"]), int(r["head"]), float(r["share"])) for r in records if r["via"] == "OV"]
        heads.sort(key=lambda head: -abs(head[2]))
        share = sum(float(r["share"]) for r in records)
        ends = records[0]["target_position"], records[0]["source_position"]
        looks = [speaking[layer, head, *ends] for layer, head, _ in heads if (layer, head, *ends) in speaking]
        found.setdefault(str(target), []).append(Driver(_source(records[0]), share, tuple(heads), tuple(looks)))
    for strongest_first in found.values():
        strongest_first.sort(key=lambda driver: (-abs(driver.share), driver.node.id))
    return found


def _speaking(pairs: pd.DataFrame) -> dict[tuple[int, int, int, int], Look]:
    """For each score, by layer, head, query and key, the pair that speaks most for looking there, if any does.

    It is of the node at the query that lifts this key most over the others, and the strongest that adds to the score.
    """
    for_it = pairs[(pairs["lift"] > 0) & (pairs["qk"] > 0)].sort_values(["lift", "qk"], ascending=False)
    first = for_it.drop_duplicates(["layer", "head", "query", "key"])
    return {
        (int(r["layer"]), int(r["head"]), int(r["query"]), int(r["key"])): Look(
            int(r["layer"]), int(r["head"]), *(r[name] for name in ("query_name", "key_name", "qk", "score", "lift"))
        )
        for r in cast(list[dict[str, Any]], first.to_dict("records"))
    }


def draw(branch: Branch) -> Tree:
    """The tree in colours by kind."""
    return _draw(branch, set())


def _draw(branch: Branch, told: set[Look]) -> Tree:
    drawn = Tree(_line(branch), guide_style="dim")
    for reason in _reasons(branch.driver.looks if branch.driver else (), told):
        drawn.add(Text(reason, style="dim italic"))
    for below in branch.branches:
        drawn.children.append(_draw(below, told))
    if branch.rest is not None:
        drawn.add(Text(f"{_percent(branch.rest)} {_rest(branch.hidden)}", style="dim"))
    return drawn


@click.command()
@click.argument("circuit")
@click.option("--depth", type=click.IntRange(1), default=3, show_default=True, help="Levels below the root.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Most drivers of a node.")
@click.option(
    "--min-share",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    help="Least share of a node's pre-activation, of either sign.",
)
@picture_options
@store_option
def show(
    circuit: str,
    depth: int,
    top: int,
    min_share: float,
    html: Path | None,
    svg: Path | None,
    png: Path | None,
    store: str | None,
) -> None:
    """Show a circuit as a tree, or draw it: its root, what drives it, and what drives that.

    CIRCUIT is a circuit's id, or a part of it that no other circuit's id has.
    """
    with atlas.connect(store, create=False) as opened:
        found = find(opened, circuit)
        if html or svg or png:
            write_picture(picture(opened, found), html, svg, png)
            return
        heads = cast(list[dict[str, Any]], opened.read(_HEAD, circuit=found).to_dict("records"))
        tokens = opened.read(_TOKENS, prompt=heads[0]["prompt"])
        edges = queries.circuit(opened, found)
        pairs = queries.attention(opened, found, limit=_ALL)
    roots = [Node(head["root"], head["name"], head["kind"], _text(head["label"]), head["token"]) for head in heads]
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=100_000, color_system=None)
    console.print(_heading(found, heads, zip(tokens["position"], tokens["text"], strict=True)))
    for root in roots:
        console.print(draw(tree(edges, pairs, root, depth=depth, top=top, min_share=min_share)))


def _source(row: dict[str, Any]) -> Node:
    return Node(row["source"], row["source_name"], row["source_kind"], _text(row["source_label"]), row["source_token"])


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _in_the_model(head: dict[str, Any]) -> list[str]:
    """What the real model said of the circuit, where it was asked."""
    if not isinstance(head["ablation"], str):
        return []
    return [
        f"real model, {head['ablation']} ablation: {_percent(head['faithfulness'])} left without the rest (random "
        f"{_percent(head['random_faithfulness'])}, strongest {_percent(head['top_faithfulness'])}), "
        f"{_percent(head['necessity'])} lost without the circuit"
    ]


def _heading(circuit: str, heads: Sequence[dict[str, Any]], tokens: Iterable[tuple[int, str]]) -> Text:
    """What the circuit explains and how well; `heads` has a row for each of its roots."""
    prompt, head, at = Text(), heads[0], {head["position"] for head in heads}
    for position, token in tokens:
        if position in at:
            prompt.append(f"«{visible(token)}»", style="bold reverse")
        elif position > 0 or head["text"].startswith(token):  # else it was put before the prompt
            prompt.append(visible(token))
    explained = (
        f"explained {_percent(head['completeness'])}, errors {_percent(head['error_share'])}, "
        f"pruned {_percent(head['pruned_share'])}"
    )
    kept = f"{head['n_nodes']} nodes, {head['n_edges']} edges, {head['rule']} at {head['threshold']:g}"
    together = "" if len(heads) == 1 else f" of {len(heads)} roots together"
    value = f"value {head['root_value']:.4g}{together}: {explained}"
    lines = [visible(circuit), prompt, value, kept, *_in_the_model(head), ""]
    return Text("\n").join(line if isinstance(line, Text) else Text(line) for line in lines)


def _line(branch: Branch) -> Text:
    line = Text()
    if branch.driver:
        line.append(f"{_percent(branch.driver.share)} ", style="bold red" if branch.driver.share < 0 else "bold")
    line.append(visible(branch.node.name), style=_STYLES.get(branch.node.kind, ""))
    if branch.node.label and branch.node.label not in branch.node.name:
        line.append(f' "{visible(branch.node.label)}"', style="italic")
    if branch.driver and branch.driver.heads:
        line.append(_through(branch.driver))
    if branch.seen:
        line.append(" ↕ opened elsewhere", style="dim")
    return line


def _through(driver: Driver) -> str:
    """` via OV L2.H3 from " Texas"`; where several heads carry it, each with its share."""
    alone = len(driver.heads) == 1
    heads = [f"L{layer}.H{head}" + ("" if alone else f" {_percent(share)}") for layer, head, share in driver.heads]
    return f' via OV {", ".join(heads)} from "{visible(driver.node.token)}"'


def _reasons(looks: Sequence[Look], told: set[Look]) -> Iterator[str]:
    """Why each head of one edge looks there, and the looks are then among those `told`.

    `L2.H3 looks there: L0 mlp 7 @ in with embedding @ Texas, 3.4 of its score 7.2, lift +0.85`, and after that
    `L2.H3, L2.H5 look there: L0 mlp 7 @ in with embedding @ Texas`.
    """
    again: dict[str, list[str]] = {}
    for look in looks:
        if look in told:
            again.setdefault(_pair(look), []).append(_head(look))
        else:
            figures = f"{look.qk:.1f} of its score {look.score:.1f}, lift {look.lift:+.2f}"
            yield f"{_head(look)} looks there: {_pair(look)}, {figures}"
    for pair, heads in again.items():
        yield f"{', '.join(heads)} {'looks' if len(heads) == 1 else 'look'} there: {pair}"
    told.update(looks)


def _head(look: Look) -> str:
    return f"L{look.layer}.H{look.head}"


def _pair(look: Look) -> str:
    return f"{visible(look.query_name)} with {visible(look.key_name)}"


def _rest(hidden: int) -> str:
    weaker = "" if hidden == 0 else f"{hidden} weaker {'driver' if hidden == 1 else 'drivers'}, "
    return f"rest: {weaker}the constant and what the circuit leaves out"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
