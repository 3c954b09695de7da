"""Pictures as files: `atlas compare`, `atlas map`, and the options --html, --svg and --png."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import atlas
from atlas.cli import store_option
from atlas.errors import AtlasError
from atlas.views import chromium
from atlas.views.compare import picture as compared
from atlas.views.map import EDGES
from atlas.views.map import picture as mapped
from atlas.views.page import page
from atlas.views.picture import Picture
from queries.find import find

F = TypeVar("F", bound=Callable[..., Any])

FILES = {
    "html": "Write a page for any browser: one file, no network.",
    "svg": "Write the figure as SVG; needs Chromium.",
    "png": "Write the figure as PNG; needs Chromium.",
}


def picture_options(command: F) -> F:
    """The options --html, --svg and --png that all drawing commands share."""
    for name, sentence in reversed(FILES.items()):
        command = click.option(f"--{name}", type=click.Path(dir_okay=False, path_type=Path), help=sentence)(command)
    return command


def write_picture(picture: Picture, html: Path | None, svg: Path | None, png: Path | None) -> None:
    """Write the files that are asked for, each whole or not at all; raises AtlasError where one cannot be written."""
    drawn = page(picture)
    if html:
        _write(html, drawn.encode())
    if svg or png:
        figure = chromium.svg(drawn)
        if svg:
            _write(svg, figure.encode())
        if png:
            _write(png, chromium.png(figure))
    click.echo(f"Written: {', '.join(str(path) for path in (html, svg, png) if path)}")


@click.command(name="compare")
@click.argument("a")
@click.argument("b")
@picture_options
@store_option
def compare_command(a: str, b: str, html: Path | None, svg: Path | None, png: Path | None, store: str | None) -> None:
    """Draw two circuits over each other: what both have, only A, only B.

    A and B are ids of circuits, or parts of them that no other circuit's id has. In one prompt nodes are
    compared where they stand; in two prompts a feature counts as the same at any token.
    """
    _demand(html, svg, png)
    with atlas.connect(store, create=False) as opened:
        picture = compared(opened, find(opened, a), find(opened, b))
    write_picture(picture, html, svg, png)
    click.echo(f"Nodes: {', '.join(picture.parts.values())}.")


@click.command(name="map")
@click.option("--edges", type=click.IntRange(1, 100_000), default=EDGES, show_default=True, help="Most edges.")
@picture_options
@store_option
def map_command(edges: int, html: Path | None, svg: Path | None, png: Path | None, store: str | None) -> None:
    """Draw which feature feeds which over all prompts of a store."""
    _demand(html, svg, png)
    with atlas.connect(store, create=False) as opened:
        picture = mapped(opened, edges)
    write_picture(picture, html, svg, png)
    click.echo(f"{picture.lines[0]}.")


def _demand(*files: Path | None) -> None:
    if not any(files):
        raise AtlasError("Say where the picture goes: --html FILE, --svg FILE or --png FILE.")


def _write(path: Path, content: bytes) -> None:
    """Beside its place first, so that an earlier file stays until the new one is whole."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}", delete=False) as file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise AtlasError(f"{path} cannot be written: {error.strerror or error}.") from error
