"""What a page draws: nodes in a grid of columns and rows, and edges between them.

All three pictures have this form. Rows are layers, from the bottom up; columns are the tokens of a
prompt, the communities of a map, or, where two prompts are compared, what each has and what both have.
The page's script knows nothing of circuits: every text that it shows stands here.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

KINDS = {
    "MLP": "MLP feature",
    "Attn": "attention feature",
    "Embedding": "token embedding",
    "PositionEmbedding": "position embedding",
    "Error": "reconstruction error",
    "Bias": "bias",
    "Logit": "logit",
}


@dataclass(frozen=True)
class Column:
    """A column; a `marked` one is the root's."""

    name: str
    marked: bool = False


@dataclass(frozen=True)
class Node:
    """A node at (`row`, `column`), drawn with an area in proportion to |`size`|.

    `caption` is its short name, `part` says which of the picture's parts it belongs to, `facts` are the
    lines of its card, and `url` is a page about it.
    """

    name: str
    caption: str
    kind: str
    row: int
    column: int
    size: float
    facts: list[tuple[str, str]]
    label: str | None = None
    root: bool = False
    part: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Head:
    """One way that an edge takes; `look` is the key in the picture's `looks` that tells why the head looks there."""

    text: str
    look: str | None = None


@dataclass(frozen=True)
class Edge:
    """An edge from node `source` to node `target` (places in `nodes`).

    `strength` (0 or more) is what the filter goes by and what makes it wide; a `negative` one works
    against its target.
    """

    source: int
    target: int
    strength: float
    negative: bool
    text: str
    heads: list[Head]
    part: str | None = None


@dataclass(frozen=True)
class Look:
    """What makes one head look from one token to another: the score and the pairs of nodes behind it."""

    text: str
    pairs: list[str]


@dataclass(frozen=True)
class Picture:
    """A whole picture.

    `prompts` are texts in runs of (text, marked), `lines` the sentences below them. `columns_are` names
    what the columns are. `parts` maps the parts of a comparison to their names; a picture without parts
    is coloured by kind. `strength` and `size` say what an edge's and a node's number is, `percent`
    whether the strength is a share (else it is a count). `empty` is the sentence shown where there is no node.
    """

    title: str
    prompts: list[list[tuple[str, bool]]]
    lines: list[str]
    columns_are: str
    columns: list[Column]
    rows: list[str]
    nodes: list[Node]
    edges: list[Edge]
    strength: str
    size: str
    percent: bool
    empty: str
    looks: dict[str, Look]
    parts: dict[str, str]


def place(layer: int, site: str | None, kind: str) -> tuple[int, int]:
    """The order of rows: embeddings, attention and MLP of each layer, logits."""
    return (layer, 1 if site == "mlp" or kind == "MLP" else 0)


def row_name(layer: int, site: str | None, kind: str) -> str:
    """The name of the row that a node stands in."""
    if kind == "Logit":
        return "logits"
    if layer < 0:
        return "embeddings"
    return f"L{layer} {'mlp' if place(layer, site, kind)[1] else 'attn'}"


def caption(name: str, label: str | None) -> str:
    """What stands beside a node: its label, or its name without what its row and column tell."""
    return label or re.sub(r"^L\d+ ", "", name.partition(" @")[0])


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def number(value: Any) -> float | None:
    """The value as a float, None where it is missing or not finite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def text(value: Any) -> str | None:
    """The value where it is a text that says something."""
    return value if isinstance(value, str) and value else None


def facts(*given: tuple[str, str | float | None]) -> list[tuple[str, str]]:
    """The lines of a card, without those that were not measured."""
    return [(name, value if isinstance(value, str) else f"{value:.4g}") for name, value in given if value is not None]
