"""Sparse dictionaries: attention SAEs on hook_z or hook_attn_out, MLP transcoders.

Read from SAELens' on-disk format (cfg.json and sae_weights.safetensors) through SAELens. Every kind
is brought to one form, p = (x - b_in) W_enc + b_enc, a = activation(p), x_hat = a W_dec + b_dec, so
that attribution knows a feature's pre-activation as a linear read (METHOD 2).
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open

from atlas.errors import AtlasError, cause
from atlas.records import DictionaryRecord
from ingest.model import LanguageModel, sha256

ACTIVATIONS = {
    "standard": "relu",
    "transcoder": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
}
MEANS = "means.safetensors"


@dataclass(frozen=True)
class Dictionary:
    """One dictionary in the common form.

    `W_enc` is kept column-major, so that the encoder rows of single features are contiguous.
    `b_in` is b_dec where the SAE subtracts it from its input, else zero. `k` is TopK's, `threshold`
    JumpReLU's; the other is None. `mean` is the mean activation of every feature over a corpus, and None
    where it was not measured (ingest/means.py).
    """

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_enc: Float[torch.Tensor, " d_sae"]
    b_in: Float[torch.Tensor, " d_in"]
    W_dec: Float[torch.Tensor, "d_sae d_out"]
    b_dec: Float[torch.Tensor, " d_out"]
    threshold: Float[torch.Tensor, " d_sae"] | None
    k: int | None
    record: DictionaryRecord
    mean: Float[torch.Tensor, " d_sae"] | None = None

    def pre_activations(self, x: Float[torch.Tensor, "pos d_in"]) -> Float[torch.Tensor, "pos d_sae"]:
        """p = (x - b_in) W_enc + b_enc."""
        return torch.addmm(self.b_enc, x - self.b_in, self.W_enc)

    def active(self, p: Float[torch.Tensor, "pos d_sae"]) -> Bool[torch.Tensor, "pos d_sae"]:
        """Which features fire; for those that do, a = p."""
        if self.threshold is not None:
            return (p > self.threshold) & (p > 0)
        if self.k is not None:
            top = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(self.k, dim=1).indices, value=True)
            return top & (p > 0)
        return p > 0

    def activations(self, x: Float[torch.Tensor, "pos d_in"]) -> Float[torch.Tensor, "pos d_sae"]:
        """a, zero where a feature does not fire."""
        p = self.pre_activations(x)
        return p * self.active(p)

    def encoder(self, index: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n d_in"]:
        """The encoder rows of some features."""
        return self.W_enc.T[index]

    def constants(self, index: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, " n"]:
        """b_enc - b_in . enc of some features: their pre-activations on an input of zero."""
        return self.b_enc[index] - self.encoder(index) @ self.b_in


def load_dictionaries(directory: Path, model: LanguageModel) -> list[Dictionary]:
    """The dictionaries in `directory`, one folder each, for every site of every layer of `model`.

    Raises AtlasError when a site has none or two, when one does not fit the model, is of a kind that
    the atlas cannot read, or holds a number that is not finite.
    """
    folders = sorted(p.parent for p in directory.glob("*/cfg.json"))
    if not folders:
        raise AtlasError(f"No dictionaries in {directory}: one folder each is expected, with cfg.json inside.")
    found: dict[tuple[int, str], Dictionary] = {}
    for folder in folders:
        dictionary = load_dictionary(folder, model)
        site = (dictionary.record.layer, dictionary.record.site)
        if site in found:
            raise AtlasError(f"{folder} is a second dictionary for layer {site[0]} {site[1]}; keep one of them.")
        found[site] = dictionary
    sites = [(layer, site) for layer in range(model.record.n_layers) for site in ("attn", "mlp")]
    for layer, site in sites:
        if (layer, site) not in found:
            raise AtlasError(f"{directory} has no dictionary for layer {layer} {site}; every site needs one.")
    return [found[site] for site in sites]


def load_dictionary(folder: Path, model: LanguageModel) -> Dictionary:
    """The dictionary in `folder`, in SAELens' format, checked against `model`."""
    sae = _load_sae(folder)
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    metadata: dict[str, Any] = config.get("metadata") or {}
    architecture = sae.cfg.architecture()
    if architecture not in ACTIVATIONS:
        raise AtlasError(f"{folder} is a {architecture!r} dictionary; the atlas reads {', '.join(ACTIVATIONS)}.")
    if sae.cfg.normalize_activations != "none":
        raise AtlasError(f"{folder} normalises its input by {sae.cfg.normalize_activations!r}, which is not supported.")
    hook_in = str(metadata.get("hook_name") or "")
    layer, site = _site(hook_in, folder)
    tensors = {name: value.detach().to(model.weights.W_V.dtype) for name, value in sae.state_dict().items()}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise AtlasError(f"{folder} has NaN or infinite values in {name}; its file is damaged.")
    d_in, d_sae = tensors["W_enc"].shape
    d_out = tensors["W_dec"].shape[1]
    _check_fit(folder, model, layer, hook_in, d_in, d_out)
    record = DictionaryRecord(
        id=f"{model.record.id}/{layer}/{site}",
        layer=layer,
        site=site,
        kind="sae" if site == "attn" else "transcoder",
        activation=ACTIVATIONS[architecture],
        hook_in=hook_in,
        hook_out=str(metadata.get("hook_name_out") or hook_in),
        d_in=d_in,
        d_sae=d_sae,
        source=str(metadata.get("source") or folder.parent.name),
        revision=str(metadata.get("revision") or "local"),
        sha256=sha256(folder / "sae_weights.safetensors"),
        explained_variance=metadata.get("explained_variance"),
        l0=metadata.get("l0"),
    )
    b_dec = tensors["b_dec"]
    return Dictionary(
        W_enc=tensors["W_enc"].T.contiguous().T,
        b_enc=tensors["b_enc"],
        b_in=b_dec if sae.cfg.apply_b_dec_to_input else torch.zeros(d_in, dtype=b_dec.dtype),
        W_dec=tensors["W_dec"].contiguous(),
        b_dec=b_dec,
        threshold=tensors.get("threshold"),
        k=getattr(sae.cfg, "k", None),
        record=record,
        mean=_mean(folder, record, b_dec.dtype),
    )


