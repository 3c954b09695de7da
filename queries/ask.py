"""Ask one question of the catalogue: check its parameters, run its Cypher, type its columns.

A question that finds nothing about a thing that the store does not know is a mistake of the asker, and
is told so with the nearest ids; a store that holds no such thing at all answers with an empty table.
Everything goes through reads of `Store`, which cannot change it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import pandas as pd
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from atlas import Store
from atlas.errors import AtlasError
from queries.catalogue import WORDS, Question, Value, nearest, question

_DTYPES = {"string": "string", "integer": "Int64", "float": "float64", "boolean": "boolean", "list": "object"}

# For each type of parameter that names a stored thing: the labels and properties to look it up by.
_STORED = {
    "feature": [("Feature", "id")],
    "node": [("CircuitNode", "id")],
    "prompt": [("Prompt", "id")],
    "circuit": [("Circuit", "id")],
    "task": [("Prompt", "task")],
    "group": [("Circuit", "id"), ("Prompt", "id"), ("Prompt", "task")],
}
_CANDIDATES = 2000  # ids that a misspelt one is compared with


def ask(store: Store, name: str, given: Mapping[str, object]) -> pd.DataFrame:
    """The answer to the question `name`, its columns named and typed as its header says, also when empty.

    string columns are pandas' string, integer Int64, float float64 and list object; what was not
    measured is missing. Raises AtlasError for an unknown question, for an unknown, missing or wrong
    parameter, and for a feature, node, prompt, circuit or task that is not in the store.
    """
    asked = question(name)
    parameters = asked.check(given)
    frame = typed(store.read_columns(asked.cypher, **parameters), asked)
    if frame.empty:
        _refuse_unknown(store, asked, parameters)
    return frame


def batches(
    store: Store, name: str, /, *, size: int = 10_000, progress: bool = False, **given: object
) -> Iterator[pd.DataFrame]:
    """The answer to the question `name` in frames of at most `size` rows, each read when it is asked for.

        for frame in queries.batches(store, "edges_between", a=a, b=b):

    Together they are what the question's function returns, and there is always one, empty if need be;
    only `limit` is without bound unless it is given. `progress` counts the rows on the terminal or in the
    notebook. Raises AtlasError as `ask` does, for wrong parameters before anything is read.
    """
    if size < 1:
        raise AtlasError(f"size takes a number of rows, 1 or more, not {size!r}.")
    asked = question(name)
    unbounded = {p.name: int(p.most) for p in asked.parameters if p.name == "limit"}
    parameters = asked.check({**unbounded, **given})
    return _batches(store, asked, parameters, size, progress)


def _batches(
    store: Store, asked: Question, parameters: Mapping[str, Value], size: int, progress: bool
) -> Iterator[pd.DataFrame]:
    columns = SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} rows"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as shown:
        task = shown.add_task(asked.name, total=None)
        empty = True
        for frame in store.read_batches(asked.cypher, size=size, **parameters):
            empty = False
            shown.advance(task, len(frame))
            yield typed(frame, asked)
        if empty:
            _refuse_unknown(store, asked, parameters)
            yield typed(pd.DataFrame(columns=[column.name for column in asked.columns]), asked)


def typed(columns: Mapping[str, Any] | pd.DataFrame, asked: Question) -> pd.DataFrame:
    """A frame of the question's columns with their dtypes, from the values of each."""
    names = [column.name for column in asked.columns]
    arrays: dict[str, Any] = {
        c.name: cast(Any, pd).array(columns[c.name], dtype=_DTYPES[c.type]) for c in asked.columns
    }
    return pd.DataFrame(arrays, columns=pd.Index(names), copy=False)


def _refuse_unknown(store: Store, asked: Question, parameters: Mapping[str, Value]) -> None:
    for parameter in asked.parameters:
        value = parameters[parameter.name]
        if parameter.type not in _STORED or not isinstance(value, str):
            continue
        places = _STORED[parameter.type]
        if any(_is_stored(store, label, key, value) for label, key in places):
            continue
        if candidates := [near for label, key in places for near in _candidates(store, label, key, value)]:
            what = WORDS.get(parameter.type, parameter.type)
            raise AtlasError(f"There is no {what} {value!r} in the store{nearest(value, candidates)}.")


def _is_stored(store: Store, label: str, key: str, value: str) -> bool:
    return len(store.read(f"MATCH (n:{label} {{{key}: $value}}) RETURN n.{key} AS found LIMIT 1", value=value)) > 0


def _candidates(store: Store, label: str, key: str, value: str) -> list[str]:
    """Stored ids to compare a misspelt one with: those with its beginning, or else any."""
    for start in (value.rpartition("/")[0], ""):
        found = store.read(
            f"MATCH (n:{label}) WHERE n.{key} STARTS WITH $start RETURN DISTINCT n.{key} AS found LIMIT {_CANDIDATES}",
            start=start,
        )
        if len(found):
            return [str(text) for text in found["found"]]
    return []
