"""The questions as functions: each runs the .cypher file of its name and returns a DataFrame.

The columns and their order are told in the file's header, and by `atlas queries`; their names and
dtypes are the same when there are no rows. None for a parameter that is None by default means: whatever it is.
All raise AtlasError on a parameter of the wrong type and on a thing that is not in the store.
"""

import pandas as pd

from atlas import Store
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


def attention(store: Store, circuit: str, *, limit: int = 500) -> pd.DataFrame:
    """What made each head of a circuit look where it looked: the pairs of nodes behind its scores; one row each."""
    return ask(store, "attention", {"circuit": circuit, "limit": limit})


def qk_between(store: Store, a: str, b: str, *, limit: int = 200) -> pd.DataFrame:
    """Where feature `a` at the key and feature `b` at the query make a head look, the strongest pairs first."""
    return ask(store, "qk_between", {"a": a, "b": b, "limit": limit})


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


def find_features(
    store: Store,
    text: str | None = None,
    *,
    layer: int | None = None,
    site: str | None = None,
    min_prompts: int = 0,
    max_prompts: int | None = None,
    limit: int = 100,
) -> pd.DataFrame:
    """The features with `text` in their label, of a layer and site, that fire in so many stored prompts."""
    given = {"text": text, "layer": layer, "site": site}
    given |= {"min_prompts": min_prompts, "max_prompts": max_prompts, "limit": limit}
    return ask(store, "find_features", given)


def feature(store: Store, feature: str, *, top: int = 5) -> pd.DataFrame:
    """A feature's card: itself, its strongest prompts, what drives it most and what it drives most; one row each."""
    return ask(store, "feature", {"feature": feature, "top": top})


def coactive(
    store: Store, feature: str, *, task: str | None = None, prompts: int = 20, limit: int = 50
) -> pd.DataFrame:
    """The features that fire on the same tokens, in the `prompts` prompts on which `feature` fires most strongly."""
    return ask(store, "coactive", {"feature": feature, "task": task, "prompts": prompts, "limit": limit})


def spans(
    store: Store, feature: str | None = None, *, prompt: str | None = None, min_length: int = 2, limit: int = 100
) -> pd.DataFrame:
    """Where one feature is active on several tokens in a row, of one feature, in one prompt, or everywhere."""
    return ask(store, "spans", {"feature": feature, "prompt": prompt, "min_length": min_length, "limit": limit})


def downstream(
    store: Store,
    feature: str | None = None,
    *,
    node: str | None = None,
    hops: int = 2,
    min_share: float = 0.05,
    via: str | None = None,
    limit: int = 200,
) -> pd.DataFrame:
    """What a feature drives over all prompts, or one node, up to `hops` steps on.

    One row per step, source, target and head, as in `upstream`. Give one of `feature` and `node`.
    """
    given = {"feature": feature, "node": node, "hops": hops, "min_share": min_share, "via": via, "limit": limit}
    return ask(store, "downstream", given)


def strongest_paths(
    store: Store,
    circuit: str,
    *,
    source: str | None = None,
    hops: int = 6,
    min_product: float = 0.005,
    limit: int = 10,
) -> pd.DataFrame:
    """The paths through a circuit to its root with the largest product of shares, the heads named.

    They begin at the tokens' embeddings, or at the nodes of the feature `source`.
    """
    given = {"circuit": circuit, "source": source, "hops": hops, "min_product": min_product, "limit": limit}
    return ask(store, "strongest_paths", given)


def drivers_of_head(
    store: Store, layer: int, head: int, *, via: str | None = None, min_prompts: int = 1, limit: int = 100
) -> pd.DataFrame:
    """The pairs of features between which a head carries (OV), or for which it looks (QK), over all prompts."""
    given = {"layer": layer, "head": head, "via": via, "min_prompts": min_prompts, "limit": limit}
    return ask(store, "drivers_of_head", given)


def motifs(
    store: Store,
    *,
    min_prompts: int = 2,
    length: int = 2,
    feature: str | None = None,
    via: str | None = None,
    among: int = 300,
    limit: int = 50,
) -> pd.DataFrame:
    """The motifs A -> B, or with `length` 3 A -> B -> C, that at least `min_prompts` prompts show.

    Of length 3, the `limit` chains are counted whose rarer pair most prompts show, among the `among` most common
    pairs.
    """
    given = {"min_prompts": min_prompts, "length": length, "feature": feature}
    return ask(store, "motifs", given | {"via": via, "among": among, "limit": limit})


def consensus(
    store: Store, task: str, *, min_share: float = 0.5, rule: str | None = None, limit: int = 200
) -> pd.DataFrame:
    """The features, and the edges between them, in at least a share `min_share` of a task's circuits."""
    return ask(store, "consensus", {"task": task, "min_share": min_share, "rule": rule, "limit": limit})


def diff(store: Store, a: str, b: str, *, limit: int = 200) -> pd.DataFrame:
    """What differs between two circuits, or between all circuits of two prompts or two tasks.

    `a` and `b` are each the id of a circuit or of a prompt, or a task.
    """
    return ask(store, "diff", {"a": a, "b": b, "limit": limit})


def similar_circuits(store: Store, circuit: str, *, among: int = 100, limit: int = 20) -> pd.DataFrame:
    """The circuits made of the same features, weighted by attribution, among those that share one of its rarest.

    The rarest features are taken as long as the prompts in which they fire number at most `among`.
    """
    return ask(store, "similar_circuits", {"circuit": circuit, "among": among, "limit": limit})


def specificity(
    store: Store,
    a: str,
    b: str,
    *,
    c: str | None = None,
    task: str | None = None,
    via: str | None = None,
    head: int | None = None,
) -> pd.DataFrame:
    """How often the motif a -> b, or a -> b -> c, stands in a task's prompts and in all others, with a p-value."""
    return ask(store, "specificity", {"a": a, "b": b, "c": c, "task": task, "via": via, "head": head})


def errors(store: Store, *, task: str | None = None, rule: str | None = None) -> pd.DataFrame:
    """How much of the circuits runs through reconstruction errors, by task, layer and site."""
    return ask(store, "errors", {"task": task, "rule": rule})


def faithful(
    store: Store,
    *,
    task: str | None = None,
    rule: str | None = None,
    min_faithfulness: float | None = None,
    limit: int = 100,
) -> pd.DataFrame:
    """The circuits whose faithfulness was measured, the most faithful first."""
    given = {"task": task, "rule": rule, "min_faithfulness": min_faithfulness, "limit": limit}
    return ask(store, "faithful", given)


def wired(
    store: Store,
    *,
    show: str = "unused",
    feature: str | None = None,
    via: str | None = None,
    among: int = 1000,
    limit: int = 100,
) -> pd.DataFrame:
    """The strongest of the stored virtual weights, with the prompts that use them; by default those that none uses."""
    return ask(store, "wired", {"show": show, "feature": feature, "via": via, "among": among, "limit": limit})


def used(
    store: Store,
    *,
    show: str = "weak",
    feature: str | None = None,
    via: str | None = None,
    among: int = 1000,
    limit: int = 100,
) -> pd.DataFrame:
    """What feeds what in most prompts, with its virtual weight; by default where that is not among the strongest."""
    return ask(store, "used", {"show": show, "feature": feature, "via": via, "among": among, "limit": limit})
