"""One pass over windows of text: features that fire over whole phrases, and seeds of chains (METHOD 8).

Every site is encoded for a batch of windows at once, in bfloat16 where the processor multiplies it, elsewhere in
float32, which is many times as fast there: what is found is encoded exactly when it is ingested. Two kinds of
finds are counted by feature and phrase:

    span    a feature above layer 0 that fires on 2 to LONGEST tokens, and on neither of their neighbours
    seed    the feature of an MLP of the upper half that fires most on a token, but not on the one before; the
            phrase is the two tokens. The end of a chain, perhaps.

A token may make its feature fire on its own account. `alone` holds every feature's value on every token of the
vocabulary right after BOS; what a find owes to its context is

    carried = 1 - sum_t min(a_t, alone_t) / sum_t a_t        over the tokens after the first

Finds under CARRIED and features on more than DENSE of all tokens are not counted. A find's score is

    log2(1 + windows that show it) * -log2(the feature's frequency) * mean carried * tokens after the first

so neither a feature that fires everywhere nor one that answers to single tokens wins by how often it fires.
Phrases are of tokens with letters; punctuation and line ends are not what names are made of. The table keeps the
KEPT best, and for each the window in which activation times carried was strongest.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ingest.dictionaries import Dictionary
from ingest.firings import runs
from ingest.multitoken import LONGEST, rarity_score
from ingest.setup import Setup

CARRIED = 0.5
DENSE = 0.02
KEPT = 200_000
WINDOWS = 16  # windows that go through the model at once
DTYPE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
_MIX = np.uint64(0x9E3779B97F4A7C15)

Columns = dict[str, np.ndarray]
Firing = tuple[Int[np.ndarray, " _"], Float[np.ndarray, " _"]]  # keys and values, as many of both


@dataclass(frozen=True)
class Finds:
    """Finds, one row each; `columns` are arrays [find].

    key         hash of feature, kind and phrase
    feature     number over all dictionaries (see `Scanner.offsets`)
    length      tokens; 1 for a seed
    windows     how many windows show it
    carried     sum of carried over these
    best        activation times carried where that is largest, `window` and `start` where that is
    """

    columns: Columns

    @classmethod
    def none(cls) -> "Finds":
        kinds = {"key": "u8", "feature": "i8", "length": "i8", "windows": "i8", "carried": "f8", "best": "f8"}
        return cls({name: np.zeros(0, kind) for name, kind in {**kinds, "window": "i8", "start": "i8"}.items()})

    def __len__(self) -> int:
        return len(self.columns["key"])

    def take(self, rows: Int[np.ndarray, " n"] | Bool[np.ndarray, " find"]) -> "Finds":
        return Finds({name: column[rows] for name, column in self.columns.items()})

    def scores(self, frequency: Float[np.ndarray, " feature"]) -> Float[np.ndarray, " find"]:
        """The score of each, given every feature's frequency."""
        c = self.columns
        later = np.maximum(c["length"] - 1, 1)
        return rarity_score(c["windows"].astype(float), frequency[c["feature"]]) * c["carried"] / c["windows"] * later


