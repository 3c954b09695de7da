"""Spans: one feature active on two or more consecutive tokens (METHOD 8).

The firings of a site are keys that grow by one from token to token of one feature, and by more from one
feature to the next; a run is a stretch of keys without a gap:

    key = feature * (n_pos + 1) + position          runs end where key[i + 1] - key[i] > 1

BOS has no part in any. A feature that is active almost everywhere makes few spans, and long ones.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from atlas.records import SpanRecord
from ingest.model import LanguageModel
from ingest.replacement import ReplacementModel, Site


def runs(keys: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " run"], Int[np.ndarray, " run"]]:
    """First and last place of every stretch of consecutive numbers in ascending `keys`."""
    gaps = np.flatnonzero(np.diff(keys) > 1)
    ends = [len(keys) - 1] if len(keys) else []
    return np.concatenate([np.zeros(len(ends), dtype=np.int64), gaps + 1]), np.concatenate([gaps, ends]).astype(int)


def spans(replacement: ReplacementModel, model: LanguageModel) -> tuple[SpanRecord, ...]:
    """Every span of a prompt, site by site in the order of the layers, by feature and then by position."""
    tokens = replacement.trace.tokens.tolist()
    texts: dict[tuple[int, int], str] = {}
    found: list[SpanRecord] = []
    for site in (s for pair in zip(replacement.attn, replacement.mlp, strict=True) for s in pair):
        dictionary = site.dictionary.record.id
        for index, start, end, mean in _site_spans(site, len(tokens)):
            if (start, end) not in texts:
                texts[start, end] = model.text(tokens[start : end + 1])
            found.append(SpanRecord(dictionary, index, start, end, texts[start, end], mean))
    return tuple(found)


def _site_spans(site: Site, n_pos: int) -> Iterator[tuple[int, int, int, float]]:
    """Feature, first and last position, and mean activation of every span of one site."""
    position, index, value = (part.numpy() for part in (site.position, site.index, site.value.double()))
    keys = (index * (n_pos + 1) + position)[position > 0]
    order = keys.argsort()
    first, last = runs(keys[order])
    first, last = first[last > first], last[last > first]
    summed = np.concatenate([[0.0], value[position > 0][order].cumsum()])
    mean = (summed[last + 1] - summed[first]) / (last + 1 - first)
    feature, start = np.divmod(keys[order][first], n_pos + 1)
    return zip(feature.tolist(), start.tolist(), (start + last - first).tolist(), mean.tolist(), strict=True)
