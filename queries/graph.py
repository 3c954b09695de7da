"""A circuit as a person handles it in Python: a table of edges that knows its nodes and becomes a graph."""

from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from atlas.errors import AtlasError
from queries.notebook import render

if TYPE_CHECKING:
    from IPython.display import HTML
    from networkx import MultiDiGraph

_EDGE = ["via", "layer", "head", "pattern", "weight", "share"]


class Circuit(pd.DataFrame):
    """The edges of a circuit, one row each, as `queries.circuit` returns them.

    `nodes` has one row for each of its nodes, those without an edge too. Rows taken from a circuit are a
    circuit of the same nodes: `circuit[circuit["share"].abs() >= 0.1].to_networkx()`.
    """

    _metadata = ["nodes"]  # noqa: RUF012  the name that pandas reads
    nodes: pd.DataFrame

    @property
    def _constructor(self) -> type["Circuit"]:
        return Circuit

    def to_networkx(self) -> "MultiDiGraph[str]":
        """The circuit as a networkx graph: nodes by id, and one edge per pair of nodes and head.

        Attributes are the columns of `nodes` and those of the edge; what is missing there has no attribute.
        An edge's key is DIRECT, or its head, such as `L2.H3`. Raises AtlasError if those columns were dropped,
        or the nodes by a merge or a concat.
        """
        self._check()
        import networkx

        graph: MultiDiGraph[str] = networkx.MultiDiGraph()
        for node in _records(self.nodes):
            graph.add_node(node.pop("node"), **node)
        edges = _records(pd.DataFrame(self)[["source", "target", *_EDGE]])
        for edge in edges:
            key = f"L{edge['layer']}.H{edge['head']}" if edge["via"] == "OV" else edge["via"]
            graph.add_edge(edge.pop("source"), edge.pop("target"), key=key, **edge)
        return graph

    def render(self, height: str = "600px") -> "HTML":
        """The circuit as a notebook shows it, by neo4j-viz; raises AtlasError where that is not installed."""
        self._check()
        return render(self.nodes, self, height)

    def _check(self) -> None:
        if lacking := [name for name in ["source", "target", *_EDGE] if name not in self.columns]:
            raise AtlasError(f"A graph needs the circuit's columns {', '.join(lacking)}; take them along.")
        if "nodes" not in self.__dict__:
            raise AtlasError("A merge or concat leaves the nodes behind; set `nodes` to the circuit's.")


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain Python objects under their columns' names, without what is missing."""
    rows = cast(list[dict[str, Any]], frame.astype(object).to_dict("records"))
    return [{name: value for name, value in row.items() if not pd.isna(value)} for row in rows]
