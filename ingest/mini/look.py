"""Prints the top contexts of random features of `mini`, for a person to name them.

    python -m ingest.mini.look --features 100 --text FOLDER_OR_FILE... --model DIR --dictionaries DIR

Features are drawn over all dictionaries from a seed, among those that fire on the text read. A context is
the text before and after the token on which the feature fires, that token marked; at most one a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from ingest.mini.corpus import Corpus, text_files
from ingest.mini.measure import WINDOWS, load_dictionaries
from ingest.mini.sites import Site, SiteModel

BEFORE, AFTER = 12, 4


@dataclass(frozen=True)
class Found:
    """One site's drawn features over the windows read: per feature and window the maximum and where it is.

    values and positions [window, feature], features [feature], density [feature].
    """

    features: Int[torch.Tensor, " feature"]
    values: Float[torch.Tensor, "window feature"]
    positions: Int[torch.Tensor, "window feature"]
    density: Float[torch.Tensor, " feature"]


@torch.no_grad()
def search(
    model: SiteModel, windows: Int[torch.Tensor, "window pos"], folder: Path, n_features: int, seed: int
) -> dict[Site, Found]:
    """Where `n_features` features, about equally many of each dictionary, fire most; dead ones left out."""
    dictionaries = load_dictionaries(model, folder)
    rng = torch.Generator().manual_seed(seed)
    drawn = {s: torch.randperm(d.cfg.d_sae, generator=rng)[:n_features] for s, d in dictionaries.items()}
    parts: dict[Site, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {s: [] for s in dictionaries}
    for tokens in windows.split(WINDOWS):
        recorded = model.record(tokens)
        for site, sae in dictionaries.items():
            acts = sae.encode(recorded[site][0])[:, 1:, drawn[site]]
            values, positions = acts.max(dim=1)
            parts[site].append((values, positions + 1, (acts > 0).sum((0, 1))))
    found: dict[Site, Found] = {}
    for n, (site, rows) in enumerate(parts.items()):
        values, positions = (torch.cat([r[i] for r in rows]) for i in (0, 1))
        count = torch.stack([r[2] for r in rows]).sum(0)
        share = n_features // len(parts) + (n < n_features % len(parts))
        alive = (count > 0).nonzero()[:share, 0]
        density = count[alive] / (windows.shape[0] * (windows.shape[1] - 1))
        found[site] = Found(drawn[site][alive], values[:, alive], positions[:, alive], density)
    return found


def context(tokenizer: Tokenizer, window: Int[torch.Tensor, " pos"], position: int) -> str:
    """The text around one token, on one line, the token in double brackets."""
    ids = window.tolist()
    before, after = ids[max(1, position - BEFORE) : position], ids[position + 1 : position + 1 + AFTER]
    parts = (tokenizer.decode(before), tokenizer.decode([ids[position]]), tokenizer.decode(after))
    return "{}[[{}]]{}".format(*parts).replace("\n", "\\n")


@click.command()
@click.option("--features", "n_features", default=100, show_default=True)
@click.option("--contexts", "n_contexts", default=8, show_default=True)
@click.option("--windows", "n_windows", default=1500, show_default=True, help="Windows of training text to search.")
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", "directory", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--dictionaries", "folder", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--seed", default=0, show_default=True)
def main(
    n_features: int, n_contexts: int, n_windows: int, texts: Sequence[Path], directory: Path, folder: Path, seed: int
) -> None:
    """Print the top contexts of random features."""
    model = SiteModel.load(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    corpus = Corpus.read(text_files(texts), tokenizer)
    windows = corpus.batch(0, min(n_windows, corpus.n_windows(model.n_ctx)), model.n_ctx, seed)
    for site, found in search(model, windows, folder, n_features, seed).items():
        for n, feature in enumerate(found.features.tolist()):
            click.echo(f"\n{site.name} {feature}  density {float(found.density[n]):.5f}")
            top = found.values[:, n].topk(min(n_contexts, len(windows)))
            for value, window in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                if value > 0:
                    line = context(tokenizer, windows[window], int(found.positions[window, n]))
                    click.echo(f"  {value:7.2f}  {line}")


if __name__ == "__main__":
    main()
