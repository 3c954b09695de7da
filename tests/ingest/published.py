"""GPT-2 and its published dictionaries as they lie on the hub, in the same formats and under the same names, small.

The model has GPT-2 small's 12 layers at width 16. Its file names weights as openai-community/gpt2 does, without
`transformer.` and with the attention masks as buffers. The dictionaries have the published fields and tensors.
"""

import dataclasses
import json
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ingest.registry import MODELS, SETS
from tests.ingest.models import N_CTX, write_model

D, D_SAE = 16, 24
COMMITS = {
    MODELS["gpt2"].repository: MODELS["gpt2"].revision,
    "ckkissane/attn-saes-gpt2-small-all-layers": "c" * 40,
    "pchlenski/gpt2-transcoders": SETS["pchlenski/gpt2-transcoders"].revision,
    "jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs": "b" * 40,
}


@dataclasses.dataclass
class LanguageModelSAERunnerConfig:
    """As in the training code of the published transcoders."""

    hook_point: str
    out_hook_point: str
    hook_point_layer: int
    d_in: int = D
    d_out: int = D
    expansion_factor: int = 32
    model_name: str = "gpt2-small"
    is_transcoder: bool = True
    use_ghost_grads: bool = True
    lr: float = 4e-4
    dtype: torch.dtype = torch.float32
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cuda", 0))


def write_hub(root: Path) -> Path:
    """All four repositories under `root`."""
    _write_gpt2(root / MODELS["gpt2"].repository)
    generator = torch.Generator().manual_seed(0)
    for entry in SETS.values():
        for layer, files in entry.files.items():
            paths = [root / entry.repository / file for file in files]
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[entry.name](layer, paths, generator)
    return root


def _write_gpt2(folder: Path) -> None:
    write_model(folder, n_layers=12)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items() if name != "lm_head.weight"}
    mask = torch.ones(N_CTX, N_CTX).tril()[None, None]
    bare |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(12)}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})


def _weights(generator: torch.Generator, *more: str) -> "OrderedDict[str, torch.Tensor]":
    shapes = {"W_enc": (D, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D), "b_dec": (D,)} | dict.fromkeys(more, (D,))
    return OrderedDict((name, 0.3 * torch.randn(shape, generator=generator)) for name, shape in shapes.items())


def _hook_z(layer: int, paths: list[Path], generator: torch.Generator) -> None:
    config = {
        "seed": 49, "batch_size": 4096, "buffer_mult": 384, "lr": 0.0012, "num_tokens": 2000000000, "l1_coeff": 1.8,
        "beta1": 0.9, "beta2": 0.99, "dict_mult": 32, "seq_len": 128, "enc_dtype": "fp32", "model_name": "gpt2-small",
        "site": "z", "layer": layer, "device": "cuda", "reinit": "reinit", "head": "cat", "concat_heads": True,
        "resample_scheme": "anthropic", "act_name": f"blocks.{layer}.attn.hook_z", "act_size": D, "dict_size": D_SAE,
        "name": f"gpt2-small_{layer}_{D_SAE}_z",
    }  # fmt: skip
    paths[0].write_text(json.dumps(config))
    torch.save(_weights(generator), paths[1])


def _transcoder(layer: int, paths: list[Path], generator: torch.Generator) -> None:
    module = types.ModuleType("sae_training.config")
    LanguageModelSAERunnerConfig.__module__ = module.__name__
    module.LanguageModelSAERunnerConfig = LanguageModelSAERunnerConfig  # type: ignore[attr-defined]
    hooks = (f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
    modules = {"sae_training": types.ModuleType("sae_training"), module.__name__: module}
    sys.modules.update(modules)
    try:
        state = _weights(generator, "b_dec_out")
        torch.save({"cfg": LanguageModelSAERunnerConfig(*hooks, layer), "state_dict": state}, paths[0])
    finally:
        for name in modules:
            del sys.modules[name]


def _attn_out(layer: int, paths: list[Path], generator: torch.Generator) -> None:
    config: dict[str, Any] = {
        "architecture": "standard", "d_in": D, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_name": f"blocks.{layer}.hook_attn_out", "hook_layer": layer,
        "hook_head_index": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "sae_lens_training_version": None,
        "prepend_bos": False, "dataset_path": "Skylion007/openwebtext", "dataset_trust_remote_code": True,
        "context_size": 64, "normalize_activations": "layer_norm",
    }  # fmt: skip
    paths[0].write_text(json.dumps(config))
    save_file(dict(_weights(generator)), paths[1])


_WRITERS = {
    "gpt2-small-hook-z-kk": _hook_z,
    "pchlenski/gpt2-transcoders": _transcoder,
    "gpt2-small-attn-out-v5-32k": _attn_out,
}
