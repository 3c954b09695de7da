"""`atlas dictionaries`: convert published dictionaries, and measure how good they are."""

from collections.abc import Callable, Sequence
from pathlib import Path

import click


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
@click.option("--model", default="mini", show_default=True, help="mini, or a model's directory.")
@click.option("--tokens", type=click.IntRange(min=1), default=200_000, show_default=True, help="How many to read.")
def means_command(corpus: Sequence[Path], model: str, tokens: int) -> None:
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

        measured = measure_means(model, corpus, tokens, start)
    click.echo(f"Means of {measured.n_features} features over {measured.n_tokens} tokens: {measured.directory}")
