"""Measures the dictionaries of `mini` on held-out windows, and notes the figures in their cfg.json.

    python -m ingest.mini.measure --text FOLDER_OR_FILE... --model DIR --dictionaries DIR

Per dictionary, over all positions but 0 (BOS):

    l0                  mean number of active features
    explained_variance  1 - sum |y - y^|^2 / sum |y - mean y|^2
    dead_share          share of the features that never fire on the held-out text
    loss_kept           (L_zero - L_spliced) / (L_zero - L_clean), L the mean next-token cross entropy with
                        the site's output set to zero, replaced by its reconstruction, and as it is

and the last once more with all sites zeroed or spliced at once. The text must be the training text: its
held-out part is what the corpus keeps back. Prints a table in Markdown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from sae_lens import SAE
from tokenizers import Tokenizer

from atlas.errors import AtlasError
from ingest.mini.corpus import Corpus, text_files
from ingest.mini.sites import Replacement, Site, SiteModel, Values
from ingest.mini.train_model import loss_of

WINDOWS = 32
Batches = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Figures:
    """What was measured of one dictionary."""

    l0: float
    explained_variance: float
    dead_share: float
    loss_kept: float


@dataclass(frozen=True)
class Report:
    """The figures of every dictionary, the loss as it is, and what all splices at once keep and cost (nats)."""

    figures: Mapping[Site, Figures]
    loss_clean: float
    loss_all_spliced: float
    loss_all_zero: float

    @property
    def all_kept(self) -> float:
        return kept(self.loss_clean, self.loss_all_spliced, self.loss_all_zero)

    def markdown(self) -> str:
        """The table of the model card."""
        rows = ["| dictionary | L0 | explained variance | dead share | loss kept |", "|---|---|---|---|---|"]
        for site, f in self.figures.items():
            row = f"| {site.name} | {f.l0:.1f} | {f.explained_variance:.3f} | {f.dead_share:.3f} | {f.loss_kept:.3f} |"
            rows.append(row)
        rows.append(f"| all at once | | | | {self.all_kept:.3f} |")
        losses = (
            f"{self.loss_clean:.3f} clean, {self.loss_all_spliced:.3f} all spliced, {self.loss_all_zero:.3f} all zero"
        )
        return "\n".join([*rows, "", f"Mean held-out cross entropy in nats: {losses}."])


def kept(clean: float, spliced: float, zero: float) -> float:
    """The share of the loss between zero ablation and the clean model that a splice keeps."""
    return (zero - spliced) / (zero - clean)


def load_dictionaries(model: SiteModel, folder: Path) -> dict[Site, SAE[Any]]:
    """Every site's dictionary from `folder`/{layer}.{attn|mlp}, float32, flat in and flat out."""
    dictionaries: dict[Site, SAE[Any]] = {}
    for site in model.sites:
        if not (folder / site.name / "cfg.json").exists():
            raise AtlasError(f"{folder} has no dictionary {site.name}: train the dictionaries first")
        sae = SAE.load_from_disk(folder / site.name, dtype="float32")
        sae.turn_off_forward_pass_hook_z_reshaping()
        dictionaries[site] = sae.eval()
    return dictionaries


@torch.no_grad()
def mean_loss(model: SiteModel, batches: Batches, replacements: Mapping[Site, Replacement]) -> float:
    """Mean next-token cross entropy of windows [batch, pos] under `replacements`, nats."""
    with model.replaced(replacements):
        total = sum(float(loss_of(model.logits(tokens), tokens)) * len(tokens) for tokens in batches)
    return total / sum(len(tokens) for tokens in batches)


@torch.no_grad()
def reconstruction(model: SiteModel, batches: Batches, dictionaries: Mapping[Site, SAE[Any]]) -> dict[Site, Any]:
    """Per site (l0, explained_variance, dead_share), sums in float64."""
    sums: dict[Site, dict[str, torch.Tensor]] = {site: {} for site in dictionaries}
    for tokens in batches:
        recorded = model.record(tokens)
        for site, sae in dictionaries.items():
            x, y = (v[:, 1:].flatten(0, 1) for v in recorded[site])
            acts = sae.encode(x)
            parts = {
                "fired": (acts > 0).sum(0).double(),
                "error": (y - sae.decode(acts)).double().pow(2).sum(),
                "square": y.double().pow(2).sum(),
                "mean": y.double().sum(0),
                "tokens": torch.tensor(float(len(y)), dtype=torch.float64),
            }
            sums[site] = {name: part + sums[site].get(name, 0) for name, part in parts.items()}
    return {site: _shares(s) for site, s in sums.items()}


def _shares(s: Mapping[str, torch.Tensor]) -> tuple[float, float, float]:
    variance = s["square"] - s["mean"].pow(2).sum() / s["tokens"]
    l0 = s["fired"].sum() / s["tokens"]
    return float(l0), float(1 - s["error"] / variance), float((s["fired"] == 0).double().mean())


def _zero(_x: Values, y: Values) -> Values:
    return torch.zeros_like(y)


def measure(model: SiteModel, batches: Batches, dictionaries: Mapping[Site, SAE[Any]]) -> Report:
    """All figures on the given windows."""
    splices: dict[Site, Replacement] = {s: (lambda x, y, sae=sae: sae(x)) for s, sae in dictionaries.items()}
    zeros: dict[Site, Replacement] = dict.fromkeys(dictionaries, _zero)
    clean = mean_loss(model, batches, {})
    figures: dict[Site, Figures] = {}
    for site, (l0, explained, dead) in reconstruction(model, batches, dictionaries).items():
        spliced = mean_loss(model, batches, {site: splices[site]})
        zero = mean_loss(model, batches, {site: _zero})
        figures[site] = Figures(l0, explained, dead, kept(clean, spliced, zero))
    return Report(figures, clean, mean_loss(model, batches, splices), mean_loss(model, batches, zeros))


def note(report: Report, folder: Path) -> None:
    """Write each dictionary's figures into the metadata of its cfg.json."""
    for site, figures in report.figures.items():
        path = folder / site.name / "cfg.json"
        cfg = json.loads(path.read_text())
        cfg["metadata"] |= {name: round(value, 4) for name, value in asdict(figures).items()}
        path.write_text(json.dumps(cfg, indent=1) + "\n")


@click.command()
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", "directory", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--dictionaries", "folder", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--windows", type=int, help="Measure on about so many held-out windows, evenly spaced. [default: all]")
def main(texts: Sequence[Path], directory: Path, folder: Path, windows: int | None) -> None:
    """Measure the dictionaries in a folder, note the figures in their cfg.json and print the table."""
    model = SiteModel.load(directory)
    corpus = Corpus.read(text_files(texts), Tokenizer.from_file(str(directory / "tokenizer.json")))
    held_out = torch.cat(list(corpus.validation(WINDOWS, model.n_ctx)))
    chosen = held_out[:: max(1, len(held_out) // windows)] if windows else held_out
    report = measure(model, chosen.split(WINDOWS), load_dictionaries(model, folder))
    note(report, folder)
    click.echo(report.markdown())


if __name__ == "__main__":
    main()
