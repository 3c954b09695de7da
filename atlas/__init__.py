"""The graph of circuits: what is stored, where, and how it gets there and back.

`connect` and `Store` are loaded on first use: the command line's help must not wait for the database driver.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.store import Store, connect

__version__ = version("circuit-atlas")
__all__ = ["AtlasError", "Store", "__version__", "connect"]


def __getattr__(name: str) -> object:
    if name not in ("Store", "connect"):
        raise AttributeError(f"module 'atlas' has no attribute {name!r}")
    from atlas import store

    return getattr(store, name)
