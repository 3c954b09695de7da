"""DataFrames on the terminal, in a pipe and for machines.

`table` is drawn with lines and colours on a terminal and in plain aligned columns elsewhere; `csv` and
`json` carry every digit and nothing else. Text comes from prompts and labels: nothing in it may act on
the terminal, so what cannot be printed is shown by its escape.
"""

import json
import math
import sys
from typing import Any, cast

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atlas.text import visible

FORMATS = ("table", "csv", "json")


def print_frame(frame: pd.DataFrame, format: str) -> None:
    """Print the frame to standard output as `table`, `csv` or `json` (a list of objects)."""
    if format == "csv":
        sys.stdout.write(to_csv(frame))
    elif format == "json":
        print(to_json(frame))
    elif sys.stdout.isatty():
        Console(highlight=False).print(_drawn(frame))
    else:
        print(aligned(frame))


def to_csv(frame: pd.DataFrame) -> str:
    """Comma-separated values with a header line; lists and maps as JSON, missing values empty."""
    cells = [[_csv_cell(value) for value in row] for row in _rows(frame)]
    return pd.DataFrame(cells, columns=frame.columns, dtype=object).to_csv(index=False, lineterminator="\n")


def to_json(frame: pd.DataFrame) -> str:
    """A JSON list with one object per row; missing values null."""
    names = [str(name) for name in frame.columns]
    objects = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=str) for row in _rows(frame)]
    return "[" + ",\n ".join(objects) + "]"


def aligned(frame: pd.DataFrame) -> str:
    """Plain columns two spaces apart under their names, numbers to the right."""
    names = [str(name) for name in frame.columns]
    cells = [names, *([short(value) for value in row] for row in _rows(frame))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
    lines = ["  ".join(_pad(*cell) for cell in zip(row, widths, right, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def short(value: Any) -> str:
    """A value as a person reads it in a cell: four digits of a float, nothing for what is missing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return (
            "["
            + ", ".join(repr(item) if isinstance(item, str) else short(item) for item in cast(list[Any], value))
            + "]"
        )
    return visible(str(value))


def _drawn(frame: pd.DataFrame) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name, dtype in zip(frame.columns, frame.dtypes, strict=True):
        table.add_column(Text(str(name)), justify="right" if pd.api.types.is_numeric_dtype(dtype) else "left")
    for row in _rows(frame):
        table.add_row(*(Text(short(value)) for value in row))
    return table


def _rows(frame: pd.DataFrame) -> list[list[Any]]:
    """The values as plain Python objects, None where missing."""
    columns = [frame.iloc[:, i].astype(object).tolist() for i in range(frame.shape[1])]
    return [[_plain(value) for value in row] for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    return None if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)) else value


def _csv_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)
