"""The commands that read a store: `atlas query`, `queries`, `cypher` and `status`.

The options of `atlas query NAME` are the parameters in the question's header.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click
import pandas as pd

import atlas
import queries
from atlas.cli import store_option
from atlas.errors import AtlasError
from queries import catalogue
from queries.catalogue import Parameter, Question
from queries.render import FORMATS, print_frame
from queries.summary import summary

F = TypeVar("F", bound=Callable[..., Any])
WIRING = ("wired", "used")  # questions about virtual weights
ANY_WIRE = "MATCH ()-[w:VIRTUAL_WEIGHT]->() RETURN w.via AS via LIMIT 1"


def format_option(command: F) -> F:
    """The option --format that all printing commands share."""
    return click.option("--format", type=click.Choice(FORMATS), default="table", show_default=True)(command)


class _Questions(click.Group):
    """One command per question, made from its header when it is asked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(catalogue.questions())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        return _command(catalogue.question(cmd_name))


@click.group(cls=_Questions, subcommand_metavar="NAME [--PARAMETER VALUE]...")
def query() -> None:
    """Ask one of the questions by name; its --help tells its parameters and columns."""


@click.command()
@format_option
def list_queries(format: str) -> None:
    """List the questions with their parameters."""
    asked = catalogue.questions().values()
    if format == "table":
        click.echo("\n\n".join(_described(question) for question in asked))
        return
    rows = [{"name": q.name, "question": q.sentence, "parameters": [p.name for p in q.parameters]} for q in asked]
    print_frame(pd.DataFrame(rows), format)


def _described(asked: Question) -> str:
    lines = [click.style(asked.name, bold=True), f"  {asked.sentence}"]
    for parameter in asked.parameters:
        default = "required" if parameter.required else f"default {json.dumps(parameter.default)}"
        lines.append(f"    {_flag(parameter)}: {parameter.takes}; {default}; {parameter.meaning}")
    return "\n".join(lines)


@click.command()
@click.argument("cypher")
@click.option("--write", is_flag=True, help="Let the query change the store; without this it cannot.")
@store_option
@format_option
def cypher(cypher: str, write: bool, store: str | None, format: str) -> None:
    """Run a Cypher query and print its rows; it can change nothing unless --write is given.

    CYPHER is the query, or - to read it from standard input. What is changed by hand no longer need agree with
    the rest: `atlas verify` tells.
    """
    text = _standard_input() if cypher == "-" else cypher
    if not text.strip():
        raise AtlasError("There is no query: give it as an argument, or - and the query on standard input.")
    with atlas.connect(store, create=False) as opened:
        frame = opened.change(text) if write else opened.read(text)
    print_frame(frame, format)


@click.command()
@store_option
@format_option
def status(store: str | None, format: str) -> None:
    """Say what a store holds."""
    with atlas.connect(store, create=False) as opened:
        found = summary(opened)
    print_frame(found, format)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise AtlasError("The query on standard input is not UTF-8.") from error


def _command(asked: Question) -> click.Command:
    command = click.Command(
        asked.name,
        params=[_click_option(parameter) for parameter in asked.parameters],
        callback=_callback(asked),
        help=asked.sentence,
        epilog=_columns(asked),
    )
    explain = click.option("--explain", is_flag=True, help="Show how the database would find the answer, and stop.")
    return explain(store_option(format_option(command)))


def _callback(asked: Question) -> Callable[..., None]:
    function = cast(Callable[..., pd.DataFrame], getattr(queries, asked.name))
    starred = [column.name for column in asked.columns if column.star]

    def callback(store: str | None, format: str, explain: bool, **given: Any) -> None:
        with atlas.connect(store, create=False) as opened:
            if explain:
                click.echo(opened.explain(asked.cypher, **asked.check(given)))
                return
            frame = function(opened, **given)
            unwired = asked.name in WIRING and frame.empty and opened.read(ANY_WIRE).empty
        print_frame(frame[starred] if format == "table" else frame, format)
        if unwired:
            click.echo("This store has no virtual weights yet; `atlas wiring` computes them.", err=True)
        if format == "table" and len(frame) == given.get("limit"):
            click.echo(f"These are the first {len(frame)}; --limit asks for more.", err=True)

    return callback


def _click_option(parameter: Parameter) -> click.Option:
    kinds = {"integer": click.INT, "float": click.FLOAT}
    return click.Option(
        [_flag(parameter), parameter.name],
        type=click.Choice(parameter.choices) if parameter.choices else kinds.get(parameter.type, click.STRING),
        required=parameter.required,
        default=None if parameter.required else parameter.default,
        show_default=True,
        metavar=None if parameter.choices else parameter.type.upper(),
        help=f"{parameter.meaning}, such as {parameter.example}.",
    )


def _flag(parameter: Parameter) -> str:
    return "--" + parameter.name.replace("_", "-")


def _columns(asked: Question) -> str:
    """What the columns mean; the mark keeps click from joining the lines."""
    lines = [f"  {column.name}{column.star}: {column.meaning}" for column in asked.columns]
    title = f"Columns, {asked.order} (a table shows those with a star, csv and json all):"
    return "\b\n" + "\n".join([title, *lines])
