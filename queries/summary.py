"""What a store holds: counts by label and relationship, the models, and the last runs."""

import pandas as pd

from atlas import Store
from atlas.quality import LIMITS, faults
from atlas.runs import lost

_COUNTS = {
    "prompts": "MATCH (n:Prompt) RETURN count(n) AS n",
    "circuits": "MATCH (n:Circuit) RETURN count(n) AS n",
    "nodes": "MATCH (n:CircuitNode) RETURN count(n) AS n",
    "activations": "MATCH (n:Activation) RETURN count(n) AS n",
    "DIRECT edges": "MATCH ()-[r:DIRECT]->() RETURN count(r) AS n",
    "OV edges": "MATCH ()-[r:OV]->() RETURN count(r) AS n",
    "features that fire": "MATCH (f:Feature) WHERE EXISTS { MATCH (f)-[:FIRES_ON]->() } RETURN count(f) AS n",
    "dictionaries": "MATCH (n:Dictionary) RETURN count(n) AS n",
}
_MODELS = "MATCH (m:Model) RETURN m.id AS id ORDER BY id"
_QUALITIES = """
MATCH (d:Dictionary)
WHERE d.d_sae IS NOT NULL
RETURN d.id AS id, d.site AS site, d.explained_variance AS explained_variance, d.l0 AS l0,
       d.loss_kept AS loss_kept, d.error_share AS error_share, d.measured_on AS measured_on
ORDER BY d.layer, site, id
"""
_WORDS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "loss_kept": "loss kept",
    "error_share": "share of error",
}
_RUNS = """
MATCH (r:Run)
WITH r ORDER BY r.started_at DESC, r.id LIMIT 3
OPTIONAL MATCH (r)-[:WROTE]->(p:Prompt)
RETURN r.started_at AS started, r.status AS status, count(p) AS prompts, r.id AS id
ORDER BY started DESC, id
"""


def summary(store: Store) -> pd.DataFrame:
    """Rows of `what` (string) and `value` (an integer for counts, else a string), also for an empty store."""
    rows: list[tuple[str, object]] = [("store", store.address), ("engine", store.engine)]
    models = [str(model) for model in store.read(_MODELS)["id"]]
    rows.append(("models", ", ".join(models) or "none"))
    rows += [(what, int(store.read(cypher)["n"].iloc[0])) for what, cypher in _COUNTS.items()]
    rows += _qualities(store)
    runs, gone = store.read(_RUNS), lost(store)
    for started, status, prompts, id in runs.itertuples(index=False):
        status = "interrupted" if id in gone else status
        rows.append(("run", f"{started}, {status}, {prompts} {'prompt' if prompts == 1 else 'prompts'}"))
    return pd.DataFrame(rows, columns=["what", "value"])


def _qualities(store: Store) -> list[tuple[str, object]]:
    """How good the dictionaries of each site were when they were measured, and each that is bad."""
    found = store.read(_QUALITIES)
    rows: list[tuple[str, object]] = []
    for site, of_site in found.groupby("site"):
        known = of_site.dropna(subset=["explained_variance"])
        if known.empty:
            rows.append((f"{site} quality", "not measured: atlas dictionaries measure TEXT"))
            continue
        ranges = [
            f"{word} {known[name].astype(float).min():.2f} to {known[name].astype(float).max():.2f}"
            for name, word in _WORDS.items()
            if known[name].notna().any()
        ]
        rows.append((f"{site} quality", ", ".join(ranges)))
    for row in found.to_dict("records"):
        measured = {str(name): None if pd.isna(row[name]) else float(row[name]) for name in LIMITS}
        if bad := faults(**measured):
            rows.append(("bad dictionary", f"{row['id']}: {', '.join(bad)}"))
    return rows
