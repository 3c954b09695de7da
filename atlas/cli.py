"""The command `atlas`: a group that finds its commands through the entry points `atlas.commands`.

A command's module is imported only when that command runs or is described, so asking a question never
waits for the libraries of ingestion. Bad input ends with one sentence on standard error and status 2.
"""

import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, TypeVar

import click

from atlas.errors import AtlasError

F = TypeVar("F", bound=Callable[..., Any])


def store_option(command: F) -> F:
    """The option --store (or ATLAS_STORE) that every command shares; the parameter is `store: str`."""
    option = click.option(
        "--store",
        envvar="ATLAS_STORE",
        default="atlas-store",
        show_default=True,
        metavar="DIR|URI",
        help="Folder of the embedded database, or Bolt address of a Neo4j.",
    )
    return option(command)


class _Commands(click.Group):
    """Commands by entry point, loaded one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_found())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _found().get(cmd_name)
        return entry.load() if entry else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names with the sentences below: describing the commands must not import them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _SENTENCES.get(name, "")) for name in self.list_commands(ctx)])


_SENTENCES = {
    "browser": "Say where Neo4j Browser is, and check its style and saved queries.",
    "compare": "Draw two circuits over each other.",
    "cypher": "Run a Cypher query and print its rows.",
    "dictionaries": "Convert and measure dictionaries.",
    "faithfulness": "Measure stored circuits in the real model.",
    "ingest": "Trace prompts and store their circuits.",
    "labels": "Import labels of features.",
    "map": "Draw which feature feeds which over all prompts.",
    "multitoken": "Find circuits over several tokens.",
    "queries": "List the questions with their parameters.",
    "query": "Ask one of the questions by name.",
    "show": "Show a circuit as a tree or a picture.",
    "status": "Say what a store holds.",
    "wiring": "Store the strongest virtual weights.",
    "verify": "Check everything that must hold in a store.",
    "wild": "Find phrases in a corpus, and ingest them.",
}


def _found() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="atlas.commands")}


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("circuit-atlas"), prog_name="atlas")
def atlas() -> None:
    """A graph database of circuits in language models."""


def main() -> None:
    """Run the command line; the exit status is 2 on bad input and 130 after Ctrl-C."""
    try:
        sys.exit(atlas.main(prog_name="atlas", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except AtlasError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:
        if not _interrupted(error):
            raise
        click.echo("Interrupted.", err=True)
        sys.exit(130)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it, also where what was cut short complained while it was cleaned up."""
    while error and not isinstance(error, KeyboardInterrupt | click.Abort | SystemExit):
        error = error.__context__
    return isinstance(error, KeyboardInterrupt | click.Abort)
