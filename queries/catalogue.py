"""The catalogue of questions: one .cypher file each, described by its own header comment.

A header is written once and read by everybody: by the person who pastes the file into Neo4j Browser, by
the command line for its options, and by `ask` for its checks and the types of its columns.

    // The question in one sentence?
    //
    // Parameters:
    //   name: type = default; e.g. example; what it means
    // Columns, in which order the rows come:
    //   name: type; what it means
    //   name*: type; what it means
    // In Neo4j Browser, first:
    //   :param {name: example}

A parameter without a default is required. Its type is string; integer or float, with the range it must
lie in (`integer 1..6`, `float 0..`); choices between bars (`DIRECT|OV`); or what it names by id (feature,
node, prompt, circuit) or by name (task), or a group of circuits by any of these (group: a circuit, prompt or task).
Defaults and examples are JSON. Columns are string, integer, float, boolean or list; those with
a star are the ones that a printed table shows.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from operator import index
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

from atlas.errors import AtlasError

Value = str | int | float | None

_PARAMETER = re.compile(r"(\w+): ([\w|]+)(?: (\d+)\.\.(\d*))?(?: = ([^;]+))?; e\.g\. ([^;]+); (.+)")
_NUMBERS = {"integer": "an integer", "float": "a number"}
WORDS = {"group": "circuit, prompt or task"}  # what a type is called where its name does not say it
_LARGEST = 1_000_000_000  # of an integer: the embedded engine's LIMIT takes no larger one
_COLUMN = re.compile(r"(\w+)(\*?): (\w+); (.+)")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a question; `default` counts only where it is not `required`."""

    name: str
    type: str
    least: float
    most: float
    required: bool
    default: Value
    example: Value
    meaning: str

    @property
    def choices(self) -> list[str]:
        return self.type.split("|") if "|" in self.type else []

    @property
    def takes(self) -> str:
        """What the parameter accepts, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.type not in _NUMBERS:
            return "a string" if self.type == "string" else f"a {WORDS.get(self.type, self.type)}, as a string"
        upper = f" to {self.most:.0f}" if self.most < _LARGEST else " or more"
        return f"{_NUMBERS[self.type]}, {self.least:.0f}{upper}"

    def check(self, value: object) -> Value:
        """The value as the database gets it; raises AtlasError where the parameter does not take it."""
        if value is None and not self.required and self.default is None:
            return None
        accepted = self._number(value) if self.type in _NUMBERS else self._text(value)
        if accepted is not None:
            return accepted
        raise AtlasError(f"{self.name} takes {self.takes}, not {value!r}.")

    def _number(self, value: object) -> Value:
        if isinstance(value, bool):
            return None
        if self.type == "integer" and isinstance(value, SupportsIndex):
            number = index(value)
        elif self.type == "float" and isinstance(value, SupportsFloat):
            number = float(value)
        else:
            return None
        return number if self.least <= number <= self.most else None

    def _text(self, value: object) -> Value:
        return value if isinstance(value, str) and value in (self.choices or [value]) else None


@dataclass(frozen=True)
class Column:
    """One column of a question's answer; a `star` makes it part of a printed table."""

    name: str
    star: str
    type: str
    meaning: str


@dataclass(frozen=True)
class Question:
    """One question: `cypher` is the text of the whole file, `order` says in which order the rows come."""

    name: str
    sentence: str
    parameters: tuple[Parameter, ...]
    columns: tuple[Column, ...]
    order: str
    browser: str
    cypher: str

    def check(self, given: Mapping[str, object]) -> dict[str, Value]:
        """All parameters with the values in `given` or their defaults; raises AtlasError on any that is wrong."""
        names = [parameter.name for parameter in self.parameters]
        for name in given:
            if name not in names:
                raise AtlasError(f"{self.name} has no parameter {name!r}{nearest(name, names)}.")
        for parameter in self.parameters:
            if parameter.required and given.get(parameter.name) is None:
                raise AtlasError(f"{self.name} needs {parameter.name}, {parameter.takes}: {parameter.meaning}.")
        if {"feature", "node"} <= {*names} and (given.get("feature") is None) == (given.get("node") is None):
            raise AtlasError(f"{self.name} starts from a feature or from a node: give one of the two.")
        return {p.name: p.check(given.get(p.name, p.default)) for p in self.parameters}


@cache
def questions() -> dict[str, Question]:
    """Every question by name."""
    files = sorted(Path(__file__).parent.glob("*.cypher"))
    return {file.stem: parse(file.stem, file.read_text(encoding="utf-8")) for file in files}


def question(name: str) -> Question:
    """The question of that name; raises AtlasError with the nearest ones where there is none."""
    if name not in questions():
        raise AtlasError(f"There is no question {name!r}{nearest(name, questions())}; `atlas queries` lists them.")
    return questions()[name]


def nearest(name: str, names: Iterable[str]) -> str:
    """`; nearest: ...` with up to three names that look alike, or nothing."""
    close = get_close_matches(name, list(names), n=3, cutoff=0.5)
    return "; nearest: " + ", ".join(close) if close else ""


def parse(name: str, cypher: str) -> Question:
    """Read a question from its file's text; raises ValueError where the header is not as it must be."""
    title, sections = _sections(cypher)
    order = next(heading for heading in sections if heading.startswith("Columns"))
    parameters = tuple(_parameter(line) for line in sections["Parameters"])
    columns = tuple(Column(*_parts(_COLUMN, line)) for line in sections[order])
    (browser,) = sections["In Neo4j Browser, first"]
    return Question(name, title, parameters, columns, order.removeprefix("Columns").lstrip(", "), browser, cypher)


def _sections(cypher: str) -> tuple[str, dict[str, list[str]]]:
    """The header's first sentence, and its indented lines by the heading above them."""
    title: list[str] = []
    sections: dict[str, list[str]] = {}
    lines: list[str] = title
    for raw in cypher.splitlines():
        if not raw.startswith("//"):
            break
        line = raw.removeprefix("//")
        if line.startswith("   "):
            lines.append(line.strip())
        elif line.endswith(":"):
            lines = sections[line.strip().removesuffix(":")] = []
        elif line.strip():
            title.append(line.strip())
    return " ".join(title), sections


def _parameter(line: str) -> Parameter:
    name, kind, least, most, default, example, meaning = _parts(_PARAMETER, line)
    span = float(least or 0), float(most or (_LARGEST if kind == "integer" else math.inf))
    return Parameter(name, kind, *span, not default, json.loads(default or "null"), json.loads(example), meaning)


def _parts(pattern: re.Pattern[str], line: str) -> tuple[str, ...]:
    match = pattern.fullmatch(line)
    if match is None:
        raise ValueError(f"the header's line {line!r} is not of the form {pattern.pattern}")
    return match.groups("")
