"""How good dictionaries are on a text, one by one, over all positions but 0 (BOS):

    explained_variance  1 - sum |y - y^|^2 / sum |y - mean y|^2
    l0                  mean number of active features
    loss_kept           (L_zero - L_spliced) / (L_zero - L_clean), L the mean next-token cross entropy with the
                        site's output set to zero, replaced by its reconstruction, and as it is
    error_share         mean of |error| / |residual stream|, both as the site leaves them (METHOD 2)

The figures lie beside the dictionary's weights as `quality.json`, with the weights' sha256 and the text's name,
and every later ingestion stores them on its Dictionary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int

from atlas.errors import AtlasError
from ingest.dictionaries import QUALITY, Dictionary, write_beside
from ingest.model import LanguageModel

WINDOW = 128  # tokens, BOS among them: the context that most dictionaries were trained with
BATCH = 8  # windows that go through the model at once


@dataclass(frozen=True)
class Quality:
    """The four figures of one dictionary."""

    explained_variance: float
    l0: float
    loss_kept: float
    error_share: float


def text_windows(model: LanguageModel, file: Path, n_tokens: int) -> Int[torch.Tensor, "window pos"]:
    """The first `n_tokens` tokens of a text file in windows that begin with BOS.

    Raises AtlasError when the file cannot be read as UTF-8, or is shorter than one window.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise AtlasError(f"{file} cannot be read: {reason}.") from error
    width = min(WINDOW, model.record.n_ctx) - 1
    tokens = model.tokens(text)[1:]
    n_windows = min(len(tokens), n_tokens) // width
    if n_windows == 0:
        raise AtlasError(f"{file} has {len(tokens)} tokens; at least {width} are needed to measure dictionaries.")
    body = torch.tensor(tokens[: n_windows * width]).view(n_windows, width)
    return torch.cat([torch.full((n_windows, 1), model.bos), body], 1)


@torch.no_grad()
def measure(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    windows: Int[torch.Tensor, "window pos"],
    progress: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """The qualities of each dictionary on windows that begin with BOS; `progress` is called once a dictionary and
    batch."""
    batches = windows.split(BATCH)
    sums = [_Sums() for _ in dictionaries]
    for tokens in batches:
        wanted = {name for d in dictionaries for name in (d.record.hook_in, d.record.hook_out, _stream(d))}
        logits, cache = model.bridge.run_with_cache(tokens, names_filter=lambda name, wanted=wanted: name in wanted)
        clean = _loss(logits, tokens)
        for dictionary, total in zip(dictionaries, sums, strict=True):
            _add(model, dictionary, tokens, cache, clean, total)
            progress()
    return [total.quality() for total in sums]


def write_quality(folder: Path, dictionary: Dictionary, quality: Quality, measured_on: str) -> None:
    """Put the figures into the dictionary's folder, whole or not at all."""
    values = {"sha256": dictionary.record.sha256, "measured_on": measured_on, **asdict(quality)}
    write_beside(folder / QUALITY, (json.dumps(values, indent=1) + "\n").encode())


@dataclass
class _Sums:
    """What is summed over the batches, in double precision."""

    tokens: int = 0
    fired: float = 0
    error: float = 0
    square: float = 0
    mean: Float[torch.Tensor, " d_out"] | float = 0
    share: float = 0
    clean: float = 0
    spliced: float = 0
    zero: float = 0

    def quality(self) -> Quality:
        variance = self.square - float(torch.as_tensor(self.mean).pow(2).sum()) / self.tokens
        return Quality(
            explained_variance=1 - self.error / variance if variance else 0.0,
            l0=self.fired / self.tokens,
            loss_kept=(self.zero - self.spliced) / (self.zero - self.clean) if self.zero != self.clean else 1.0,
            error_share=self.share / self.tokens,
        )


def _add(
    model: LanguageModel,
    dictionary: Dictionary,
    tokens: Int[torch.Tensor, "window pos"],
    cache: Any,
    clean: float,
    total: _Sums,
) -> None:
    """One dictionary on one batch."""
    record = dictionary.record
    x, y = (cache[name].flatten(2)[:, 1:].flatten(0, 1) for name in (record.hook_in, record.hook_out))
    rebuilt = dictionary.reconstruct(x)
    error = y - rebuilt
    written = error @ model.weights.W_O[record.layer].flatten(0, 1) if record.hook_out.endswith("hook_z") else error
    stream = cache[_stream(dictionary)][:, 1:].flatten(0, 1)
    total.tokens += len(y)
    total.fired += float((dictionary.activations(x) > 0).sum())
    total.error += float(error.double().pow(2).sum())
    total.square += float(y.double().pow(2).sum())
    total.mean = total.mean + y.double().sum(0)
    total.share += float((written.norm(dim=1) / stream.norm(dim=1)).double().sum())
    total.clean += clean
    total.spliced += _loss(_with(model, tokens, record.hook_out, rebuilt), tokens)
    total.zero += _loss(_with(model, tokens, record.hook_out, torch.zeros_like(rebuilt)), tokens)


def _with(
    model: LanguageModel,
    tokens: Int[torch.Tensor, "window pos"],
    hook: str,
    value: Float[torch.Tensor, "token d_out"],
) -> Float[torch.Tensor, "window pos d_vocab"]:
    """The logits with `value` in place of what stands at a hook after BOS."""

    def replace(found: torch.Tensor, hook: object) -> torch.Tensor:
        changed = found.clone()
        changed[:, 1:] = value.view_as(changed[:, 1:])
        return changed

    return model.bridge.run_with_hooks(tokens, fwd_hooks=[(hook, replace)])


def _loss(logits: Float[torch.Tensor, "window pos d_vocab"], tokens: Int[torch.Tensor, "window pos"]) -> float:
    """The sum over all windows and positions of the next token's cross entropy, nats."""
    flat = logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="sum"))


def _stream(dictionary: Dictionary) -> str:
    """The hook of the residual stream just after the dictionary's site."""
    return f"blocks.{dictionary.record.layer}.hook_resid_" + ("mid" if dictionary.record.site == "attn" else "post")
