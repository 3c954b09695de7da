"""circuit-tracer's part of bench_circuit_tracer, run by the Python of an environment where it is installed.

    python circuit_tracer_side.py FOLDER

FOLDER holds `model.safetensors` (tokens, and weights under TransformerLens' names), `transcoder.L.safetensors` of
every layer, and `request.json`. Its own `attribute` picks the targets, as a user gets them. Only the seconds spent
in the computation of rows are counted as such. Leaves `graph.safetensors` there, and prints one JSON object.
"""

import json
import sys
import time
from pathlib import Path

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.attribution.context_transformerlens import AttributionContext
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from clock import peak_memory, wall
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast


def main(folder: Path) -> None:
    """Build the model, attribute, and leave the graph."""
    request = json.loads((folder / "request.json").read_text())
    device = request["device"]
    torch.set_num_threads(request["threads"])
    torch.set_float32_matmul_precision("highest")
    weights = load_file(folder / "model.safetensors")
    tokens = weights.pop("tokens")
    model = replacement_model(folder, weights, request)
    seconds = {"rows": 0.0, "cpu": 0.0, "n": 0}
    compute_batch = AttributionContext.compute_batch

    def timed(*arguments, **options):
        started, cpu = wall(device), time.process_time()
        rows = compute_batch(*arguments, **options)
        seconds["rows"] += wall(device) - started
        seconds["cpu"] += time.process_time() - cpu
        seconds["n"] += len(rows)
        return rows

    AttributionContext.compute_batch = timed
    started = wall(device)
    graph = attribute(
        tokens, model, max_n_logits=request["logits"], desired_logit_prob=1.0, batch_size=request["batch"],
        max_feature_nodes=request["rows"] - request["logits"],
    )  # fmt: skip
    whole = wall(device) - started
    save_file(
        {
            "edges": graph.adjacency_matrix.contiguous(),
            "features": graph.active_features[graph.selected_features].contiguous(),
            "logits": torch.tensor([target.vocab_idx for target in graph.logit_targets]),
        },
        folder / "graph.safetensors",
    )
    print(
        json.dumps(
            {
                "rows": seconds["n"],
                "rows_s": seconds["rows"],
                "cpu_s": seconds["cpu"],
                "whole_s": whole,
                "peak": peak_memory(device),
            }
        )
    )


def replacement_model(folder: Path, weights: dict[str, torch.Tensor], request: dict) -> TransformerLensReplacementModel:
    """The model with its transcoders in place of the MLPs."""
    n_layers, n_heads, d_model, d_head = (
        len({name.split(".")[1] for name in weights if name.startswith("blocks.")}), *weights["blocks.0.attn.W_Q"].shape
    )  # fmt: skip
    config = HookedTransformerConfig(
        n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_head, n_ctx=len(weights["pos_embed.W_pos"]),
        d_vocab=len(weights["embed.W_E"]), d_mlp=weights["blocks.0.mlp.W_in"].shape[1], act_fn="gelu_new",
        normalization_type="LNPre", device=request["device"], dtype=torch.float32, eps=request["eps"],
    )  # fmt: skip
    paths = {layer: str(folder / f"transcoder.{layer}.safetensors") for layer in range(n_layers)}
    transcoders = load_transcoder_set(
        paths, "bench", "ln2.hook_normalized", "hook_mlp_out", torch.device(request["device"]), torch.float32
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=request["tokenizer"])
    model = TransformerLensReplacementModel.from_config(config, transcoders, tokenizer=tokenizer)
    inside = {".mlp.": ".mlp.old_mlp.", "unembed.": "unembed.old_unembed."}
    for old, new in inside.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    missing = model.load_state_dict(weights, strict=False)
    left = [
        name for name in missing.missing_keys if not name.endswith(("mask", "IGNORE")) and "transcoders" not in name
    ]
    if left or missing.unexpected_keys:
        raise ValueError(f"The weights do not fit: {left} {missing.unexpected_keys}")
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
