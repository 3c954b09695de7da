"""`atlas wild CORPUS`: multi-token circuits in running text (METHOD 8).

text -> windows -> one scan (ingest/scan.py) -> the strongest finds -> the sentences around them -> ingestion.

The scan goes over the corpus once; its state is written beside the store every CHECKPOINT seconds, at Ctrl-C and
at the end, so that the same command goes on where it stopped, and scans nothing twice. Of the best finds in SHOWN
windows or more, spans and seeds of chains in turn, at most PER_FEATURE a feature and PER_PHRASE a phrase are taken.
Each is looked for again, exactly, in the sentence around it, or in its window up to the sentence's end where the
sentence alone does not show it; what both do not show is left out. The feature at each token of the phrase is asked
for as a root.
With a budget in seconds, three quarters are for the scan.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click
import numpy as np
from jaxtyping import Int

import atlas
from atlas.cli import store_option
from atlas.errors import AtlasError
from atlas.store import Store
from ingest.circuits import CircuitRequest
from ingest.corpus import BEGINNING, Place, blocks, text_files
from ingest.job import Summary, Task, circuit_requests, prompt_id, run
from ingest.multitoken import RULE, THRESHOLD, check_length
from ingest.progress import progress_bar
from ingest.prompts import Prompt
from ingest.scan import Counted, Finds, Scanner
from ingest.setup import Setup, set_up

CHECKPOINT = 60.0  # seconds
PER_FEATURE, PER_PHRASE = 2, 3
SHOWN = 2  # windows; what a single one shows is no phrase
BEFORE = 40  # tokens of context at most, where no sentence begins nearer
ENDS = (".", "!", "?", "\n", ".”", '."', "!”", "?”")

Tell = Callable[[int, str], None]


@dataclass(frozen=True)
class Pick:
    """A find to ingest: a feature, the phrase it fires on, and the window's tokens with the phrase's place."""

    dictionary: str
    index: int
    score: float
    n_windows: int
    tokens: list[int]
    start: int
    length: int

    @property
    def name(self) -> str:
        """The feature's id."""
        return f"{self.dictionary}/{self.index}"

    @property
    def before(self) -> int:
        """How many tokens of the phrase stand before the first on which the feature fires: one for a seed."""
        return int(self.length == 1)


def checkpoint_path(store: Store, setup: Setup, files: list[Path]) -> Path:
    """Where the scan of these files with this replacement model is kept: beside the store, or here for a server."""
    corpus = [f"{file.name}:{file.stat().st_size}" for file in files]
    name = f"wild-{hashlib.sha256(' '.join([setup.record.id, *corpus]).encode()).hexdigest()[:12]}.npz"
    if store.engine == "embedded":
        folder = Path(store.address)
        return folder.with_name(f"{folder.name}.{name}")
    return Path(name)


def scan(
    scanner: Scanner,
    files: list[Path],
    checkpoint: Path,
    until: float,
    complain: Callable[[str], None],
    tell: Tell,
) -> Counted:
    """Scan on from the checkpoint to the end of the corpus, or until a time.monotonic(); `tell` hears how far it is."""
    place, counted, done = _load(checkpoint, scanner)
    if done:
        return counted
    saved = time.monotonic()
    try:
        for after, windows in blocks(files, scanner.setup.model, place, complain):
            counted, place = scanner.add(counted, windows, place.windows), after
            tell(counted.n_tokens, files[place.file].name)
            if time.monotonic() >= until:
                break
            if time.monotonic() - saved >= CHECKPOINT:
                _save(checkpoint, place, counted, done=False)
                saved = time.monotonic()
        else:
            done = True
    finally:
        _save(checkpoint, place, counted, done)
    return counted


