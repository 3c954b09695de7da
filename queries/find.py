"""A circuit by its id or by any part of it."""

from atlas import Store
from atlas.errors import AtlasError

_FIND = "MATCH (c:Circuit) WHERE c.id CONTAINS $part RETURN c.id AS id ORDER BY id LIMIT 6"


def find(store: Store, part: str) -> str:
    """The id of the one circuit whose id is `part` or contains it; raises AtlasError unless there is one."""
    if len(store.read("MATCH (c:Circuit {id: $part}) RETURN c.id AS id", part=part)):
        return part
    found = [str(id) for id in store.read(_FIND, part=part)["id"]]
    if not found:
        raise AtlasError(f"No circuit's id contains {part!r}; `atlas query circuits --format csv` lists them.")
    if len(found) > 1:
        named = ", ".join(found[:5]) + (", and more" if len(found) > 5 else "")
        raise AtlasError(f"{part!r} is part of more than one circuit's id: {named}.")
    return found[0]
