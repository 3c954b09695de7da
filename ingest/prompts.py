"""Prompts in: .txt (one a line), .jsonl (`prompt`, optional `task`, other fields kept), .csv, or `-`.

A row that cannot be used is named with its place and left out; the others go on.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from atlas.errors import AtlasError
from atlas.text import HALF, has_half

Complain = Callable[[str], None]


class _BadRow(ValueError):
    """Why a row cannot be used, as the end of a sentence."""


@dataclass(frozen=True)
class Prompt:
    """One text to explain; `where` says where it came from, for messages."""

    text: str
    where: str
    task: str | None = None
    source: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict[str, object])


def prompt_given(text: str) -> Prompt:
    """The prompt of one --text. Raises AtlasError where the argument was not UTF-8."""
    if has_half(text):
        raise AtlasError(f"--text {text!r} is not UTF-8 text; set the terminal to UTF-8, or give a file.")
    return Prompt(text, "--text")


def read_prompts(file: str, complain: Complain) -> Iterator[Prompt]:
    """The prompts of one file, or of standard input for `-`, which holds JSON lines or a prompt a line.

    Raises AtlasError when the file cannot be read at all; a single bad row goes to `complain`.
    """
    name, text = ("standard input", _decode(sys.stdin.buffer.read(), "standard input")) if file == "-" else _read(file)
    suffix = Path(file).suffix
    if file == "-":
        suffix = ".jsonl" if text.lstrip().startswith("{") else ".txt"
    if suffix == ".jsonl":
        yield from _json_lines(name, text, complain)
    elif suffix == ".csv":
        yield from _csv_rows(name, text, complain)
    else:
        for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
            if line.strip():
                yield Prompt(line, f"{name}:{number}", source=name)


def _read(file: str) -> tuple[str, str]:
    path = Path(file)
    if path.suffix not in (".txt", ".jsonl", ".csv"):
        raise AtlasError(f"{file} is not a .txt, .jsonl or .csv file; rename it, or pipe it in as `-`.")
    try:
        return path.name, _decode(path.read_bytes(), file)
    except OSError as error:
        raise AtlasError(f"{file} cannot be read: {error.strerror}.") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise AtlasError(f"{name} is not UTF-8 text (line {line}); save it as UTF-8.") from error


def _json_lines(name: str, text: str, complain: Complain) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = _parsed(line)
        except _BadRow as error:
            complain(f"{where} {error}")
            continue
        prompt = _from_row(row, name, where, complain)
        if prompt:
            yield prompt


def _parsed(line: str) -> dict[str, object]:
    """The object on a line, of which every part can be stored as JSON."""
    try:
        row = json.loads(line)
        again = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except json.JSONDecodeError as error:
        raise _BadRow(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _BadRow("is nested too deeply") from error
    except ValueError as error:  # allow_nan is about 1e999 too
        raise _BadRow("holds a number that cannot be kept: NaN, infinite, or of thousands of digits") from error
    if not isinstance(row, dict):
        raise _BadRow("is not a JSON object with a `prompt`")
    if has_half(again):
        raise _BadRow(f"holds {HALF}")
    return cast(dict[str, object], row)


def _csv_rows(name: str, text: str, complain: Complain) -> Iterator[Prompt]:
    header, rows = _table(text)
    if "prompt" not in header:
        raise AtlasError(f"{name} has no column `prompt`; its header has {', '.join(header or ['nothing'])}.")
    for number, row in rows:
        where = f"{name}:{number}"
        if None in row:
            complain(f"{where} has more columns than the header")
            continue
        prompt = _from_row({str(key): value for key, value in row.items() if value}, name, where, complain)
        if prompt:
            yield prompt


def _table(text: str) -> tuple[Sequence[str], list[tuple[int, dict[str | None, str]]]]:
    """The header and the rows with the numbers of their last lines; fields may be of any length."""
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        header = reader.fieldnames or ()
        return header, [(reader.line_num, cast(dict[str | None, str], row)) for row in reader]
    finally:
        csv.field_size_limit(limit)


def _from_row(row: Mapping[str, object], name: str, where: str, complain: Complain) -> Prompt | None:
    text, task, source = row.get("prompt"), row.get("task"), row.get("source")
    if not isinstance(text, str):
        complain(f"{where} has no text in `prompt`")
        return None
    for key, value in (("task", task), ("source", source)):
        if value is not None and not isinstance(value, str):
            complain(f"{where} has a `{key}` that is not text")
            return None
    rest = {key: value for key, value in row.items() if key not in ("prompt", "task", "source")}
    return Prompt(text, where, str(task) if task and str(task).strip() else None, str(source or name), rest)
