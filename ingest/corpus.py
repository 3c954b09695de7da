"""A folder of text as windows of tokens, read file by file and never held whole.

Files (.txt, .txt.xz, in the order of their paths) are read in blocks of lines and cut into windows of n_ctx
tokens that begin with BOS; what is left of a file and does not fill a window is left out. A `Place` says how far
the reading got, so that it can go on there. A file that is not UTF-8 is named, and left where it is not.
"""

import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int

from atlas.errors import AtlasError
from ingest.model import LanguageModel

LINES = 500  # lines in a block


@dataclass(frozen=True)
class Place:
    """After `lines` lines of file number `file`, with `rest` tokens that fill no window yet, and `windows` in all."""

    file: int
    lines: int
    rest: Int[np.ndarray, " rest"]
    windows: int


BEGINNING = Place(0, 0, np.zeros(0, dtype=np.int64), 0)


def text_files(folder: Path) -> list[Path]:
    """The text files under a folder, or the file itself. Raises AtlasError when there is no text."""
    if not folder.exists():
        raise AtlasError(f"There is no {folder}; name a folder of .txt or .txt.xz files.")
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    found = [file for file in files if file.name.endswith((".txt", ".txt.xz")) and file.stat().st_size]
    if not found:
        raise AtlasError(f"There is no text in {folder}: .txt and .txt.xz files are read.")
    return found


def blocks(
    files: list[Path], model: LanguageModel, place: Place, complain: Callable[[str], None]
) -> Iterator[tuple[Place, Int[np.ndarray, "window n_ctx"]]]:
    """The windows of the corpus from `place` on, a block of lines at a time, each with the place after it."""
    size = model.record.n_ctx - 1
    for number in range(place.file, len(files)):
        if number > place.file:
            place = Place(number, 0, BEGINNING.rest, place.windows)
        for lines in _blocks(files[number], place.lines, complain):
            tokens = np.concatenate([place.rest, _encoded(lines, model)])
            n = len(tokens) // size
            found = np.pad(tokens[: n * size].reshape(n, size), ((0, 0), (1, 0)), constant_values=model.bos)
            place = replace(place, lines=place.lines + len(lines), rest=tokens[n * size :], windows=place.windows + n)
            yield place, found


def _blocks(file: Path, skip: int, complain: Callable[[str], None]) -> Iterator[list[str]]:
    """The lines of a file after the first `skip`."""
    opened = lzma.open if file.suffix == ".xz" else open
    read = skip
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="\n") as lines:
            rest = islice(lines, skip, None)
            while block := list(islice(rest, LINES)):
                read += len(block)
                yield block
    except UnicodeDecodeError:
        complain(f"{file} is not UTF-8 text; it was left after line {read}")
    except (OSError, lzma.LZMAError, EOFError) as error:
        complain(f"{file} cannot be read on after line {read}: {error}")


def _encoded(lines: list[str], model: LanguageModel) -> Int[np.ndarray, " n"]:
    encoded = model.tokenizer.backend_tokenizer.encode_batch(lines, add_special_tokens=False)
    return np.array([i for line in encoded for i in line.ids], dtype=np.int64)
