"""`atlas browser`: where Neo4j Browser is, and the style and the saved queries that it imports.

Browser imports by dropping files on its window: a `.grass` file becomes its style, and each `.cypher`
file of a zip a saved query, in the folder that it has in the zip and titled by its first line, which
must be a comment. Its reader of styles knows rules of properties and nothing else, no comment either,
and keeps silent about what it does not understand; `style_rules` says it instead.
"""

import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import click

import atlas
from atlas import Store
from atlas.cli import store_option
from atlas.errors import AtlasError
from queries.catalogue import questions

STYLE = "circuit-atlas.grass"
ARCHIVE = "circuit-atlas-queries.zip"
FOLDERS = ("Circuit atlas", "Circuit atlas questions")  # of the saved queries here, and of the questions
PROPERTIES = {
    "node": {"diameter", "border-color", "border-width", "color", "text-color-internal", "font-size", "caption"},
    "relationship": {"shaft-width", "padding", "color", "text-color-internal", "text-color-external", "font-size"}
    | {"caption"},
}
TIMEOUT = 10.0  # seconds

_HERE = Path(__file__).parent
_RULE = re.compile(r"\s*(node|relationship)((?:\.\w+)?)\s*\{((?:'[^']*'|[^'{}])*)\}\s*")
_PROPERTY = re.compile(r"\s*([\w-]+)\s*:\s*('[^':;]*'|[^':;]+);\s*")
_HTTP = "SHOW SETTINGS YIELD name, value WHERE name IN $names RETURN name, value"
_HTTPS_ON, _HTTPS, _HTTP_AT = (
    "server.https.enabled",
    "server.https.advertised_address",
    "server.http.advertised_address",
)


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"Write {STYLE} and {ARCHIVE} into this folder.",
)
@store_option
def browser(out: Path | None, store: str | None) -> None:
    """Print the address of Neo4j Browser, and check its style and saved queries.

    Drop the two files that --out writes on Browser's window: it imports them.
    """
    rules, saved = style_rules(style()), saved_queries()
    if out:
        write_files(out)
        click.echo(f"{out / STYLE}: {len(rules)} rules.\n{out / ARCHIVE}: {len(saved)} saved queries.")
    with atlas.connect(store, create=False) as opened:
        address = browser_address(opened)
        for name, cypher in saved.items():
            _explain(opened, name, cypher)
    click.echo(f"Neo4j Browser: {address}\nConnect URL: {opened.address}")
    click.echo(f"The style's {len(rules)} rules and the {len(saved)} saved queries can be imported.")
    if not out:
        click.echo("--out DIR writes them.")


def style() -> str:
    """The text of the style."""
    return (_HERE / STYLE).read_text(encoding="utf-8")


def style_rules(grass: str) -> dict[str, dict[str, str]]:
    """The properties of each rule of a style, by its selector; raises AtlasError where Browser would misread it."""
    rules: dict[str, dict[str, str]] = {}
    for tag, label, body in _in_turn(_RULE, grass):
        properties = dict(cast(Iterator[tuple[str, str]], _in_turn(_PROPERTY, body)))
        if unknown := set(properties) - PROPERTIES[tag]:
            raise AtlasError(f"The style's rule {tag}{label} has properties that Browser does not know: {unknown}.")
        rules[tag + label] = properties
    return rules


def saved_queries() -> dict[str, str]:
    """The saved queries by their path in the archive; raises AtlasError for one without a title."""
    here = {f"{FOLDERS[0]}/{file.name}": file.read_text(encoding="utf-8") for file in sorted(_HERE.glob("*.cypher"))}
    asked = {f"{FOLDERS[1]}/{name}.cypher": f"// {name}\n{question.cypher}" for name, question in questions().items()}
    for name, cypher in (saved := here | asked).items():
        if not re.match(r"// ?\w", cypher):
            raise AtlasError(f"The saved query {name} has no title: its first line must be a comment.")
    return saved


def write_files(folder: Path) -> None:
    """Write the style and the archive of the saved queries; raises AtlasError where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STYLE).write_text(style(), encoding="utf-8")
        with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, cypher in saved_queries().items():
                archive.writestr(name, cypher)
    except OSError as error:
        raise AtlasError(f"The folder {folder} cannot be written: {error.strerror}.") from error


def browser_address(store: Store) -> str:
    """The address of the Browser that comes with the store's server.

    Raises AtlasError for the embedded engine, which has none, and where nothing answers there.
    """
    if store.engine == "embedded":
        raise AtlasError(
            f"The store in {store.address} is on the embedded engine, which has no Browser; fill a Neo4j "
            "(`docker compose up --wait`) and name it with --store."
        )
    found = store.read(_HTTP, names=[_HTTPS_ON, _HTTPS, _HTTP_AT])
    settings = cast(dict[str, str], dict(zip(found["name"], found["value"], strict=True)))
    secure = settings.get(_HTTPS_ON) == "true"
    port = settings.get(_HTTPS if secure else _HTTP_AT, ":7474").rpartition(":")[2]
    address = f"{'https' if secure else 'http'}://{_host(store.address)}:{port}/browser/"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            served = "Neo4j Browser" in answer.read().decode(errors="replace")
    except (urllib.error.URLError, OSError) as error:
        raise AtlasError(f"No Browser answers at {address}; is the server's HTTP port published?") from error
    if not served:
        raise AtlasError(f"What answers at {address} is not Neo4j Browser.")
    return address


def _host(address: str) -> str:
    """The host of a Bolt address as it stands in one of HTTP, an IPv6 one in brackets."""
    host = urlsplit(address).hostname or "localhost"
    return f"[{host}]" if ":" in host else host


def _explain(store: Store, name: str, cypher: str) -> None:
    """Let the server compile a query; raises AtlasError with the query's name where it does not."""
    try:
        store.read("EXPLAIN " + cypher)
    except AtlasError as error:
        raise AtlasError(f"The saved query {name} does not run there: {error}") from error


def _in_turn(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, ...]]:
    """The groups of matches that follow each other from the first character to the last."""
    position = 0
    while text[position:].strip():
        match = pattern.match(text, position)
        if match is None:
            line = text[position:].strip().splitlines()[0]
            raise AtlasError(f"Browser would misread the style from {line!r} on.")
        yield match.groups()
        position = match.end()
