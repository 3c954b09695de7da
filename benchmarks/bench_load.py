"""How long GPT-2 small's published dictionaries take from pickles to a replacement model, and how much memory.

    python -m benchmarks.bench_load gpt2

Files of the published names, formats and sizes (12 attention SAEs, two of them with 49,152 features, and 12
transcoders) are written with random weights into an empty cache of the hub, beside a random model of GPT-2 small's
shape, whose heads look at a few tokens each. Seconds are those of one processor, so that waiting for the disk is not
counted. `convert` is what the first run adds to every later one: reading the pickles as data and writing safetensors.
`load` is a process that sets up model and dictionaries from what the first left, checksums included. Then a prompt of
64 and of 512 tokens, with all that ingesting it computes, each in a process of its own, as it comes and with --memory;
about 50 features fire a token and site over 512 tokens, and up to 270 of the attention SAEs over the first 64. Peak
memory counts the files' mapped pages, which the system takes back where memory is short. Needs 9 GB of disk. Prints
one JSON object.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from ingest.registry import DEFAULTS, SETS, DictionarySet

if TYPE_CHECKING:
    import torch

D, L0 = 768, 50
GOALS = {64: 8, 512: 12}  # GB of memory by tokens
MEMORY = "6GB"


def main(which: str) -> None:
    """Write the files, use them in processes of their own, and print."""
    with tempfile.TemporaryDirectory(prefix="atlas-bench-") as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "benchmarks.bench_load", "--write", folder], check=True)
        environment = os.environ | {
            "HF_HUB_CACHE": str(root / "hub"),
            "HF_HUB_OFFLINE": "1",
            "ATLAS_CACHE": str(root / "atlas"),
        }

        def process(*arguments: str) -> dict[str, float]:
            command = [sys.executable, "-m", "benchmarks.bench_load", *arguments, str(root / "gpt2")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            return json.loads(done.stdout.splitlines()[-1])

        first, again = process("--load"), process("--load")
        prompts: dict[str, float] = {}
        for n, goal in GOALS.items():
            plain, small = process("--prompt", str(n), ""), process("--prompt", str(n), MEMORY)
            prompts |= {
                f"{n} tokens, s": plain["seconds"],
                f"{n} tokens with --memory {MEMORY}, s": small["seconds"],
                f"{n} tokens: peak memory, GB (goal: under {goal})": plain["memory"],
                f"{n} tokens with --memory {MEMORY}: peak memory, GB": small["memory"],
            }
        size = sum(file.stat().st_size for file in (root / "atlas").rglob("*.safetensors"))
    found = {
        "model": which,
        "dictionaries": again["dictionaries"],
        "their size, GB": round(size / 1e9, 2),
        "first run, s": first["seconds"],
        "of which convert, s": round(first["seconds"] - again["seconds"], 1),
        "load, s": again["seconds"],
        "peak memory of the first run, GB": first["memory"],
        "peak memory, GB": again["memory"],
        **prompts,
    }
    print(json.dumps(found))


def load(directory: str) -> None:
    """Set up, and print the processor time and peak memory of that; importing the libraries is not counted."""
    import torch  # noqa: F401
    import transformer_lens  # noqa: F401

    from ingest.setup import set_up

    started = time.process_time()
    setup = set_up(directory, dictionaries=DEFAULTS["gpt2"])
    seconds = round(time.process_time() - started, 1)
    print(json.dumps({"dictionaries": len(setup.record.dictionaries), "seconds": seconds, "memory": peak()}))


def prompt(n_tokens: int, memory: str, directory: str) -> None:
    """Compute a prompt with the default roots, and print the processor time of that and the peak memory."""
    from benchmarks.bench_ingest import default_request, record
    from ingest.cli import parse_memory
    from ingest.setup import set_up

    within = parse_memory(memory) if memory else None
    setup = set_up(directory, dictionaries=DEFAULTS["gpt2"], memory=within)
    started = time.process_time()
    found = record(setup, random_tokens(n_tokens), default_request(setup))
    seconds = round(time.process_time() - started, 1)
    assert found.circuits
    print(json.dumps({"memory": peak(), "seconds": seconds}))


def random_tokens(n: int) -> list[int]:
    """BOS and random tokens."""
    import torch

    return [0, *torch.randint(0, 50_000, (n - 1,), generator=torch.Generator().manual_seed(1)).tolist()]


def peak() -> float:
    """The most memory that this process has taken, GB (2**30)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def write(root: Path) -> None:
    """The random model and all files of the default sets, where huggingface_hub would keep them."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from ingest.model import MINI, load_model
    from ingest.trace import trace

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, : 2 * D] *= 3
    model.save_pretrained(root / "gpt2")
    PreTrainedTokenizerFast.from_pretrained(MINI).save_pretrained(root / "gpt2")
    found = trace(load_model(str(root / "gpt2")), random_tokens(512))
    for name in DEFAULTS["gpt2"]:
        entry = SETS[name]
        repository = root / "hub" / ("models--" + entry.repository.replace("/", "--"))
        commit = entry.revision if len(entry.revision) == 40 else "0" * 40
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / entry.revision).write_text(commit)
        for layer in entry.files:
            x = found.z[layer].flatten(1) if entry.site == "attn" else found.mlp_in[layer]
            _write_dictionary(entry, layer, snapshot, x[1:])


def _write_dictionary(entry: DictionarySet, layer: int, snapshot: Path, x: "torch.Tensor") -> None:
    """Random weights, with encoder biases that let about L0 features fire on a token of `x`."""
    import torch

    d_sae = 49_152 if "ds49152" in entry.files[layer][-1] else 24_576
    shapes = {"W_enc": (D, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, D), "b_dec": (D,)}
    file = snapshot / entry.files[layer][-1]
    if entry.site == "attn":
        config = {
            "act_name": f"blocks.{layer}.attn.hook_z",
            "act_size": D,
            "dict_size": d_sae,
            "model_name": "gpt2-small",
        }
        (snapshot / entry.files[layer][0]).write_text(json.dumps(config))
        torch.save(_random(shapes, x), file)
        return
    state = _random(shapes | {"b_dec_out": (D,)}, x)
    module = types.ModuleType("sae_training.config")
    config_class = type("LanguageModelSAERunnerConfig", (), {"__module__": module.__name__})
    module.LanguageModelSAERunnerConfig = config_class
    config = config_class()
    config.__dict__ |= {
        "hook_point": f"blocks.{layer}.ln2.hook_normalized",
        "out_hook_point": f"blocks.{layer}.hook_mlp_out",
        "model_name": "gpt2-small",
        "is_transcoder": True,
    }
    sys.modules |= {"sae_training": types.ModuleType("sae_training"), module.__name__: module}
    torch.save({"cfg": config, "state_dict": state}, file)


def _random(shapes: dict[str, tuple[int, ...]], x: "torch.Tensor") -> "OrderedDict[str, torch.Tensor]":
    import torch

    state = OrderedDict((name, torch.randn(shape) / D**0.5) for name, shape in shapes.items())
    some = ((x - state["b_dec"]) @ state["W_enc"][:, ::16]).flatten()
    bias = -some.kthvalue(int(len(some) * (1 - L0 / len(state["b_enc"])))).values
    return state | {"b_enc": bias.repeat(len(state["b_enc"]))}


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(Path(sys.argv[2]))
    elif sys.argv[1] == "--load":
        load(sys.argv[2])
    elif sys.argv[1] == "--prompt":
        prompt(int(sys.argv[2]), *sys.argv[3:])
    else:
        main(sys.argv[1])
