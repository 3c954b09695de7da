"""`atlas dictionaries`: convert published dictionaries, and measure how good they are."""

from collections.abc import Sequence
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
