"""Features in the graph: made when something first names them, each IN its dictionary; they stay when a prompt goes."""

from collections.abc import Sequence
from typing import LiteralString

import neo4j

from atlas.batches import batches
from atlas.errors import AtlasError

_MISSING: LiteralString = "UNWIND $ids AS id OPTIONAL MATCH (f:Feature {id: id}) WITH id, f WHERE f IS NULL RETURN id"
_MAKE: LiteralString = """
UNWIND $rows AS row
MATCH (d:Dictionary {id: row.dictionary})
MERGE (f:Feature {id: row.id})
SET f.layer = d.layer, f.site = d.site, f.index = row.index
MERGE (f)-[:IN]->(d)
RETURN count(*) AS n
"""


def make_missing(transaction: neo4j.ManagedTransaction, features: Sequence[tuple[str, int]]) -> None:
    """Make those of the `features`, each given once by its dictionary's id and its index, that are not there yet.

    Raises AtlasError if one of them needs a dictionary that is not in the store.
    """
    for batch in batches(features):
        rows = [{"id": f"{d}/{index}", "dictionary": d, "index": index} for d, index in batch]
        unknown = {record["id"] for record in transaction.run(_MISSING, {"ids": [row["id"] for row in rows]})}
        missing = [row for row in rows if row["id"] in unknown]
        if not missing:
            continue
        made = transaction.run(_MAKE, {"rows": missing}).single(strict=True)["n"]
        if made != len(missing):
            raise AtlasError(f"{len(missing) - made} features are of dictionaries that are not in the store.")
