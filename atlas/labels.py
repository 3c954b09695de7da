"""`atlas labels import`: what features mean, in words, from Neuronpedia's exports and from tables.

A row names its feature by Neuronpedia's model and source, such as gpt2-small and 5-tres-dc, and an index; SOURCES
says which dictionaries of ours a source stands for, so its feature is `gpt2/5/mlp/tres-dc/<index>`. Labels can
only come to the dictionary that they were written for: another one at the same site has another id.
Its label is the last one read, `labels` keeps all of them from the oldest to the newest, each once, and reading a
file again changes nothing. Features that no prompt has made yet are made here, IN a Dictionary that holds its
layer and site until the dictionary itself is registered.

Rows are read as a stream and written in transactions of ROWS_PER_TRANSACTION features, those of a dictionary in one
statement; what a dictionary's features have in common is sent once.
"""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, LiteralString, cast

import click
import neo4j

from atlas.cli import store_option
from atlas.errors import AtlasError
from atlas.schema import prepare
from atlas.store import Store, connect
from atlas.text import HALF, has_half

# Neuronpedia's model and source (without the layer's number) -> the dictionary's id, and its site.
SOURCES = {
    ("gpt2-small", "tres-dc"): ("gpt2/{layer}/mlp/tres-dc", "mlp"),
    ("gpt2-small", "att-kk"): ("gpt2/{layer}/attn/att-kk", "attn"),
    ("gpt2-small", "att_32k-oai"): ("gpt2/{layer}/attn/att_32k-oai", "attn"),
    ("gpt2-small", "att_128k-oai"): ("gpt2/{layer}/attn/att_128k-oai", "attn"),
}
PAGE = "https://www.neuronpedia.org/{model}/{layer}-{source}/"
ROWS_PER_TRANSACTION = 2_000
FORMS = (".jsonl", ".json", ".csv")
NO_LABEL = ("", "Feature not found.")  # the second stands in tables of scored labels

_DICTIONARY: LiteralString = "MERGE (d:Dictionary {id: $dictionary}) ON CREATE SET d.layer = $layer, d.site = $site"
# Not MERGE: which features are there was read in the same transaction, and the key's constraint guards the rest.
_FEATURES: LiteralString = (
    "MATCH (d:Dictionary {id: $dictionary}) UNWIND $rows AS row "
    "CREATE (f:Feature {id: $dictionary + '/' + toString(row[0]), layer: $layer, site: $site, index: row[0], "
    "label: last(row[1]), labels: row[1], label_source: row[2], url: $page + toString(row[0])}) "
    "CREATE (f)-[:IN]->(d) RETURN count(*) AS n"
)
_KNOWN: LiteralString = (
    "UNWIND $ids AS id MATCH (f:Feature {id: id}) "
    "RETURN id, coalesce(f.labels, CASE WHEN f.label IS NULL THEN [] ELSE [f.label] END) AS labels"
)
_LABELS: LiteralString = (
    "UNWIND $rows AS row WITH row, $dictionary + '/' + toString(row[0]) AS id MATCH (f:Feature {id: id}) "
    "SET f += {label: last(row[1]), labels: row[1], label_source: row[2], url: $page + toString(row[0])} "
    "RETURN count(*) AS n"
)


@dataclass(frozen=True)
class Label:
    """One label of the feature `<dictionary>/<index>`; `source` says who or what wrote it.

    `page` is the address of the feature's page without its index.
    """

    dictionary: str
    layer: int
    site: str
    index: int
    text: str
    source: str
    page: str


@dataclass
class Summary:
    """What one import did: labels and features written, rows without a label, rows of unknown sources by name."""

    labels: int = 0
    features: int = 0
    empty: int = 0
    unknown: Counter[str] = field(default_factory=Counter[str])


class _BadRow(ValueError):
    """Why a row cannot be used, as the end of a sentence."""


