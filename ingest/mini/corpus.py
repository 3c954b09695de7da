"""Text in, windows of tokens out: the corpus that `mini` and its dictionaries are trained on.

Files are read whole (.txt, .txt.xz, or .json holding a list of strings), joined by the
end-of-text token, and cut into windows of `n_ctx - 1` tokens. Every window gets the
beginning-of-sequence token in front, so position 0 is always BOS, as it is in the atlas.
The last 1 % of every file is held out for validation.
"""

import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

BOS = "<|endoftext|>"
SUFFIXES = (".txt", ".xz", ".json")
HELD_OUT = 0.01


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The readable files among `paths`, folders opened one level deep, in a stable order."""
    files = [f for p in paths for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    found = [f for f in files if f.suffix in SUFFIXES]
    if not found:
        raise FileNotFoundError(f"no {', '.join(SUFFIXES)} file among {[str(p) for p in paths]}")
    return found


def documents(path: Path) -> Iterator[str]:
    """The documents of one file: the strings of a JSON list, else the whole text."""
    if path.suffix == ".json":
        yield from json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".xz":
        yield lzma.decompress(path.read_bytes()).decode("utf-8")
    else:
        yield path.read_text(encoding="utf-8")


def train_tokenizer(files: Sequence[Path], d_vocab: int) -> Tokenizer:
    """A byte-level BPE of `d_vocab` tokens in GPT-2's style; token 0 is BOS."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[BOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for f in files for doc in documents(f) for line in doc.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Token ids of a corpus, uint16: `train` [n_train] and `held_out` [n_held_out]."""

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]

    @classmethod
    def read(cls, files: Sequence[Path], tokenizer: Tokenizer) -> "Corpus":
        """Tokenize every file; raises ValueError when the vocabulary does not fit 16 bits."""
        if tokenizer.get_vocab_size() > 2**16:
            raise ValueError("the corpus stores 16-bit tokens: the vocabulary is too large")
        train: list[NDArray[np.uint16]] = []
        held_out: list[NDArray[np.uint16]] = []
        for path in files:
            ids = np.concatenate([_encode(doc, tokenizer) for doc in documents(path)])
            cut = int(len(ids) * (1 - HELD_OUT))
            train.append(ids[:cut])
            held_out.append(ids[cut:])
        return cls(np.concatenate(train), np.concatenate(held_out))

    def n_windows(self, n_ctx: int) -> int:
        """How many whole training windows an epoch has."""
        return len(self.train) // (n_ctx - 1) - 1

    def batch(self, step: int, size: int, n_ctx: int, seed: int) -> Int[torch.Tensor, "batch pos"]:
        """Training batch number `step`: a pure function of its arguments, so a run can resume.

        Each epoch shifts the window borders and shuffles the windows anew.
        """
        n_windows = self.n_windows(n_ctx)
        per_epoch = n_windows // size
        epoch, within = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        shift = int(rng.integers(n_ctx - 1))
        chosen = rng.permutation(n_windows)[within * size : (within + 1) * size]
        return _windows(self.train, shift + chosen * (n_ctx - 1), n_ctx)

    def validation(self, size: int, n_ctx: int) -> Iterator[Int[torch.Tensor, "batch pos"]]:
        """The held-out windows in order, `size` at a time."""
        starts = np.arange(len(self.held_out) // (n_ctx - 1)) * (n_ctx - 1)
        for i in range(0, len(starts), size):
            yield _windows(self.held_out, starts[i : i + size], n_ctx)


def _encode(document: str, tokenizer: Tokenizer) -> NDArray[np.uint16]:
    lines = document.splitlines(keepends=True)
    ids = [i for enc in tokenizer.encode_batch(lines) for i in enc.ids]
    return np.array([tokenizer.token_to_id(BOS), *ids], dtype=np.uint16)


def _windows(tokens: NDArray[np.uint16], starts: NDArray[np.int64], n_ctx: int) -> Int[torch.Tensor, "batch pos"]:
    body = tokens[starts[:, None] + np.arange(n_ctx - 1)[None, :]].astype(np.int64)
    return torch.from_numpy(np.pad(body, ((0, 0), (1, 0))))
