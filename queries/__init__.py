"""Questions across prompts: Cypher in, DataFrames out.

    with atlas.connect() as store:
        queries.upstream(store, feature="mini/2/mlp/812", hops=3)

One function per question, with the name of its .cypher file in this folder. `batches` streams any of them,
and a `Circuit` is the DataFrame of one circuit, which turns into a graph.
"""

from queries.ask import batches
from queries.graph import Circuit
from queries.questions import (
    attention,
    circuit,
    circuit_nodes,
    circuits,
    coactive,
    consensus,
    diff,
    downstream,
    drivers_of_head,
    edges_between,
    errors,
    faithful,
    feature,
    find_features,
    motifs,
    prompts_of,
    qk_between,
    shared_features,
    similar_circuits,
    spans,
    specificity,
    strongest_paths,
    upstream,
    used,
    wired,
)

__all__ = [
    "Circuit",
    "attention",
    "batches",
    "circuit",
    "circuit_nodes",
    "circuits",
    "coactive",
    "consensus",
    "diff",
    "downstream",
    "drivers_of_head",
    "edges_between",
    "errors",
    "faithful",
    "feature",
    "find_features",
    "motifs",
    "prompts_of",
    "qk_between",
    "shared_features",
    "similar_circuits",
    "spans",
    "specificity",
    "strongest_paths",
    "upstream",
    "used",
    "wired",
]