def together(parts: list[Finds]) -> Finds:
    """Finds of the same key as one: counts summed, the strongest place kept."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    order = np.lexsort((columns["window"], -columns["best"], columns["key"]))
    columns = {name: column[order] for name, column in columns.items()}
    first = np.flatnonzero(np.diff(columns["key"], prepend=columns["key"][:1] + np.uint64(1)))
    merged = {name: column[first] for name, column in columns.items()}
    if len(first):
        for name in ("windows", "carried"):
            merged[name] = np.add.reduceat(columns[name], first)
    return Finds(merged)


@dataclass(frozen=True)
class Counted:
    """What a scan has so far: tokens after BOS, firings [feature], the finds, and the windows they stand in."""

    n_tokens: int
    firings: Int[np.ndarray, " feature"]
    finds: Finds
    tokens: dict[int, Int[np.ndarray, " n_ctx"]]

    @property
    def frequency(self) -> Float[np.ndarray, " feature"]:
        return self.firings / max(1, self.n_tokens)


class Scanner:
    """Encodes windows and finds; made once for a model and its dictionaries."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.dictionaries = [d for d in setup.dictionaries if d.record.d_sae]
        sizes = [d.record.d_sae for d in self.dictionaries]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._names = {d.record.hook_in for d in self.dictionaries}
        self._encoders = [d.W_enc.T.to(DTYPE).contiguous() for d in self.dictionaries]
        self._constants = [d.constant.to(DTYPE)[:, None] for d in self.dictionaries]
        # A model's hooks are shared by all who run it, so that one batch goes through it while another is encoded.
        self._model_lock = Lock()
        self._pool = ThreadPoolExecutor(
            2, initializer=torch.set_num_threads, initargs=(max(1, torch.get_num_threads() // 2),)
        )
        d_vocab = setup.model.record.d_vocab
        self._worded = np.array([any(map(str.isalpha, setup.model.token_text(token))) for token in range(d_vocab)])
        self._alone = self._alone_values()

    def feature(self, number: int) -> tuple[Dictionary, int]:
        """The dictionary and the index of a feature's number."""
        site = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.dictionaries[site], number - int(self.offsets[site])

    def empty(self) -> Counted:
        return Counted(0, np.zeros(self.offsets[-1], dtype=np.int64), Finds.none(), {})

    def add(self, counted: Counted, windows: Int[np.ndarray, "window n_ctx"], first: int) -> Counted:
        """`counted` and what is found in `windows`, whose numbers begin at `first`."""
        firings, n_tokens = counted.firings.copy(), counted.n_tokens
        parts = [counted.finds]
        starts = range(0, len(windows), WINDOWS)
        batches = [windows[start : start + WINDOWS] for start in starts]
        for start, batch, firing in zip(starts, batches, self._pool.map(self._firing, batches), strict=True):
            n_tokens += batch[:, 1:].size
            found = [Finds.none(), *self._batch(batch, firing, firings, n_tokens)]
            parts.append(_once_a_window(found, first + start))
        finds = together(parts)
        if len(finds) > 2 * KEPT:
            finds = finds.take(np.sort(finds.scores(firings / n_tokens).argsort()[-KEPT:]))
        tokens = counted.tokens | {first + i: row.astype(np.int32) for i, row in enumerate(windows)}
        return Counted(n_tokens, firings, finds, {i: tokens[i] for i in np.unique(finds.columns["window"]).tolist()})

    def _batch(
        self,
        windows: Int[np.ndarray, "window n_ctx"],
        firing: list[Firing],
        firings: Int[np.ndarray, " feature"],
        n_tokens: int,
    ) -> Iterator[Finds]:
        """What is found at each site of a batch; counts its firings, too. `window` counts within the batch."""
        tokens = windows.reshape(-1)
        for site, (keys, values) in enumerate(firing):
            index, at = np.divmod(keys, len(tokens))
            offset, size = self.offsets[site], self.dictionaries[site].record.d_sae
            firings[offset : offset + size] += np.bincount(index, minlength=size)
            sparse = (firings[offset : offset + size] <= DENSE * n_tokens)[index]
            first, last = runs(keys)
            length = last + 1 - first
            record = self.dictionaries[site].record
            if record.layer > 0:
                span = (length >= 2) & (length <= LONGEST) & sparse[first]
                yield self._spans(site, windows.shape[1], tokens, index, at, values, first[span], length[span])
            if record.site == "mlp" and 2 * record.layer >= self.setup.model.record.n_layers:
                single = first[(length == 1) & sparse[first] & (at[first] % windows.shape[1] > 1)]
                yield self._seeds(site, windows.shape[1], tokens, index, at, values, single)

    def _spans(
        self,
        site: int,
        n_ctx: int,
        tokens: Int[np.ndarray, " token"],
        index: Int[np.ndarray, " firing"],
        at: Int[np.ndarray, " firing"],
        values: Float[np.ndarray, " firing"],
        first: Int[np.ndarray, " run"],
        length: Int[np.ndarray, " run"],
    ) -> Finds:
        total, own = values[first] * 0, values[first] * 0
        worded = self._worded[tokens[at[first]]]
        feature = self.offsets[site] + index[first]
        key = _mixed(_mixed(length * 0, feature), tokens[at[first]])
        for k in range(1, LONGEST):
            on = length > k
            there = first[on] + k
            total[on] += values[there]
            own[on] += np.minimum(values[there], self._on_its_own(site, index[there], tokens[at[there]]))
            key[on] = _mixed(key[on], tokens[at[there]])
            worded[on] &= self._worded[tokens[at[there]]]
        return _finds(key, feature, length, at[first], n_ctx, total / (length - 1), (1 - own / total) * worded)

    def _seeds(
        self,
        site: int,
        n_ctx: int,
        tokens: Int[np.ndarray, " token"],
        index: Int[np.ndarray, " firing"],
        at: Int[np.ndarray, " firing"],
        values: Float[np.ndarray, " firing"],
        single: Int[np.ndarray, " n"],
    ) -> Finds:
        strongest = np.zeros(len(tokens), values.dtype)
        np.maximum.at(strongest, at[single], values[single])
        single = single[values[single] == strongest[at[single]]]
        here, value = at[single], values[single]
        own = np.minimum(value, self._on_its_own(site, index[single], tokens[here]))
        worded = self._worded[tokens[here]] & self._worded[tokens[here - 1]]
        feature = self.offsets[site] + index[single]
        key = _mixed(_mixed(_mixed(here * 0 + 1, feature), tokens[here - 1]), tokens[here])
        return _finds(key, feature, np.ones_like(here), here, n_ctx, value, (1 - own / value) * worded)

    @torch.inference_mode()
    def _firing(self, windows: Int[np.ndarray, "window n_ctx"]) -> list[Firing]:
        """Per site what fires after BOS: index * tokens + token, ascending, and the activation."""
        found: list[Firing] = []
        with torch.autocast("cpu", torch.bfloat16, enabled=DTYPE is torch.bfloat16):
            with self._model_lock:
                cache = self.setup.model.bridge.run_with_cache(
                    torch.from_numpy(windows), names_filter=lambda name: name in self._names, logits_to_keep=1
                )[1]
            bos = torch.arange(0, windows.size, windows.shape[1])
            parts = zip(self.dictionaries, self._encoders, self._constants, strict=True)
            for dictionary, encoder, constant in parts:
                x = cache[dictionary.record.hook_in].flatten(0, 1).flatten(1).to(DTYPE)
                p = torch.addmm(constant, encoder, x.T)
                on = dictionary.active(p.T).T.contiguous()
                on[:, bos] = False
                keys = np.flatnonzero(on.numpy())
                found.append((keys, p.flatten()[torch.from_numpy(keys)].float().numpy()))
        return found

    def _alone_values(self) -> list[tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """Per site, for every token alone after BOS, what fires: index * d_vocab + token, ascending, and how much."""
        d_vocab = self.setup.model.record.d_vocab
        parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in self.dictionaries]
        pieces = np.array_split(np.arange(d_vocab), max(1, d_vocab // 1024))
        windows = [np.stack([np.full_like(tokens, self.setup.model.bos), tokens], 1) for tokens in pieces]
        for tokens, firing in zip(pieces, self._pool.map(self._firing, windows), strict=True):
            for part, (keys, values) in zip(parts, firing, strict=True):
                index, at = np.divmod(keys, 2 * len(tokens))
                part.append((index * d_vocab + tokens[at // 2], values))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for part in parts:
            keys, values = (np.concatenate(column) for column in zip(*part, strict=True))
            order = keys.argsort()
            found.append((keys[order], values[order]))
        return found

    def _on_its_own(
        self, site: int, index: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """What features are on tokens alone."""
        keys, values = self._alone[site]
        if not len(keys):
            return np.zeros(len(index))
        wanted = index * self.setup.model.record.d_vocab + tokens
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, values[place], 0.0)


def _finds(
    key: np.ndarray,
    feature: np.ndarray,
    length: np.ndarray,
    at: np.ndarray,
    n_ctx: int,
    value: np.ndarray,
    carried: np.ndarray,
) -> Finds:
    window, start = np.divmod(at, n_ctx)
    columns = {"key": key, "feature": feature, "length": length, "windows": np.ones_like(length), "carried": carried}
    finds = Finds({**columns, "best": value * carried, "window": window, "start": start})
    return finds.take(carried >= CARRIED)


def _once_a_window(parts: list[Finds], first: int) -> Finds:
    """Finds of a batch, each once a window where it is strongest; windows numbered from `first`."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    order = np.lexsort((-columns["best"], columns["window"], columns["key"]))
    columns = {name: column[order] for name, column in columns.items()}
    again = (np.diff(columns["key"]) == 0) & (np.diff(columns["window"]) == 0)
    kept = np.concatenate([[True], ~again])[: len(order)]
    return Finds(columns | {"window": columns["window"] + first}).take(kept)


def _mixed(key: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The hash with one more number."""
    key = (key.astype(np.uint64) * _MIX ^ (more.astype(np.uint64) + np.uint64(1))) * _MIX
    return key ^ (key >> np.uint64(29))