def import_labels(
    store: Store, files: Sequence[Path], complain: Callable[[str], None], source: str | None = None
) -> Summary:
    """Write the labels of `files` and say what was done; `complain` gets a sentence for each row left out.

    A file is .jsonl (an object a line), .json (one list of objects) or .csv, each also as .gz or .xz. `source`,
    such as `gpt2-small/tres-dc`, is that of rows whose layer is a bare number without a model. Raises AtlasError,
    before anything is written, when a file or `source` cannot be used.
    """
    default = _checked(files, source)
    prepare(store)
    summary = Summary()
    rows = chain.from_iterable(_rows(file, complain) for file in files)
    batch: dict[str, list[Label]] = {}
    features: set[str] = set()
    for place, row in rows:
        try:
            label = _label(row, place.rsplit(":", 1)[0], default, summary)
        except _BadRow as error:
            complain(f"{place}: {error}")
            continue
        if label is None:
            continue
        batch.setdefault(f"{label.dictionary}/{label.index}", []).append(label)
        if len(batch) == ROWS_PER_TRANSACTION:
            _write(store, batch, summary, features)
            batch = {}
    if batch:
        _write(store, batch, summary, features)
    summary.features = len(features)
    return summary


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def labels() -> None:
    """Import labels of features."""


@labels.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--source",
    metavar="MODEL/SOURCE",
    help="What tables that name only a layer's number are about, such as gpt2-small/tres-dc.",
)
@store_option
def import_command(files: Sequence[Path], source: str | None, store: str | None) -> None:
    """Label features from Neuronpedia's exports (.jsonl, .json) or tables (.csv), also packed as .gz or .xz.

    Read are modelId, layer (such as 5-tres-dc), index, description and explanationModelName; a table may call
    them layer, feature and explanation. The last label read of a feature is its label; all are kept in `labels`.
    """
    left_out = 0

    def complain(sentence: str) -> None:
        nonlocal left_out
        left_out += 1
        click.echo(f"Left out: {sentence}.", err=True)

    _checked(files, source)  # before a store is made
    with connect(store) as opened:
        summary = import_labels(opened, files, complain, source)
        address = opened.address
    click.echo(f"{summary.labels} labels of {summary.features} features written. Store: {address}")
    if summary.empty:
        click.echo(f"{summary.empty} rows have no label.")
    for name, n in summary.unknown.most_common():
        click.echo(f"{n} labels of the unknown source {name} left out.", err=True)
    if left_out:
        raise AtlasError(f"{left_out} {'row was' if left_out == 1 else 'rows were'} left out, see above.")


def _checked(files: Sequence[Path], source: str | None) -> tuple[str, str] | None:
    """The model and source that `source` names. Raises AtlasError when a file or `source` cannot be used."""
    for file in files:
        try:
            with _open(file):
                pass
        except OSError as error:
            raise AtlasError(f"{file} cannot be read: {error.strerror or error}.") from error
    return None if source is None else _source(source)


def _source(name: str) -> tuple[str, str]:
    model, _, source = name.partition("/")
    if (model, source) not in SOURCES:
        known = ", ".join("/".join(key) for key in SOURCES)
        raise AtlasError(f"There is no source {name!r}; the sources are {known}.")
    return model, source


def _form(file: Path) -> str:
    """The form by the file's name, packed or not."""
    form = next((s for s in reversed(file.suffixes) if s not in (".gz", ".xz")), "")
    if form not in FORMS:
        raise AtlasError(f"{file} is none of {', '.join(FORMS)} (or these with .gz or .xz).")
    return form


def _open(file: Path) -> BinaryIO:
    _form(file)
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file))
    return cast(BinaryIO, lzma.open(file)) if file.suffix == ".xz" else file.open("rb")