def picks(scanner: Scanner, counted: Counted, length: int) -> Iterator[Pick]:
    """The best finds, spans and seeds in turn, while no feature and no phrase has had its share."""
    finds, frequency = counted.finds, counted.frequency
    score = finds.scores(frequency)
    order = score.argsort(kind="stable")[::-1]
    order = order[finds.columns["windows"][order] >= SHOWN]
    lengths = finds.columns["length"][order]
    spans, seeds = order[lengths >= length], order[lengths == 1]
    turns = [order[:0]] if not len(finds) else [spans, seeds]
    times: dict[str, int] = {}
    for rank in range(max(map(len, turns))):
        for rows in turns:
            if rank < len(rows):
                pick = _pick(scanner, counted, finds, int(rows[rank]), float(score[rows[rank]]))
                words = pick.tokens[pick.start - pick.before : pick.start + pick.length]
                phrase = scanner.setup.model.text(words).strip().lower()
                if times.get(pick.name, 0) < PER_FEATURE and times.get(phrase, 0) < PER_PHRASE:
                    times[pick.name] = times.get(pick.name, 0) + 1
                    times[phrase] = times.get(phrase, 0) + 1
                    yield pick


def _pick(scanner: Scanner, counted: Counted, finds: Finds, row: int, score: float) -> Pick:
    at = {name: int(column[row]) for name, column in finds.columns.items() if name not in ("key", "best", "carried")}
    dictionary, index = scanner.feature(at["feature"])
    tokens = counted.tokens[at["window"]].tolist()
    return Pick(dictionary.record.id, index, score, at["windows"], tokens, at["start"], at["length"])


def tasks(scanner: Scanner, chosen: Iterator[Pick], n_prompts: int, source: str) -> list[Task]:
    """Up to `n_prompts` prompts that show picks, each with the roots that its picks ask for."""
    setup = scanner.setup
    made: dict[str, Task] = {}
    for pick in chosen:
        if len(made) >= n_prompts:
            break
        for tokens, start in _excerpts(setup, pick):
            if _shows(setup, pick, tokens, start):
                specs = [f"{pick.name}@{start + k}" for k in range(pick.length)]
                requests = circuit_requests(setup, specs, RULE, THRESHOLD)
                id = prompt_id(setup, tokens)
                if id in made:
                    made[id] = replace(made[id], requests=_united(made[id].requests, requests))
                else:
                    made[id] = Task(_prompt(setup, pick, tokens, start, source), id, tokens, requests)
                break
    return list(made.values())


def _united(first: Sequence[CircuitRequest], second: Sequence[CircuitRequest]) -> list[CircuitRequest]:
    return list({request.stored: request for request in (*first, *second)}.values())


def _prompt(setup: Setup, pick: Pick, tokens: list[int], start: int, source: str) -> Prompt:
    found = {
        "feature": pick.name,
        "phrase": setup.model.text(tokens[start - pick.before : start + pick.length]),
        "score": round(pick.score, 3),
        "windows": pick.n_windows,
    }
    return Prompt(setup.model.text(tokens[1:]), f"a find of {pick.name}", task="wild", source=source, fields=found)


def _excerpts(setup: Setup, pick: Pick) -> Iterator[tuple[list[int], int]]:
    """The sentence around a pick, then the window up to its end; tokens with BOS first, and where the phrase begins."""
    ends = [i for i, token in enumerate(pick.tokens) if i and setup.model.token_text(token).rstrip(" ").endswith(ENDS)]
    last = pick.start + pick.length - 1
    stop = next((i for i in ends if i >= last), len(pick.tokens) - 1) + 1
    begin = max([i + 1 for i in ends if i < pick.start - 1] + [1, pick.start - BEFORE])
    for first in dict.fromkeys((begin, 1)):
        yield [pick.tokens[0], *pick.tokens[first:stop]], pick.start - first + 1


def _shows(setup: Setup, pick: Pick, tokens: list[int], start: int) -> bool:
    """Whether the feature fires, exactly encoded, on every token of the phrase."""
    dictionary = next(d for d in setup.dictionaries if d.record.id == pick.dictionary)
    site = setup.replace(tokens).site(dictionary.record.layer, dictionary.record.site)
    return all(site.find(start + k, pick.index) is not None for k in range(pick.length))


