"""The headers: every question has a function of its parameters, and what is wrong is said in a sentence."""

import inspect

import numpy as np
import pytest

import queries
from atlas.columns import returned_columns
from atlas.errors import AtlasError
from queries.catalogue import Question, parse, question, questions

HEADER = """\
// How many?
//
// Parameters:
//   n: integer 1..6 = 2; e.g. 3; a count
//   share: float 0.. = 0.5; e.g. 0.1; a share
//   via: DIRECT|OV = null; e.g. "OV"; a kind
//   feature: feature; e.g. "m/1"; a feature
//
// Columns, in order:
//   x*: string; a thing
//
// In Neo4j Browser, first:
//   :param {n: 3}
RETURN 1 AS x
"""


@pytest.fixture(params=sorted(questions()))
def each(request: pytest.FixtureRequest) -> Question:
    return question(request.param)


def test_the_function_takes_what_the_header_says(each: Question) -> None:
    store, *taken = inspect.signature(getattr(queries, each.name)).parameters.values()
    assert store.name == "store"
    types = {"integer": "int", "float": "float"}
    for parameter, argument in zip(each.parameters, taken, strict=True):
        assert argument.name == parameter.name
        assert parameter.required == (argument.default is inspect.Parameter.empty)
        if not parameter.required:
            assert argument.default == parameter.default
        optional = " | None" if not parameter.required and parameter.default is None else ""
        named = argument.annotation if isinstance(argument.annotation, str) else str(argument.annotation)
        assert named.removeprefix("<class '").removesuffix("'>") == types.get(parameter.type, "str") + optional


def test_the_columns_are_those_that_the_query_returns(each: Question) -> None:
    assert [column.name for column in each.columns] == returned_columns(each.cypher)
    assert any(column.star for column in each.columns)


def test_the_examples_are_accepted(each: Question) -> None:
    for parameter in each.parameters:
        assert parameter.check(parameter.example) == parameter.example


def test_every_function_is_a_question() -> None:
    assert set(queries.__all__) - {"Circuit", "batches"} == set(questions())


def test_defaults_fill_in_and_numbers_of_numpy_count() -> None:
    asked = parse("many", HEADER)
    assert asked.check({"feature": "a"}) == {"n": 2, "share": 0.5, "via": None, "feature": "a"}
    checked = asked.check({"feature": "a", "n": np.int64(4), "share": np.float32(0.25)})
    assert (checked["n"], checked["share"]) == (4, 0.25)
    assert type(checked["n"]) is int
    assert type(checked["share"]) is float


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "many needs feature, a feature, as a string: a feature"),
        ({"feature": 3}, "feature takes a feature, as a string, not 3"),
        ({"feature": "a", "n": 7}, "n takes an integer, 1 to 6, not 7"),
        ({"feature": "a", "n": 2.0}, "n takes an integer, 1 to 6, not 2.0"),
        ({"feature": "a", "n": True}, "n takes an integer, 1 to 6, not True"),
        ({"feature": "a", "n": None}, "n takes an integer"),
        ({"feature": "a", "share": -0.1}, "share takes a number, 0 or more, not -0.1"),
        ({"feature": "a", "share": float("nan")}, "share takes a number, 0 or more, not nan"),
        ({"feature": "a", "via": "direct"}, "via takes one of DIRECT, OV, not 'direct'"),
        ({"feature": "a", "featur": "b"}, "many has no parameter 'featur'; nearest: feature"),
    ],
)
def test_a_wrong_parameter_is_named(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(AtlasError) as error:
        parse("many", HEADER).check(given)
    assert sentence in str(error.value)


def test_an_unknown_question_names_the_nearest() -> None:
    with pytest.raises(AtlasError, match="There is no question 'upstrem'; nearest: upstream"):
        question("upstrem")


def test_a_header_that_is_not_as_it_must_be_is_refused() -> None:
    with pytest.raises(ValueError, match="a count"):
        parse("many", HEADER.replace("e.g. 3; ", ""))
