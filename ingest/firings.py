"""Where features fire in a prompt, and spans: one feature active on two or more consecutive tokens (METHOD 8).

The firings of all sites are keys that grow by one from token to token of one feature, and by more from one feature
to the next. Sorted, they list the firings feature by feature, and a span is a run, a stretch of keys without a gap:

    key = feature * n_pos + position                runs end where key[i + 1] - key[i] > 1

BOS has no part in any, so position 0 lies between two features. A feature that is active almost everywhere makes few
spans, and long ones.
"""

import numpy as np
import torch
from jaxtyping import Int

from atlas.records import Firings, Spans
from ingest.model import LanguageModel
from ingest.replacement import ReplacementModel


def firings(replacement: ReplacementModel) -> Firings:
    """Every feature that is active after BOS, in the order of the layers, attention before MLP, and by index."""
    sites = [site for pair in zip(replacement.attn, replacement.mlp, strict=True) for site in pair]
    position = torch.cat([site.position[site.counts[0] :] for site in sites]).numpy(force=True)
    index = torch.cat([site.index[site.counts[0] :] for site in sites]).numpy(force=True)
    value = torch.cat([site.value[site.counts[0] :] for site in sites]).double().numpy(force=True)
    widths = [site.dictionary.record.d_sae for site in sites]
    first = np.cumsum([0, *widths])  # features of all dictionaries are numbered through
    at = np.repeat(np.arange(len(sites)), [len(site.index) - site.counts[0] for site in sites])
    feature = index + first[at]
    # Of one feature they ascend already; whole numbers of 16 bits are sorted in one pass.
    order = np.lexsort((index.astype(np.min_scalar_type(max(widths) - 1)), at.astype(np.min_scalar_type(len(sites)))))
    start = np.flatnonzero(np.diff(feature[order], prepend=-1))
    number = feature[order[start]]
    dictionary = np.searchsorted(first, number, side="right") - 1
    return Firings(
        dictionaries=tuple(site.dictionary.record.id for site in sites),
        dictionary=dictionary,
        index=number - first[dictionary],
        start=np.append(start, len(order)),
        position=position[order],
        value=value[order],
    )


def runs(keys: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " run"], Int[np.ndarray, " run"]]:
    """First and last place of every stretch of consecutive numbers in ascending `keys`."""
    gaps = np.flatnonzero(np.diff(keys) > 1)
    ends = [len(keys) - 1] if len(keys) else []
    return np.concatenate([np.zeros(len(ends), dtype=np.int64), gaps + 1]), np.concatenate([gaps, ends]).astype(int)


def spans(fires: Firings, tokens: list[int], model: LanguageModel) -> Spans:
    """Every span of a prompt, by feature and then by position."""
    feature = np.repeat(np.arange(len(fires)), np.diff(fires.start))
    first, last = runs(feature * len(tokens) + fires.position)
    first, last = first[last > first], last[last > first]
    summed = np.concatenate([[0.0], fires.value.cumsum()])
    start, end = fires.position[first], fires.position[last]
    places, text_of = np.unique(start * len(tokens) + end, return_inverse=True)
    texts = model.stretches(tokens, [divmod(place, len(tokens)) for place in places.tolist()])
    return Spans(
        feature=feature[first],
        start=start,
        end=end,
        text=tuple(texts[i] for i in text_of.tolist()),
        mean=(summed[last + 1] - summed[first]) / (last + 1 - first),
    )
