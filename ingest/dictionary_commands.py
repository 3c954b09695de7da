"""`atlas dictionaries`: convert published dictionaries, and measure how good they are."""

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from atlas.cli import store_option
from atlas.errors import AtlasError
from atlas.quality import faults
from ingest.cli import model_options


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def dictionaries() -> None:
    """Convert and measure dictionaries."""


@dictionaries.command("convert")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the dictionaries' folders go.")
def convert_command(files: Sequence[Path], out: Path) -> None:
    """Convert GPT-2's published MLP transcoders and attention SAEs, one folder L.mlp or L.attn for each layer L.

    FILE is a final_sparse_autoencoder_gpt2-small_blocks.L.ln2.hook_normalized_24576.pt of
    pchlenski/gpt2-transcoders, or a .pt of ckkissane/attn-saes-gpt2-small-all-layers with its _cfg.json beside it.
    Both are pickles, and nothing in them is run. Where a file lies in the hub's cache, the repository and the
    revision are recorded with its sha256. A folder that is there already is not touched.
    """
    from ingest.convert import convert

    for file in files:
        click.echo(f"{file.name} -> {convert(file, out)}")


@dictionaries.command("means")
@click.argument("corpus", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CORPUS...")
@model_options
@click.option("--tokens", type=click.IntRange(min=1), default=200_000, show_default=True, help="How many to read.")
def means_command(
    corpus: Sequence[Path], model: str, dictionaries: Sequence[str], layers: frozenset[int] | None, tokens: int
) -> None:
    """Measure every feature's mean activation over text, which mean ablation needs.

    CORPUS is text files (.txt, .txt.xz, or .json with a list of strings) or folders of them. The means are written
    beside the weights of each of the model's dictionaries.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ingest.means import measure_means

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Reading the corpus", total=None)

        def start(n_windows: int) -> Callable[[int], None]:
            bar.update(task, description="Measuring", total=n_windows)
            return lambda done: bar.advance(task, done)

        measured = measure_means(model, corpus, tokens, start, dictionaries, layers)
    click.echo(f"Means of {measured.n_features} features over {measured.n_tokens} tokens: {measured.directory}")


@dictionaries.command("measure")
@click.argument("text", type=click.Path(path_type=Path))
@model_options
@click.option("--tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="How many to read.")
@store_option
def measure_command(
    text: Path,
    model: str,
    dictionaries: Sequence[str],
    layers: frozenset[int] | None,
    tokens: int,
    store: str | None,
) -> None:
    """Measure how good dictionaries are on a text: explained variance, L0, loss kept, and the share of error.

    TEXT is a text file. The figures are written beside the weights of each dictionary, from where every later
    ingestion stores them, and noted on the dictionaries that the store holds already.
    """
    from dataclasses import asdict, replace

    from rich.console import Console
    from rich.progress import Progress

    import atlas
    from atlas.writer import record_quality
    from ingest.dictionaries import load_dictionary
    from ingest.quality import measure, text_windows, write_quality
    from ingest.setup import load_with_places

    loaded, places = load_with_places(model, dictionaries=dictionaries, layers=layers)
    windows = text_windows(loaded, text, tokens)
    measured_on = f"{text.name}, {windows[:, 1:].numel()} tokens"
    console = Console(stderr=True)
    click.echo(f"{'dictionary':<28} {'explained variance':>18} {'L0':>8} {'loss kept':>9} {'error share':>11}")
    records = []
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Measuring", total=len(places))
        for place in places:
            dictionary = load_dictionary(place.folder, loaded, place.origin)
            (quality,) = measure(loaded, [dictionary], windows)
            write_quality(place.folder, dictionary, quality, measured_on)
            records.append(replace(dictionary.record, **asdict(quality), measured_on=measured_on))
            said = f"{quality.explained_variance:>18.3f} {quality.l0:>8.1f} {quality.loss_kept:>9.3f}"
            bad = "   bad: " + ", ".join(found) if (found := faults(**asdict(quality))) else ""
            click.echo(f"{dictionary.record.id:<28} {said} {quality.error_share:>11.3f}{bad}")
            bar.advance(task)
    try:
        with atlas.connect(store, create=False) as opened:
            click.echo(f"{record_quality(opened, records)} dictionaries noted in {opened.address}.")
    except AtlasError as error:
        click.echo(f"No store was touched: {error}", err=True)
