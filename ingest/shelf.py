"""The large matrices of dictionaries: opened when they are asked for, and held as far as memory allows.

Of all that is open, what was asked for longest ago is closed first. What is stored in the dtype in use is mapped from
its file, so that closing gives its pages back, and opening it again reads only what is looked at.
"""

import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float

from atlas.errors import AtlasError


class Matrices(NamedTuple):
    """A dictionary's encoder and decoder."""

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    W_dec: Float[torch.Tensor, "d_sae d_out"]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.W_enc.nbytes + self.W_dec.nbytes


class Shelf:
    """Holds up to `limit` bytes of matrices."""

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self._held: dict[Path, Matrices] = {}  # in the order in which they were last asked for

    def take(self, folder: Path, open: Callable[[], Matrices]) -> Matrices:
        """The matrices of the dictionary in `folder`, opened unless they are held.

        Raises AtlasError where they alone are more than the limit.
        """
        found = self._held.pop(folder, None) or open()
        if found.size > self._limit:
            raise AtlasError(
                f"--memory is too small: {_said(max(0, self._limit))} are left for dictionaries (half of what "
                f"the model leaves; the rest is for prompts), and {folder} takes {_said(found.size)}."
            )
        self._held[folder] = found
        while sum(matrices.size for matrices in self._held.values()) > self._limit:
            del self._held[next(iter(self._held))]
        return found


def _said(size: float | int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def shelf_within(memory: int | None) -> Shelf:
    """A shelf for a process that may take `memory` bytes, of which half of what is left now is for the prompts."""
    return Shelf() if memory is None else Shelf((memory - resident()) / 2)


def resident() -> int:
    """The bytes of memory that this process takes now, where the system says so, else the most that it took."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