def _save(path: Path, place: Place, counted: Counted, done: bool) -> None:
    """The scan's state as one file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    arrays: dict[str, Any] = {
        "place": np.array([place.file, place.lines, place.windows, counted.n_tokens, done]),
        "rest": place.rest,
        "firings": counted.firings,
        "numbers": np.array(list(counted.tokens), dtype=np.int64),
        "tokens": np.array(list(counted.tokens.values()), dtype=np.int32),
        **{f"find_{name}": column for name, column in counted.finds.columns.items()},
    }
    with part.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def _load(path: Path, scanner: Scanner) -> tuple[Place, Counted, bool]:
    """Where the scan stopped; its beginning where there is no checkpoint."""
    if not path.exists():
        return BEGINNING, scanner.empty(), False
    try:
        with np.load(path) as saved:
            file, lines, windows, n_tokens, done = saved["place"].tolist()
            tokens: dict[int, Int[np.ndarray, " n_ctx"]] = dict(
                zip(saved["numbers"].tolist(), saved["tokens"], strict=True)
            )
            finds = Finds({name: saved[f"find_{name}"] for name in Finds.none().columns})
            counted = Counted(n_tokens, saved["firings"], finds, tokens)
            return Place(file, lines, saved["rest"], windows), counted, bool(done)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise AtlasError(f"The scan kept in {path} cannot be read; delete the file to scan anew.") from error


def _seconds(given: float | None) -> float:
    """The time that there is. Raises AtlasError where it is none."""
    if given is not None and not 0 < given < float("inf"):
        raise AtlasError(f"--seconds {given} is no time to stop in; give a number of seconds above 0.")
    return float("inf") if given is None else given


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--model", default="mini", show_default=True, help="mini, a model's directory, or a hub's name.")
@store_option
@click.option(
    "--prompts", default=100, show_default=True, type=click.IntRange(1), help="How many prompts are ingested."
)
@click.option(
    "--seconds",
    type=float,
    callback=lambda ctx, parameter, value: _seconds(value),
    help="Stop in time: scan for three quarters of it, then ingest.",
)
@click.option("--length", default=2, show_default=True, help="Tokens that a span has at least.")
def wild(corpus: Path, model: str, store: str | None, prompts: int, seconds: float, length: int) -> None:
    """Find features over whole phrases in a folder of text, and ingest the sentences that show them best.

    CORPUS is a folder of .txt or .txt.xz files. The scan is kept beside the store: the same command goes on with it.
    """
    began = time.monotonic()
    files = text_files(corpus)
    complaints: list[str] = []

    def complain(sentence: str) -> None:
        complaints.append(sentence)
        click.echo(f"Left out: {sentence}.", err=True)

    with progress_bar() as bar, atlas.connect(store) as opened:
        scanning = bar.add_task("Loading the model", total=None, rates="")
        setup = set_up(model)
        check_length(length, setup)
        scanner = Scanner(setup)
        started, first = time.monotonic(), [-1]

        def tell(n_tokens: int, file: str) -> None:
            first[0] = n_tokens if first[0] < 0 else first[0]
            rate = (n_tokens - first[0]) / (time.monotonic() - started)
            bar.update(scanning, description=f"Scanning {file}", rates=f"{n_tokens:,} tokens, {rate:,.0f} a second")

        path = checkpoint_path(opened, setup, files)
        counted = scan(scanner, files, path, began + 0.75 * seconds, complain, tell)
        if not counted.n_tokens:
            raise AtlasError(f"{corpus} has less text than one window of {setup.model.record.n_ctx - 1} tokens.")
        chosen = tasks(scanner, picks(scanner, counted, length), prompts, corpus.name)
        ingesting = bar.add_task("Ingesting", total=len(chosen), rates="")

        def ingested(summary: Summary) -> None:
            bar.update(ingesting, completed=summary.prompts + summary.skipped + summary.refused)

        summary = run(opened, setup, chosen, [], complain, ingested, began + seconds)
        address = opened.address
    click.echo(
        f"{counted.n_tokens:,} tokens scanned, {len(counted.finds):,} finds kept in {path}. {summary.prompts} prompts "
        f"with {summary.circuits} circuits written, {summary.skipped} already stored. Store: {address}"
    )
    if complaints:
        raise AtlasError(f"{len(complaints)} {'part' if len(complaints) == 1 else 'parts'} left out, see above.")
