"""Many rows in several statements, so that none of them grows with the store."""

from collections.abc import Iterator, Sequence
from typing import LiteralString, TypeVar

from atlas.store import Store

ROWS_PER_STATEMENT = 10_000

T = TypeVar("T")


def batches(rows: Sequence[T], size: int = ROWS_PER_STATEMENT) -> Iterator[Sequence[T]]:
    """The rows, at most `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def delete_in_batches(store: Store, delete: LiteralString) -> None:
    """Run `delete` until nothing is left: it deletes `$most` at most, and returns as `n` how many it did."""
    while store.write(lambda transaction: transaction.run(delete, most=ROWS_PER_STATEMENT).single(strict=True)["n"]):
        pass
