"""`atlas ingest`: prompts in, circuits stored."""

import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import Progress

from atlas.cli import store_option
from atlas.errors import AtlasError
from atlas.quality import faults
from ingest.progress import progress_bar
from ingest.registry import parse_layers

if TYPE_CHECKING:
    from atlas.records import DictionaryRecord
    from ingest.faithfulness import Ablation
    from ingest.job import Summary
    from ingest.setup import Setup

THRESHOLDS = {"support": 0.05, "relative": 0.02, "top_mass": 0.5, "paper": 0.1}
LOGIT_THRESHOLDS = {"support": 0.01}  # where logits need another one to be faithful: docs/faithfulness.md

DTYPES = ("bfloat16", "float32", "float64")
DEVICES = ("cpu", "cuda")
UNITS = {"MB": 10**6, "GB": 10**9}

F = TypeVar("F", bound=Callable[..., Any])


def parse_memory(text: str) -> int:
    """The bytes that `6GB` or `800 MB` stands for. Raises AtlasError where it stands for none."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(MB|GB)\s*", text, re.IGNORECASE)
    if match is None:
        raise AtlasError(f"--memory {text!r} is no size; give one such as 6GB or 800MB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in their order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# What is computed with.
model_options = _together(
    click.option(
        "--model",
        default="mini",
        show_default=True,
        help="mini, a model's directory, or a hub's name such as gpt2 or NAME@REVISION.",
    ),
    click.option(
        "--dictionaries",
        multiple=True,
        metavar="NAME|DIR",
        help="A published set or a folder of dictionaries; may be repeated.  [default: the model's own]",
    ),
    click.option(
        "--layers",
        metavar="LAYERS",
        callback=lambda ctx, parameter, value: None if value is None else parse_layers(value),
        help="Take the dictionaries of these layers, such as 0-3,7, and treat the others as if they had none.",
    ),
)
# How it is computed.
computing_options = _together(
    click.option(
        "--dtype",
        default="float32",
        show_default=True,
        type=click.Choice(DTYPES),
        help="What the model computes in; the rest is computed in float32 at least.",
    ),
    click.option(
        "--device", default="cpu", show_default=True, type=click.Choice(DEVICES), help="What it is computed on."
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        callback=lambda ctx, parameter, value: None if value is None else parse_memory(value),
        help="Stay within SIZE, such as 6GB: open dictionaries when they are needed, and close them again.",
    ),
)


@click.command()
@click.argument("files", nargs=-1, metavar="FILE...")
@click.option("--text", "texts", multiple=True, help="A prompt given here; may be repeated.")
@model_options
@computing_options
@store_option
@click.option(
    "--roots",
    multiple=True,
    default=("default",),
    show_default=True,
    help='What to explain: default, logits, features, @POSITION, 2/mlp/812, " Paris", " Paris- Rome"; may be repeated.',
)
@click.option("--rule", default="support", show_default=True, help=f"Which nodes to keep: {', '.join(THRESHOLDS)}.")
@click.option(
    "--threshold",
    type=float,
    help=f"The rule's threshold.  [default: {str(THRESHOLDS)[1:-1]}; of logits {str(LOGIT_THRESHOLDS)[1:-1]}]",
)
@click.option(
    "--look-share",
    default=0.05,
    show_default=True,
    help="Say why a head looks at a token where it brings a feature at least this share of its pre-activation.",
)
@click.option("--truncate", is_flag=True, help="Cut prompts that are longer than the model's context.")
@click.option("--verify/--no-verify", default=True, help="Measure circuits in the real model, or leave that out.")
def ingest(
    files: Sequence[str],
    texts: Sequence[str],
    model: str,
    dictionaries: Sequence[str],
    layers: frozenset[int] | None,
    dtype: str,
    device: str,
    memory: int | None,
    store: str | None,
    roots: Sequence[str],
    rule: str,
    threshold: float | None,
    look_share: float,
    truncate: bool,
    verify: bool,
) -> None:
    """Trace prompts, find the circuits of their roots, and store them.

    FILE is .txt (a prompt a line), .jsonl (with `prompt`, optional `task`), .csv, or - for standard input.
    """
    if not files and not texts:
        raise AtlasError("Nothing to ingest: give a file, --text, or - for standard input.")
    logit_threshold = LOGIT_THRESHOLDS.get(rule) if threshold is None else None
    threshold = _threshold(rule, threshold)
    if not 0 < look_share <= 1:
        raise AtlasError(f"--look-share {look_share} is not a share: give a number above 0 and at most 1.")
    refusals: list[str] = []

    def complain(sentence: str) -> None:
        refusals.append(sentence)
        click.echo(f"Left out: {sentence}.", err=True)

    from ingest.prompts import prompt_given, read_prompts

    prompts = [prompt_given(text) for text in texts]
    prompts += [prompt for file in files for prompt in read_prompts(file, complain)]
    if not prompts:
        named = ("standard input" if file == "-" else file for file in files)
        raise AtlasError(f"There is no prompt in {', '.join(named)}.")

    with _Display() as display:
        import torch

        from ingest.job import circuit_requests, prepare_tasks, run
        from ingest.setup import set_up

        setup = set_up(model, getattr(torch, dtype), dictionaries, layers, memory, device)
        _warn_of(setup.record.dictionaries)
        _tell_of_missing(setup)
        requests = circuit_requests(setup, roots, rule, threshold, look_share, logit_threshold)
        tasks = prepare_tasks(setup, prompts, truncate, complain)
        if not tasks:
            raise AtlasError("No prompt is left to ingest; nothing was written.")

        import atlas

        with atlas.connect(store) as opened:
            display.start(len(tasks), opened.address)
            run(opened, setup, tasks, requests, complain, display.update, by=_to_the_mean(setup) if verify else None)
    if refusals:
        raise AtlasError(
            f"{len(refusals)} {'prompt was' if len(refusals) == 1 else 'prompts were'} left out, see above."
        )


@click.command()
@click.option("--circuit", "circuits", multiple=True, metavar="ID", help="Only this circuit; may be repeated.")
@model_options
@computing_options
@store_option
@click.option("--ablation", "kind", default="mean", show_default=True, help="Set features to: mean, zero, resample.")
def faithfulness(
    circuits: Sequence[str],
    model: str,
    dictionaries: Sequence[str],
    layers: frozenset[int] | None,
    dtype: str,
    device: str,
    memory: int | None,
    store: str | None,
    kind: str,
) -> None:
    """Measure stored circuits in the real model: what is left of the root without the rest, and without the circuit.

    Circuits that were measured by the same ablation are left as they are, so the command can be stopped and resumed.
    """
    import torch

    import atlas
    from ingest.measure_stored import measure_stored
    from ingest.setup import set_up

    console = Console(stderr=True)
    with (
        Progress(console=console, disable=not console.is_terminal) as bar,
        atlas.connect(store, create=False) as opened,
    ):
        task = bar.add_task("Loading the model", total=None)
        setup = set_up(model, getattr(torch, dtype), dictionaries, layers, memory, device)
        done = measure_stored(
            opened,
            setup,
            kind,
            circuits,
            lambda sentence: click.echo(f"Left out: {sentence}.", err=True),
            lambda state: bar.update(task, description="Measuring", total=state.prompts, completed=state.done),
        )
    click.echo(f"{done.circuits} circuits of {done.done} prompts measured ({kind} ablation).")


def _to_the_mean(setup: "Setup") -> "Ablation | None":
    """Ablation to the mean; where no means are known, nothing is measured, and a sentence says so."""
    from ingest.faithfulness import ablation

    try:
        return ablation(setup, "mean")
    except AtlasError as error:
        click.echo(f"The circuits are stored without their faithfulness. {error}", err=True)
        return None


def _warn_of(dictionaries: "Sequence[DictionaryRecord]") -> None:
    bad = {d.id: faults(explained_variance=d.explained_variance, loss_kept=d.loss_kept) for d in dictionaries}
    said = [f"{id} ({', '.join(found)})" for id, found in bad.items() if found]
    if said:
        click.echo(f"Warning: circuits through bad dictionaries say little: {', '.join(said)}.", err=True)


def _tell_of_missing(setup: "Setup") -> None:
    """Say where the model has no dictionary, and what that means there."""
    none = [d.record.layer for d in setup.dictionaries if d.record.site == "mlp" and not d.record.d_sae]
    for site, layers, means in (
        ("attention", setup.record.open_attention, "it passes through its frozen patterns"),
        ("MLP", none, "all that it writes is error"),
    ):
        if layers:
            click.echo(f"No dictionary for {site} in layers {', '.join(map(str, layers))}: {means}.", err=True)


def _threshold(rule: str, threshold: float | None) -> float:
    if rule not in THRESHOLDS:
        raise AtlasError(f"There is no rule {rule!r}; the rules are {', '.join(THRESHOLDS)}.")
    value = THRESHOLDS[rule] if threshold is None else threshold
    if not 0 <= value < (float("inf") if rule == "paper" else 1):
        raise AtlasError(f"Threshold {value} does not suit rule {rule}; it takes {_range(rule)}.")
    return value


def _range(rule: str) -> str:
    return "0 or more" if rule == "paper" else "0 or more, and less than 1"


class _Display:
    """A progress bar in a terminal, nothing in a pipe, and a summary in either."""

    def __init__(self) -> None:
        self._bar = progress_bar()
        self._task = self._bar.add_task("Loading the model", total=None, rates="")
        self._summary: Summary | None = None
        self._address = ""
        self._started = 0.0

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def start(self, n_prompts: int, address: str) -> None:
        self._started, self._address = time.monotonic(), address
        self._bar.update(self._task, description="Ingesting", total=n_prompts)

    def update(self, summary: "Summary") -> None:
        self._summary = summary
        seconds = time.monotonic() - self._started
        rates = (
            f"{summary.prompts / seconds:.1f} prompts/s, {summary.circuits / seconds:.0f} circuits/s, "
            f"{summary.edges / seconds:.0f} edges/s"
        )
        self._bar.update(self._task, completed=summary.prompts + summary.skipped + summary.refused, rates=rates)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._bar.stop()
        if self._summary is None:
            return
        s, seconds = self._summary, time.monotonic() - self._started
        stopped = "Stopped by Ctrl-C. " if kind is KeyboardInterrupt else ""
        click.echo(
            f"{stopped}{s.prompts} prompts with {s.circuits} circuits and {s.edges} edges written in {seconds:.1f} s, "
            f"{s.skipped} already stored, {s.refused} without an active root. Store: {self._address}",
            err=bool(stopped),
        )
