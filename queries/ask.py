"""Ask one question of the catalogue: check its parameters, run its Cypher, type its columns.

A question that finds nothing about a thing that the store does not know is a mistake of the asker, and
is told so with the nearest ids; a store that holds no such thing at all answers with an empty table.
"""

from collections.abc import Mapping

import pandas as pd

from atlas import Store
from atlas.errors import AtlasError
from queries.catalogue import Question, Value, nearest, question

_DTYPES = {"string": "string", "integer": "Int64", "float": "float64", "boolean": "boolean", "list": "object"}

# For each type of parameter that names a stored thing: the label and property to look it up by.
_STORED = {
    "feature": ("Feature", "id"),
    "node": ("CircuitNode", "id"),
    "prompt": ("Prompt", "id"),
    "circuit": ("Circuit", "id"),
    "task": ("Prompt", "task"),
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
    frame = typed(store.read(asked.cypher, **parameters), asked)
    if frame.empty:
        _refuse_unknown(store, asked, parameters)
    return frame


def typed(frame: pd.DataFrame, asked: Question) -> pd.DataFrame:
    """The frame with the question's columns and their dtypes."""
    names = [column.name for column in asked.columns]
    answer = frame[names].astype({column.name: _DTYPES[column.type] for column in asked.columns})
    answer.columns = pd.Index(names)
    return answer


def _refuse_unknown(store: Store, asked: Question, parameters: Mapping[str, Value]) -> None:
    for parameter in asked.parameters:
        value = parameters[parameter.name]
        if parameter.type not in _STORED or not isinstance(value, str):
            continue
        label, key = _STORED[parameter.type]
        if len(store.read(f"MATCH (n:{label} {{{key}: $value}}) RETURN n.{key} AS found LIMIT 1", value=value)):
            continue
        if candidates := _candidates(store, label, key, value):
            raise AtlasError(f"There is no {parameter.type} {value!r} in the store{nearest(value, candidates)}.")


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
