"""What a prompt costs before the database: its forward pass and encode, against everything.

    python -m benchmarks.bench_ingest mini|gpt2 [cpu|cuda] [float32|bfloat16]

A prompt of 64 tokens with the 11 default roots. `forward + encode` is `Setup.replace`; `circuits` adds roots,
sweep, edges, spans and records; `whole` also takes apart the scores that say why heads look where they do. All
are timed in turn in one run, the medians of the ratios taken. For `gpt2` a random model
of GPT-2 small's shape stands in, with random dictionaries of 24,576 features at both sites of all 12
layers, their biases set so that about 50 features fire a token and site. Prints one JSON object.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from atlas.records import DictionaryRecord, PromptRecord, ReplacementModelRecord
from benchmarks.clock import milliseconds, peak_memory, wall
from ingest.circuits import CircuitRequest, prompt_record
from ingest.cli import LOGIT_THRESHOLDS, THRESHOLDS
from ingest.dictionaries import Dictionary, no_features
from ingest.model import MINI, load_model
from ingest.prompts import Prompt
from ingest.roots import parse_root
from ingest.setup import Setup, set_up
from ingest.shelf import Matrices
from ingest.trace import trace

N_TOKENS, D_SAE, L0 = 64, 24_576, 50
REPEATS = {"mini": 25, "gpt2": 7}
NEVER = 1e9  # a share that no head carries


def main(which: str, device: str = "cpu", dtype: str = "float32") -> None:
    """Measure and print."""
    computing = {"dtype": getattr(torch, dtype), "device": device}
    setup = set_up("mini", **computing) if which == "mini" else gpt2_shaped(**computing)
    tokens = text_tokens(setup)
    request = default_request(setup)
    without_scores = replace(request, look_share=NEVER)
    base, circuits, whole = [], [], []
    for _ in range(REPEATS[which] + 1):
        base.append(seconds(lambda: setup.replace(tokens), device))
        circuits.append(seconds(lambda: record(setup, tokens, without_scores), device))
        whole.append(seconds(lambda: record(setup, tokens, request), device))
    found = record(setup, tokens, request)
    print(
        json.dumps(
            {
                "model": which if dtype == "float32" else f"{which}, {dtype}",
                "tokens": len(tokens),
                "active features a token and site": round(firing_rate(setup, tokens), 1),
                "circuits": len(found.circuits),
                "nodes": len(found.nodes),
                "DIRECT and OV edges": len(found.direct.weight) + len(found.ov.weight),
                "scores": len(found.scores.score),
                "QK edges": len(found.qk.score),
                "spans": len(found.spans),
                "forward + encode, ms": milliseconds(statistics.median(base[1:])),
                "circuits, ms": milliseconds(statistics.median(circuits[1:])),
                "whole, ms": milliseconds(statistics.median(whole[1:])),
                "circuits / forward + encode (goal: at most 2)": ratio(circuits, base),
                "whole / circuits (goal: at most 2)": ratio(whole, circuits),
            }
            | peak_memory(device)
        )
    )


def default_request(setup: Setup) -> CircuitRequest:
    """What `atlas ingest` asks for unless told otherwise."""
    root = parse_root("default", setup.model, setup.dictionaries)
    return CircuitRequest("support", THRESHOLDS["support"], root, logit_threshold=LOGIT_THRESHOLDS["support"])


def record(setup: Setup, tokens: list[int], request: CircuitRequest) -> PromptRecord:
    """All that `atlas ingest` computes for a prompt before it measures circuits in the real model."""
    prompt = Prompt("", "bench")
    return prompt_record(prompt, "bench", setup.model, setup.record.id, setup.replace(tokens), [request])


def ratio(a: list[float], b: list[float]) -> float:
    """The median of the ratios, the first round left out."""
    return round(statistics.median(x / y for x, y in zip(a[1:], b[1:], strict=True)), 2)


def seconds(work: Callable[[], object], device: str) -> float:
    """How long `work` takes."""
    started = wall(device)
    work()
    return wall(device) - started


def text_tokens(setup: Setup) -> list[int]:
    """BOS and 63 tokens: prompts of the package for `mini`, random ones for a random model."""
    if setup.record.name != "mini":
        generator = torch.Generator().manual_seed(1)
        return [setup.model.bos, *torch.randint(0, 50_000, (N_TOKENS - 1,), generator=generator).tolist()]
    rows = (MINI.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return setup.model.tokens(" ".join(json.loads(row)["prompt"] for row in rows))[:N_TOKENS]


def firing_rate(setup: Setup, tokens: list[int]) -> float:
    """Active features a token and site, BOS left out."""
    replacement = setup.replace(tokens)
    rates = [torch.tensor(site.counts[1:]).double().mean() for site in (*replacement.attn, *replacement.mlp)]
    return float(torch.stack(rates).mean())


def gpt2_shaped(
    sites: Sequence[str] = ("attn", "mlp"), dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Setup:
    """A random model of GPT-2 small's shape with random dictionaries at `sites` of every layer, alike on all devices.

    Raises AtlasError where there is no such device.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(MINI).save_pretrained(folder)
        model = load_model(folder, dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    probe = trace(model, [0, *torch.randint(0, 50_000, (N_TOKENS - 1,), generator=generator).tolist()])
    dictionaries = [
        random_dictionary(model.record.id, layer, site, x) if site in sites else no_features(model, layer, site)
        for layer in range(12)
        for site, x in (("attn", probe.z[layer].flatten(1)), ("mlp", probe.mlp_in[layer]))
    ]
    record = ReplacementModelRecord("bench", "gpt2-shaped", model.record, tuple(d.record for d in dictionaries))
    return Setup(model, dictionaries, record)


def random_dictionary(model: str, layer: int, site: str, x: torch.Tensor) -> Dictionary:
    """Random weights beside `x`, with encoder biases that let about L0 features fire on a token of it."""
    d = x.shape[1]
    W_enc = torch.randn(d, D_SAE).div_(d**0.5).to(x.device)
    p = x[1:] @ W_enc
    bias = -p.flatten().kthvalue(int(p.numel() * (1 - L0 / D_SAE))).values
    record = DictionaryRecord(
        id=f"{model}/{layer}/{site}",
        layer=layer,
        site=site,
        kind="sae" if site == "attn" else "transcoder",
        activation="relu",
        hook_in=f"blocks.{layer}." + ("attn.hook_z" if site == "attn" else "ln2.hook_normalized"),
        hook_out=f"blocks.{layer}." + ("attn.hook_z" if site == "attn" else "hook_mlp_out"),
        d_in=d,
        d_sae=D_SAE,
        source="random",
        revision="random",
        sha256="random",
    )
    W_dec = torch.randn(D_SAE, d).div_(d**0.5).to(x.device)
    matrices, zeros = Matrices(W_enc, W_dec), x.new_zeros(d)
    return Dictionary(lambda: matrices, bias.expand(D_SAE).clone(), zeros, zeros, None, None, record)


if __name__ == "__main__":
    main(*sys.argv[1:])
