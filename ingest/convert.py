"""`atlas dictionaries`: published dictionaries into the format that ingestion loads, and means of features.

GPT-2's published MLP transcoders (pchlenski/gpt2-transcoders) are pickles of a configuration and of W_enc,
b_enc, W_dec, b_dec and b_dec_out, and compute relu((x - b_dec) W_enc + b_enc) W_dec + b_dec_out. SAELens'
transcoder subtracts nothing from its input, so b_dec goes into the bias, b_enc - b_dec W_enc, which is summed
in double precision; b_dec_out becomes b_dec. Everything else stays bit for bit.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.errors import AtlasError

if TYPE_CHECKING:
    import torch
    from sae_lens import StandardSAEConfig, TranscoderConfig

_SAE = ("W_enc", "b_enc", "W_dec", "b_dec")
_TRANSCODER = (*_SAE, "b_dec_out")


def convert(file: Path, out: Path) -> Path:
    """Write the dictionary in `file` to `out`/L.mlp or `out`/L.attn in SAELens' format, whole or not at all.

    Returns that folder. Raises AtlasError when the file is no such dictionary, asks for anything but data, holds
    a number that is not finite, or when the folder is there already.
    """
    from ingest.hub import sha256
    from ingest.pickled import read_pickled

    values, weights = read_pickled(file)
    if values:
        layer, config, metadata = _transcoder(file, values, weights)
        folder, weights = out / f"{layer}.mlp", _folded(weights)
    else:
        layer, config, metadata = _attention_sae(file, weights)
        folder = out / f"{layer}.attn"
    if folder.exists():
        raise AtlasError(f"{folder} is there already, so {file} was not converted; remove it, or name another --out.")
    metadata |= {**_origin(file), "source_file": file.name, "source_sha256": sha256(file)}
    _write(folder, weights, config, {**metadata, "weights": "processed"})
    return folder


def _transcoder(
    file: Path, values: dict[str, Any], weights: "dict[str, torch.Tensor]"
) -> tuple[int, "TranscoderConfig", dict[str, Any]]:
    """The layer, SAELens' configuration and what is noted of a published transcoder."""
    from sae_lens import TranscoderConfig

    layer = _layer(file, values)
    d_in, d_sae = _check_weights(file, weights, _TRANSCODER)
    metadata = {
        "hook_name": _text(values, "hook_point"),
        "hook_name_out": _text(values, "out_hook_point"),
        "model_name": _text(values, "model_name"),
        "neuronpedia_id": f"gpt2-small/{layer}-tres-dc",
    }
    return layer, TranscoderConfig(d_in=d_in, d_sae=d_sae, d_out=d_in, apply_b_dec_to_input=False), metadata


def _attention_sae(file: Path, weights: "dict[str, torch.Tensor]") -> tuple[int, "StandardSAEConfig", dict[str, Any]]:
    """The same of a published attention SAE, from the configuration beside it."""
    from sae_lens import StandardSAEConfig

    beside = file.with_name(f"{file.stem}_cfg.json")
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except OSError as error:
        raise AtlasError(f"{file} needs {beside.name} beside it ({error.strerror or error}).") from error
    except ValueError as error:
        raise AtlasError(f"{beside} is not JSON.") from error
    values = values if isinstance(values, dict) else {}
    hook = _text(values, "act_name")
    match = re.fullmatch(r"blocks\.([0-9]{1,3})\.attn\.hook_z", hook)
    if match is None:
        raise AtlasError(f"{beside} is for {hook[:60]!r}; an attention SAE of layer L is for blocks.L.attn.hook_z.")
    d_in, d_sae = _check_weights(file, weights, _SAE)
    if (values.get("act_size"), values.get("dict_size")) != (d_in, d_sae):
        raise AtlasError(f"{file} has W_enc of shape {(d_in, d_sae)}, which is not what {beside.name} says.")
    metadata = {
        "hook_name": hook,
        "model_name": _text(values, "model_name"),
        "neuronpedia_id": f"gpt2-small/{match[1]}-att-kk",
    }
    config = StandardSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=True, reshape_activations="hook_z")
    return int(match[1]), config, metadata


def _layer(file: Path, values: dict[str, Any]) -> int:
    """The layer whose MLP the transcoder stands for, from its two hooks."""
    if values.get("is_transcoder") is not True:
        raise AtlasError(f"{file} is not a transcoder's: its configuration does not say is_transcoder.")
    hook_in, hook_out = _text(values, "hook_point"), _text(values, "out_hook_point")
    match = re.fullmatch(r"blocks\.([0-9]{1,3})\.ln2\.hook_normalized", hook_in)
    if match is None or hook_out != f"blocks.{match[1]}.hook_mlp_out":
        raise AtlasError(
            f"{file} goes from {hook_in[:60]!r} to {hook_out[:60]!r}; a transcoder of layer L goes from "
            "blocks.L.ln2.hook_normalized to blocks.L.hook_mlp_out."
        )
    return int(match[1])


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def _check_weights(file: Path, weights: "dict[str, torch.Tensor]", names: Sequence[str]) -> tuple[int, int]:
    """(d_in, d_sae); the tensors must be those called for, belong together and be finite."""
    from ingest.model import finite

    if set(weights) != set(names):
        raise AtlasError(f"{file} does not hold exactly the tensors {', '.join(names)}.")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    d_in, d_sae = shapes["W_enc"] if len(shapes["W_enc"]) == 2 else (0, 0)
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    expected["b_dec_out"] = (d_in,)
    for name in names:
        if shapes[name] != expected[name]:
            raise AtlasError(f"{file} has {name} of shape {shapes[name]}, which does not fit W_enc {shapes['W_enc']}.")
        if not finite(weights[name]):
            raise AtlasError(f"{file} has NaN or infinite values in {name}; it is damaged.")
    return d_in, d_sae


def _folded(weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    b_enc = weights["b_enc"].double() - weights["b_dec"].double() @ weights["W_enc"].double()
    folded = {"W_enc": weights["W_enc"], "b_enc": b_enc, "W_dec": weights["W_dec"], "b_dec": weights["b_dec_out"]}
    return {name: value.float().contiguous() for name, value in folded.items()}


def _origin(file: Path) -> dict[str, str]:
    """Repository and revision of a file in the hub's cache (models--OWNER--NAME/snapshots/REVISION/FILE)."""
    parts = file.absolute().parts[-4:-1]
    if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots":
        return {"source": parts[0].removeprefix("models--").replace("--", "/"), "revision": parts[2]}
    return {"source": file.stem}


def _write(
    folder: Path,
    weights: "dict[str, torch.Tensor]",
    config: "StandardSAEConfig | TranscoderConfig",
    metadata: dict[str, Any],
) -> None:
    """The folder appears under its name once both files are whole."""
    from sae_lens.saes.sae import SAEMetadata
    from safetensors.torch import save_file

    config.metadata = SAEMetadata(**metadata)
    weights = {name: value.contiguous() for name, value in weights.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Inside a folder of its own, so that one left by a killed process is never taken for a dictionary.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
            made = Path(part) / folder.name
            made.mkdir()
            save_file(weights, made / "sae_weights.safetensors")
            (made / "cfg.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
            made.rename(folder)
    except OSError as error:
        raise AtlasError(f"{folder} cannot be written: {error.strerror or error}.") from error
