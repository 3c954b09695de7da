"""`atlas dictionaries means`: the mean activation of every feature over a corpus, kept with its dictionary.

Mean ablation (METHOD 6) sets a feature to what it is on average, which text alone tells:

    mean_i = 1/|T| sum over t in T of a_i(t)        T: the tokens of windows drawn at random, BOS left out

The means lie beside the dictionary's weights as `means.safetensors`, with the weights' sha256, so that they
are never used with others, and with the names of the files that were read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save

from atlas.errors import AtlasError, cause
from ingest.dictionaries import MEANS, Dictionary, load_dictionary, write_beside
from ingest.mini.corpus import Corpus, text_files
from ingest.model import LanguageModel
from ingest.setup import load_with_places

BATCH = 2048  # tokens that go through the model at once


@dataclass(frozen=True)
class Measured:
    """What was measured: of how many features, over how many tokens, written where."""

    directory: Path
    n_features: int
    n_tokens: int


def corpus_windows(model: LanguageModel, files: Sequence[Path], n_tokens: int) -> Int[torch.Tensor, "window pos"]:
    """About `n_tokens` tokens of the corpus, in windows of the model's context drawn at random from seed 0.

    Raises AtlasError when there is no text, when it is not UTF-8, or when it is shorter than two windows.
    """
    try:
        corpus = Corpus.read(files, model.tokenizer.backend_tokenizer)
    except (OSError, ValueError) as error:
        names = ", ".join(str(file) for file in files)
        raise AtlasError(f"The corpus {names} cannot be read as UTF-8 text ({cause(error)}).") from error
    n_ctx = model.record.n_ctx
    available = corpus.n_windows(n_ctx)
    if available < 1:
        raise AtlasError(f"The corpus has {len(corpus.train)} tokens, and at least {3 * n_ctx} are needed.")
    return corpus.batch(0, min(available, max(1, n_tokens // (n_ctx - 1))), n_ctx, seed=0)


@torch.no_grad()
def activations(
    model: LanguageModel, dictionaries: Sequence[Dictionary], windows: Int[torch.Tensor, "window pos"]
) -> list[Float[torch.Tensor, "token d_sae"]]:
    """What each dictionary's features are on windows that begin with BOS, which is left out."""
    wanted = {dictionary.record.hook_in for dictionary in dictionaries}
    _, cache = model.bridge.run_with_cache(windows.to(model.device), names_filter=lambda name: name in wanted)
    read = [cache[d.record.hook_in][:, 1:].flatten(0, 1).flatten(1).to(d.b_enc) for d in dictionaries]
    return [d.activations(x) for d, x in zip(dictionaries, read, strict=True)]


def feature_means(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    windows: Int[torch.Tensor, "window pos"],
    progress: Callable[[int], None],
) -> list[Float[torch.Tensor, " d_sae"]]:
    """The means of every dictionary's features; `progress` is told how many windows each step took."""
    total = [torch.zeros_like(d.b_enc, dtype=torch.float64) for d in dictionaries]
    for batch in windows.split(max(1, BATCH // windows.shape[1])):
        found = activations(model, dictionaries, batch)
        total = [before + a.sum(0, dtype=torch.float64) for before, a in zip(total, found, strict=True)]
        progress(len(batch))
    return [each / windows[:, 1:].numel() for each in total]


def write_means(
    folder: Path, dictionary: Dictionary, mean: Float[torch.Tensor, " d_sae"], source: Mapping[str, str]
) -> None:
    """Put the means into the dictionary's folder in single precision, whole or not at all."""
    metadata = {"sha256": dictionary.record.sha256, **source}
    write_beside(folder / MEANS, save({"mean": mean.float().contiguous()}, metadata))


def measure_means(
    name: str,
    corpus: Sequence[Path],
    n_tokens: int,
    start: Callable[[int], Callable[[int], None]],
    dictionaries: Sequence[str] = (),
    layers: frozenset[int] | None = None,
) -> Measured:
    """Measure and write the means of the dictionaries that `set_up` would take for the model `name`.

    `start` is told the number of windows, and gives what is told of each step. Raises AtlasError where
    `corpus_windows` does, and when there is no such model or no dictionary of it.
    """
    try:
        files = text_files(corpus)
    except OSError as error:
        raise AtlasError(f"There is no corpus: {cause(error)}.") from error
    model, places = load_with_places(name, dictionaries=dictionaries, layers=layers)
    loaded = [load_dictionary(place.folder, model, place.origin) for place in places]
    windows = corpus_windows(model, files, n_tokens)
    means = feature_means(model, loaded, windows, start(len(windows)))
    measured = Measured(places[0].folder.parent, sum(d.record.d_sae for d in loaded), windows[:, 1:].numel())
    source = {"source": ", ".join(file.name for file in files), "tokens": str(measured.n_tokens)}
    for place, dictionary, mean in zip(places, loaded, means, strict=True):
        write_means(place.folder, dictionary, mean, source)
    return measured
