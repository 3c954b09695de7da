"""A store with a few prompts of two tasks, some features labelled, and the same prompts as pandas tables."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest

from atlas.store import Store
from atlas.wiring import Wire, write_wires
from atlas.writer import register, write_prompt
from tests.queries.expected import LABELS, Tables, feeds, tables
from tests.synthetic import synthetic_model, synthetic_prompt, synthetic_run


@dataclass(frozen=True)
class Filled:
    """A store with the same as tables; its circuits are of two tasks, by two rules, the first the more common.

    `often` is the number of prompts from which a chain of features is worth comparing.
    """

    store: Store
    tables: Tables
    tasks: tuple[str, str]
    rules: tuple[str, str]
    often: int


def fill(store: Store) -> Filled:
    """Five prompts: three of the task `stones`, one of `rivers`, one of none; one circuit under another rule."""
    tasks = ["stones", "stones", "stones", "rivers", None]
    prompts = [replace(synthetic_prompt(i, 4, 3, 0.4), task=task) for i, task in enumerate(tasks)]
    first = prompts[0].circuits[0]
    paper = replace(first, id=first.id.replace("/relative", "/paper"), rule="paper", members=first.members[-5:])
    paper = replace(paper, attribution=first.attribution[-5:], root=int(first.members[-1]))
    prompts[0] = replace(prompts[0], circuits=(*prompts[0].circuits, paper))
    run = synthetic_run()
    register(store, synthetic_model(), run)
    for prompt in prompts:
        write_prompt(store, prompt, run.id)
    set_labels = "UNWIND $rows AS row MATCH (f:Feature {id: row.id}) SET f.label = row.label"
    rows = [{"id": id, "label": label} for id, label in LABELS.items()]
    store.write(lambda transaction: transaction.run(set_labels, rows=rows).consume())
    return Filled(store, tables(prompts), ("stones", "rivers"), ("relative", "paper"), often=1)


def write_some_wires(store: Store, t: Tables) -> pd.DataFrame:
    """Virtual weights into features of both sites of layer 1, some of which the prompts use."""
    rng = np.random.default_rng(0)
    below = sorted({f for f in t.firings["feature"] if "/0/" in f})
    rows = []
    for via, site in (("MLP", "mlp"), ("OV", "attn")):
        fed = feeds(t)
        fed = fed[fed["target_feature"].str.contains(f"/1/{site}/")]
        for target, pairs in list(fed.groupby("target_feature"))[:6]:
            sources = dict.fromkeys([*pairs["source_feature"].unique()[:3], *below[:3]])
            weights = sorted(rng.normal(size=len(sources)), key=abs, reverse=True)
            for rank, (source, weight) in enumerate(zip(sources, weights, strict=True), 1):
                layer, head = (1, int(rng.integers(2))) if via == "OV" else (None, None)
                rows.append(Wire(source, target, via, layer, head, float(weight), rank))
    for via in ("MLP", "OV"):
        wires = [row for row in rows if row.via == via]
        write_wires(store, via, sorted({wire.target for wire in wires}), wires)
    return pd.DataFrame(rows).astype({"layer": "float64", "head": "float64"})


@pytest.fixture
def filled(store: Store) -> Filled:
    return fill(store)


@pytest.fixture
def filled_embedded(embedded_store: Store) -> Filled:
    return fill(embedded_store)


@pytest.fixture
def filled_neo4j(neo4j_store: Store) -> Filled:
    return fill(neo4j_store)