def _rows(file: Path, complain: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with their places (`file:number`); what cannot be read is complained of."""
    read = {".jsonl": _json_lines, ".json": _json_list, ".csv": _table}[_form(file)]
    number = 0
    try:
        with _open(file) as stream:
            for number, row in read(stream):
                if isinstance(row, dict):
                    yield f"{file}:{number}", cast(dict[str, Any], row)
                else:
                    complain(f"{file}:{number}: {row if isinstance(row, _BadRow) else 'not an object'}")
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, UnicodeDecodeError) as error:
        complain(f"{file} cannot be read on after row {number} ({str(error).splitlines()[0]})")


def _json_lines(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, _parsed(line)


def _json_list(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    value = _parsed(stream.read())
    yield from enumerate(cast(list[object], value), 1) if isinstance(value, list) else [(1, value)]


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return _BadRow("not JSON in UTF-8")


def _table(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    for row in reader:
        short = None in row or None in row.values()
        yield reader.line_num, _BadRow("not as many fields as the header has") if short else row


def _label(row: dict[str, Any], file: str, default: tuple[str, str] | None, summary: Summary) -> Label | None:
    """The label that a row stands for; None, and counted, where it has none or its source is not known."""
    model, layer_and_source = row.get("modelId"), row.get("layer")
    if isinstance(layer_and_source, int) and not isinstance(layer_and_source, bool):
        layer_and_source = str(layer_and_source)
    if not isinstance(layer_and_source, str) or not isinstance(model, (str, type(None))):
        raise _BadRow("no model and layer")
    index = _index(row.get("index", row.get("feature")))
    text = row.get("description", row.get("explanation"))
    if not isinstance(text, (str, type(None))):
        raise _BadRow("its description is no text")
    layer, _, source = layer_and_source.partition("-")
    if model is None and not source:
        if default is None:
            raise _BadRow("it names no model and source; say --source MODEL/SOURCE")
        model, source = default
    known = SOURCES.get((model or "", source))
    if known is None or not re.fullmatch("[0-9]{1,3}", layer):
        name = f"{model}/{source}" if re.fullmatch("[0-9]{1,3}", layer) else f"{model}/{layer_and_source}"
        summary.unknown[name] += 1
        return None
    text = (text or "").strip()
    if text in NO_LABEL:
        summary.empty += 1
        return None
    written_by = row.get("explanationModelName")
    written_by = written_by if isinstance(written_by, str) and written_by else Path(file).name
    if has_half(text + written_by):
        raise _BadRow(f"its description holds {HALF}")
    dictionary, site = known
    page = PAGE.format(model=model, layer=int(layer), source=source)
    return Label(dictionary.format(layer=int(layer)), int(layer), site, index, text, written_by, page)


def _index(value: object) -> int:
    if not isinstance(value, bool) and isinstance(value, (int, str)) and re.fullmatch("[0-9]{1,9}", str(value)):
        return int(value)
    raise _BadRow("its index is no number from 0")


def _write(store: Store, batch: dict[str, list[Label]], summary: Summary, features: set[str]) -> None:
    store.write(lambda transaction: _write_batch(transaction, batch))
    summary.labels += sum(len(found) for found in batch.values())
    features.update(batch)


def _write_batch(transaction: neo4j.ManagedTransaction, batch: dict[str, list[Label]]) -> None:
    stored = {record["id"]: list(record["labels"]) for record in transaction.run(_KNOWN, {"ids": list(batch)})}
    groups: dict[tuple[str, bool], list[str]] = {}
    for id, found in batch.items():
        groups.setdefault((found[-1].dictionary, id in stored), []).append(id)
    written = 0
    for (dictionary, known), ids in groups.items():
        last = batch[ids[0]][-1]
        common = {"dictionary": dictionary, "layer": last.layer, "site": last.site, "page": last.page}
        if not known:
            transaction.run(_DICTIONARY, common).consume()
        rows = [_row(batch[id], stored.get(id, [])) for id in ids]
        written += transaction.run(_LABELS if known else _FEATURES, {**common, "rows": rows}).single(strict=True)["n"]
    if written != len(batch):
        raise AtlasError(f"{len(batch) - written} of {len(batch)} features could not be labelled; nothing was written.")


def _row(found: list[Label], before: list[str]) -> list[Any]:
    """A feature's index, all its labels from the oldest to the newest, each where it was last read, and the source."""
    newest_first = dict.fromkeys(reversed([*before, *(label.text for label in found)]))
    return [found[-1].index, list(newest_first)[::-1], found[-1].source]
