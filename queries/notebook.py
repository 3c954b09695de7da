"""A circuit drawn in a notebook by neo4j-viz: tokens across, layers upward, in the colours of the pages.

What one feature gives another over several heads is one arrow, as wide as the share of its target that
it carries; negative ones are red.
"""

from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from atlas.errors import AtlasError
from atlas.text import visible

if TYPE_CHECKING:
    from IPython.display import HTML

COLOURS = {
    "MLP": "#2a9d5c",
    "Attn": "#1f78b4",
    "Embedding": "#d99a00",
    "PositionEmbedding": "#a67c52",
    "Error": "#c0392b",
    "Bias": "#8e5bb5",
    "Logit": "#1b1e24",
}
_POSITIVE, _NEGATIVE = "#9aa5b8", "#c0392b"
_COLUMN, _ROW, _STEP = 90, 160, 80  # units between tokens, rows, and nodes of one cell
_VIEW = 300  # pixels from the middle of a notebook's cell to its edge
_SMALLEST, _LARGEST = 6, 36  # radius of a node


def render(nodes: pd.DataFrame, edges: pd.DataFrame, height: str) -> "HTML":
    """The rows of `circuit_nodes` and of `circuit` as HTML for a notebook; raises AtlasError without neo4j-viz."""
    try:
        import neo4j_viz
    except ImportError as error:
        raise AtlasError("render() draws with neo4j-viz: pip install 'circuit-atlas[notebook]'.") from error
    viz, placed = cast(Any, neo4j_viz), _placed(nodes)
    largest = placed["attribution"].abs().max() if len(placed) else 1.0
    drawn = [
        viz.Node(
            id=row.node,
            caption=visible(row.label if isinstance(row.label, str) else row.name_),
            size=_SMALLEST + (_LARGEST - _SMALLEST) * (abs(row.attribution) / (largest or 1.0)) ** 0.5,
            color=COLOURS.get(row.kind),
            x=row.x,
            y=row.y,
            properties=_said(row),
        )
        for row in _tuples(placed.rename(columns={"name": "name_"}))
    ]
    shares = pd.DataFrame(edges).groupby(["source", "target"], sort=False)["share"].sum().reset_index()
    arrows = [
        viz.Relationship(
            source=row.source,
            target=row.target,
            caption=f"{100 * row.share:.0f}%",
            color=_NEGATIVE if row.share < 0 else _POSITIVE,
            width=1 + 6 * min(1.0, abs(row.share)),
        )
        for row in _tuples(shares)
    ]
    extent = max(1.0, placed["x"].abs().max(), placed["y"].abs().max()) if len(placed) else 1.0
    return viz.VisualizationGraph(drawn, arrows).render(
        layout="free", height=height, pan_position=(0.0, 0.0), initial_zoom=min(1.0, _VIEW / extent)
    )


def _placed(nodes: pd.DataFrame) -> pd.DataFrame:
    """The nodes with `x` and `y`: side by side in a cell, the largest first, and each token as wide as it needs."""
    frame = pd.DataFrame(nodes).copy()
    frame["mlp"] = frame["name"].str.match(r"L\d+ mlp").fillna(False).astype(int)
    frame["row"] = frame["layer"].astype(int) * 2 + frame["mlp"]
    frame = frame.sort_values("attribution", key=lambda values: -values.abs(), kind="stable")
    cell = frame.groupby(["position", "row"])
    frame["place"], frame["many"] = cell.cumcount(), cell["row"].transform("size")
    widths = frame.groupby("position")["many"].max().sort_index() * _STEP + _COLUMN
    middle = widths.cumsum() - widths / 2
    frame["x"] = frame["position"].map(middle) + (frame["place"] - (frame["many"] - 1) / 2) * _STEP
    frame["y"] = -_ROW * frame["row"].rank(method="dense")
    frame[["x", "y"]] -= (frame[["x", "y"]].max() + frame[["x", "y"]].min()) / 2
    return frame


def _said(row: Any) -> dict[str, Any]:
    texts = {"name": row.name_, "kind": row.kind, "token": row.token, "feature": row.feature}
    said = {name: visible(value) for name, value in texts.items() if isinstance(value, str)}
    return {**said, "gives": row.attribution}


def _tuples(frame: pd.DataFrame) -> Any:
    return frame.itertuples(index=False)
