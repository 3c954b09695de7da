"""The questions as functions: each runs the .cypher file of its name and returns a DataFrame.

The columns and their order are told in the file's header, and by `atlas queries`; their names and
dtypes are the same when there are no rows. None for a parameter means: whatever it is.
All raise AtlasError on a parameter of the wrong type and on a thing that is not in the store.
"""

import pandas as pd

from atlas import Store
from atlas.errors import AtlasError
from queries.ask import ask
from queries.graph import Circuit


def circuits(
    store: Store,
    *,
    prompt: str | None = None,
    feature: str | None = None,
    task: str | None = None,
    rule: str | None = None,
    limit: int = 100,
) -> pd.DataFrame:
    """The stored circuits of a prompt, of a task, under a rule, or that include a feature; one row each."""
    given = {"prompt": prompt, "feature": feature, "task": task, "rule": rule, "limit": limit}
    return ask(store, "circuits", given)


def circuit(store: Store, circuit: str) -> Circuit:
    """The edges between a circuit's nodes, with both ends and their attributions; one row each.

    It has its nodes, as `circuit_nodes` returns them, in `.nodes`, and `.to_networkx()`.
    """
    edges = Circuit(ask(store, "circuit", {"circuit": circuit}))
    edges.nodes = circuit_nodes(store, circuit)
    return edges


def circuit_nodes(store: Store, circuit: str) -> pd.DataFrame:
    """The nodes of a circuit with what each gives to its root, the largest of either sign first."""
    return ask(store, "circuit_nodes", {"circuit": circuit})


def upstream(
    store: Store,
    feature: str | None = None,
    *,
    node: str | None = None,
    hops: int = 2,
    min_share: float = 0.05,
    via: str | None = None,
    limit: int = 200,
) -> pd.DataFrame:
    """What drives a feature over all prompts, or one node, up to `hops` steps back.

    One row per step, source, target and head, aggregated over the prompts. Edges are followed that
    make up at least `min_share` of their target's pre-activation. Give one of `feature` and `node`.
    """
    if (feature is None) == (node is None):
        raise AtlasError("upstream starts from a feature or from a node: give one of the two.")
    given = {"feature": feature, "node": node, "hops": hops, "min_share": min_share, "via": via, "limit": limit}
    return ask(store, "upstream", given)


def prompts_of(store: Store, feature: str, *, task: str | None = None, limit: int = 50) -> pd.DataFrame:
    """The prompts in which a feature fires, strongest first, with the tokens it fires on marked."""
    return ask(store, "prompts_of", {"feature": feature, "task": task, "limit": limit})


def edges_between(
    store: Store, a: str, b: str, *, via: str | None = None, head: int | None = None, limit: int = 200
) -> pd.DataFrame:
    """The edges from feature `a` to feature `b` in every prompt, the largest share first."""
    return ask(store, "edges_between", {"a": a, "b": b, "via": via, "head": head, "limit": limit})


def shared_features(
    store: Store,
    task: str,
    *,
    min_share_of_prompts: float = 0.5,
    layer: int | None = None,
    site: str | None = None,
    rule: str | None = None,
    limit: int = 100,
) -> pd.DataFrame:
    """The features that the circuits of many of a task's prompts include, the most widely shared first."""
    given = {
        "task": task,
        "min_share_of_prompts": min_share_of_prompts,
        "layer": layer,
        "site": site,
        "rule": rule,
        "limit": limit,
    }
    return ask(store, "shared_features", given)


def attention(store: Store, circuit: str, *, limit: int = 500) -> pd.DataFrame:
    """What made each head of a circuit look where it looked: the pairs of nodes behind its scores; one row each."""
    return ask(store, "attention", {"circuit": circuit, "limit": limit})


def qk_between(store: Store, a: str, b: str, *, limit: int = 200) -> pd.DataFrame:
    """Where feature `a` at the key and feature `b` at the query make a head look, the strongest pairs first."""
    return ask(store, "qk_between", {"a": a, "b": b, "limit": limit})