def replacement_id(model: LanguageModel, dictionaries: list[Dictionary]) -> str:
    """The id of a ReplacementModel: a hash of the model's and the dictionaries' bytes."""
    parts = [model.record.id, model.record.revision, model.record.weight_processing]
    parts += [f"{d.record.id}:{d.record.sha256}" for d in dictionaries]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _mean(folder: Path, record: DictionaryRecord, dtype: torch.dtype) -> Float[torch.Tensor, " d_sae"] | None:
    """The feature means beside a dictionary; None where there are none, or they were taken with other weights."""
    file = folder / MEANS
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            measured_with, mean = (opened.metadata() or {}).get("sha256"), opened.get_tensor("mean").to(dtype)
    except (SafetensorError, OSError) as error:
        raise AtlasError(f"{file} holds no feature means ({cause(error)}); remove it.") from error
    if measured_with != record.sha256:
        return None
    if mean.shape != (record.d_sae,) or not torch.isfinite(mean).all():
        raise AtlasError(f"{file} does not hold a finite mean for each of {record.d_sae} features; remove it.")
    return mean


def _load_sae(folder: Path) -> Any:
    from sae_lens import SAE

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae: Any = SAE.load_from_disk(folder, dtype="float32")
    except Exception as error:
        raise AtlasError(f"{folder} is no dictionary in SAELens' format ({cause(error)}).") from error
    if sae.cfg.architecture() == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
        sae.fold_W_dec_norm()
    return sae


def _site(hook_in: str, folder: Path) -> tuple[int, str]:
    """The layer and the site that a hook's name stands for."""
    sites = {"attn.hook_z": "attn", "hook_attn_out": "attn", "ln2.hook_normalized": "mlp"}
    parts = hook_in.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit() and parts[2] in sites:
        return int(parts[1]), sites[parts[2]]
    raise AtlasError(
        f"{folder} reads {hook_in!r}; the atlas needs blocks.L.attn.hook_z, blocks.L.hook_attn_out or "
        "blocks.L.ln2.hook_normalized (metadata.hook_name in cfg.json)."
    )


def _check_fit(folder: Path, model: LanguageModel, layer: int, hook_in: str, d_in: int, d_out: int) -> None:
    record = model.record
    if layer >= record.n_layers:
        raise AtlasError(f"{folder} is for layer {layer}, but model {record.id} has {record.n_layers} layers.")
    width = record.n_heads * record.d_head if hook_in.endswith("hook_z") else record.d_model
    if (d_in, d_out) != (width, width):
        raise AtlasError(
            f"{folder} maps {d_in} to {d_out} dimensions, but {hook_in} of model {record.id} is {width} wide."
        )
