"""Questions across prompts: Cypher in, DataFrames out.

    with atlas.connect() as store:
        queries.upstream(store, feature="mini/2/mlp/812", hops=3)

One function per question, with the name of its .cypher file in this folder.
"""

from queries.questions import circuit, circuits, edges_between, prompts_of, shared_features, upstream

__all__ = ["circuit", "circuits", "edges_between", "prompts_of", "shared_features", "upstream"]
