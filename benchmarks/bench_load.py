"""How long GPT-2 small's published dictionaries take from pickles to a replacement model, and how much memory.

    python -m benchmarks.bench_load gpt2

Files of the published names, formats and sizes (12 attention SAEs, two of them with 49,152 features, and 12
transcoders) are written with random weights into an empty cache of the hub, beside a random model of GPT-2 small's
shape. Seconds are those of one processor, so that waiting for the disk is not counted. `convert` is what the first
run adds to every later one: reading the pickles as data and writing safetensors. `load` is a process that sets up
model and dictionaries from what the first left, checksums included. Memory counts the files' mapped pages. Needs
9 GB of disk. Prints one JSON object.
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

from ingest.registry import DEFAULTS, SETS, DictionarySet

D = 768


def main(which: str) -> None:
    """Write the files, load them twice in processes of their own, and print."""
    with tempfile.TemporaryDirectory(prefix="atlas-bench-") as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "benchmarks.bench_load", "--write", folder], check=True)
        environment = os.environ | {
            "HF_HUB_CACHE": str(root / "hub"),
            "HF_HUB_OFFLINE": "1",
            "ATLAS_CACHE": str(root / "atlas"),
        }
        command = [sys.executable, "-m", "benchmarks.bench_load", "--load", str(root / "gpt2")]
        runs = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
            for _ in range(2)
        ]
        size = sum(file.stat().st_size for file in (root / "atlas").rglob("*.safetensors"))
    first, again = runs
    found = {
        "model": which,
        "dictionaries": again["dictionaries"],
        "their size, GB": round(size / 1e9, 2),
        "first run, s": first["seconds"],
        "of which convert, s": round(first["seconds"] - again["seconds"], 1),
        "load, s": again["seconds"],
        "peak memory of the first run, GB": first["memory"],
        "peak memory, GB": again["memory"],
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
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps({"dictionaries": len(setup.record.dictionaries), "seconds": seconds, "memory": memory}))


def write(root: Path) -> None:
    """The random model and all files of the default sets, where huggingface_hub would keep them."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from ingest.model import MINI

    GPT2LMHeadModel(GPT2Config()).save_pretrained(root / "gpt2")
    PreTrainedTokenizerFast.from_pretrained(MINI).save_pretrained(root / "gpt2")
    for name in DEFAULTS["gpt2"]:
        entry = SETS[name]
        repository = root / "hub" / ("models--" + entry.repository.replace("/", "--"))
        commit = entry.revision if len(entry.revision) == 40 else "0" * 40
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / entry.revision).write_text(commit)
        for layer in entry.files:
            _write_dictionary(entry, layer, snapshot)


def _write_dictionary(entry: DictionarySet, layer: int, snapshot: Path) -> None:
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
        torch.save(OrderedDict((name, torch.randn(shape) / D**0.5) for name, shape in shapes.items()), file)
        return
    state = OrderedDict((name, torch.randn(shape) / D**0.5) for name, shape in (shapes | {"b_dec_out": (D,)}).items())
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


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(Path(sys.argv[2]))
    elif sys.argv[1] == "--load":
        load(sys.argv[2])
    else:
        main(sys.argv[1])
