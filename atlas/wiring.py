"""Virtual weights in the graph: the strongest input-independent wires into a feature (METHOD 7).

(A)-[:VIRTUAL_WEIGHT {via, layer, head, weight, rank}]->(B): `via` is MLP, OV or QK, layer and head are those of the
head that it runs through, and `rank` counts from 1 among the wires into B of that `via` (for QK: and of that layer).
"""

from collections.abc import Sequence
from typing import LiteralString, NamedTuple

import neo4j

from atlas.batches import batches
from atlas.errors import AtlasError
from atlas.features import make_missing
from atlas.records import DictionaryRecord
from atlas.store import Store


class Wire(NamedTuple):
    """One virtual weight between two features, by their ids; layer and head are None for via MLP."""

    source: str
    target: str
    via: str
    layer: int | None
    head: int | None
    weight: float
    rank: int


def write_dictionaries(store: Store, dictionaries: Sequence[DictionaryRecord]) -> None:
    """Make sure of the dictionaries and of every feature in them: a wire may join features that never fired."""
    for dictionary in dictionaries:
        row = {"id": dictionary.id, "layer": dictionary.layer, "site": dictionary.site}
        store.write(
            lambda transaction, row=row: transaction.run(
                "MERGE (d:Dictionary {id: $row.id}) ON CREATE SET d.layer = $row.layer, d.site = $row.site", row=row
            ).consume()
        )
        for indices in batches(range(dictionary.d_sae)):
            features = [(dictionary.id, index) for index in indices]
            store.write(lambda transaction, features=features: make_missing(transaction, features))


def write_wires(
    store: Store, via: str, targets: Sequence[str], wires: Sequence[Wire], layer: int | None = None
) -> None:
    """Write the wires of one kind into `targets`, in place of the earlier ones; for QK, those of `layer`.

    One transaction. Raises AtlasError, and writes nothing, if a feature is not in the store.
    """

    def work(transaction: neo4j.ManagedTransaction) -> None:
        transaction.run(_DELETE, targets=list(targets), via=via, layer=layer).consume()
        rows = [wire._asdict() for wire in wires]
        for batch in batches(rows):
            written = transaction.run(_CREATE, rows=batch).single(strict=True)["n"]
            if written != len(batch):
                raise AtlasError(f"{len(batch) - written} virtual weights join features that are not in the store.")

    store.write(work)


_DELETE: LiteralString = """
UNWIND $targets AS target
MATCH (:Feature {id: target})<-[w:VIRTUAL_WEIGHT]-()
WHERE w.via = $via AND ($layer IS NULL OR w.layer = $layer)
DELETE w
"""
_CREATE: LiteralString = """
UNWIND $rows AS row
MATCH (a:Feature {id: row.source})
MATCH (b:Feature {id: row.target})
CREATE (a)-[:VIRTUAL_WEIGHT {via: row.via, layer: row.layer, head: row.head, weight: row.weight, rank: row.rank}]->(b)
RETURN count(*) AS n
"""
