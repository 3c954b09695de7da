"""What a store holds: counts by label and relationship, the models, and the last runs."""

import pandas as pd

from atlas import Store

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
    runs = store.read(_RUNS)
    for started, status, prompts in zip(runs["started"], runs["status"], runs["prompts"], strict=True):
        rows.append(("run", f"{started}, {status}, {prompts} {'prompt' if prompts == 1 else 'prompts'}"))
    return pd.DataFrame(rows, columns=["what", "value"])
