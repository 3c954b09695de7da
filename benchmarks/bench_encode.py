"""What encoding costs beside its bare matrix products.

    python -m benchmarks.bench_encode [TOKENS] [cpu|cuda]

Dictionaries of GPT-2 small's shape (768 to 24,576, random weights, about 50 features active a token), one after
another, so that none stays in a cache. `encode` is all that a site costs: pre-activations, which features fire, their
values, the reconstruction and its error. `products` is x W_enc + b_enc alone, with whichever side first is faster.
Both are timed in turn, in seconds of the processor, as those of the clock say little where others work too (on a GPU
in those of the clock); the medians of the ratios are taken. Prints one JSON object.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.bench_ingest import L0, N_TOKENS, random_dictionary
from benchmarks.clock import busy, milliseconds
from ingest.dictionaries import Dictionary
from ingest.model import check_device
from ingest.replacement import encode

N_DICTIONARIES, REPEATS = 4, 12


def main(n_tokens: str = str(N_TOKENS), device: str = "cpu") -> None:
    """Measure and print."""
    check_device(device)
    torch.manual_seed(0)
    x = torch.randn(int(n_tokens), 768).to(device)
    relu = [random_dictionary("random", layer, "mlp", x) for layer in range(N_DICTIONARIES)]
    kinds = {
        "relu": relu,
        "topk": [replace(d, b_enc=torch.zeros_like(d.b_enc), k=L0) for d in relu],
        "jumprelu": [replace(d, b_enc=torch.zeros_like(d.b_enc), threshold=-d.b_enc) for d in relu],
    }
    found: dict[str, object] = {"tokens": len(x), "dictionaries": N_DICTIONARIES}
    for kind, dictionaries in kinds.items():
        found |= measured(kind, dictionaries, x)
    print(json.dumps(found))


@torch.inference_mode()
def measured(kind: str, dictionaries: list[Dictionary], x: torch.Tensor) -> dict[str, object]:
    """The figures of one kind."""
    products, whole = [], []
    for _ in range(REPEATS + 1):
        rows_first = seconds(dictionaries, lambda d: torch.addmm(d.b_enc, x, d.W_enc))
        features_first = seconds(dictionaries, lambda d: torch.addmm(d.b_enc[:, None], d.W_enc.T, x.T))
        products.append(min(rows_first, features_first))
        whole.append(seconds(dictionaries, lambda d: encode(d, x, x)))
    rate = statistics.mean(len(encode(d, x, x).index) / len(x) for d in dictionaries)
    ratio = statistics.median(a / b for a, b in zip(whole[1:], products[1:], strict=True))
    return {
        f"{kind}: active features a token": round(rate, 1),
        f"{kind}: products, ms": milliseconds(statistics.median(products[1:])),
        f"{kind}: encode, ms": milliseconds(statistics.median(whole[1:])),
        f"{kind}: encode / products (goal: at most 1.3)": round(ratio, 2),
    }


def seconds(dictionaries: list[Dictionary], work: Callable[[Dictionary], object]) -> float:
    """What a dictionary takes."""
    device = dictionaries[0].b_enc.device.type
    started = busy(device)
    for dictionary in dictionaries:
        work(dictionary)
    return (busy(device) - started) / len(dictionaries)


if __name__ == "__main__":
    main(*sys.argv[1:])
