"""Sparse dictionaries: attention SAEs on hook_z or hook_attn_out, MLP transcoders.

Read from SAELens' on-disk format (cfg.json and sae_weights.safetensors) through SAELens. Every kind
is brought to one form, p = (x - b_in) W_enc + b_enc, a = activation(p), x_hat = a W_dec + b_dec, so
that attribution knows a feature's pre-activation as a linear read (METHOD 2). Where a dictionary normalises
its input token by token (`layer_norm`), x stands for (x - mean x) / (std x + 1e-5), and x_hat for
x_hat std x + mean x. A skip transcoder adds x W_skip to x_hat: a linear path that stays open (METHOD 3). So does
attention without a dictionary, which is open altogether: z passes as it is. What cfg.json does not say of a published
dictionary, its `Origin` does.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from atlas.errors import AtlasError, cause
from atlas.records import DictionaryRecord
from ingest.hub import sha256
from ingest.model import LanguageModel, finite, processing
from ingest.registry import CONVENTIONS, convention, neuronpedia_source
from ingest.shelf import Matrices, Shelf

ACTIVATIONS = {
    "standard": "relu",
    "transcoder": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
    "skip_transcoder": "relu",
    "jumprelu_skip_transcoder": "jumprelu",
}
OPEN = "open"  # the kind of an attention site that is not replaced
WEIGHTS = "sae_weights.safetensors"
MEANS = "means.safetensors"
QUALITY = "quality.json"
TALL = 16  # features in a column where the strongest are looked for
NORM_EPS = 1e-5  # SAELens' layer norm adds it to the standard deviation


@dataclass(frozen=True)
class Origin:
    """What a registry knows of a dictionary: its set's short name, where it was published, and its weights."""

    name: str
    source: str
    revision: str
    weights: str


@dataclass(frozen=True)
class Place:
    """Where a dictionary lies, and where it came from if a registry says so."""

    folder: Path
    origin: Origin | None = None


@dataclass(frozen=True)
class Dictionary:
    """One dictionary in the common form.

    `matrices` opens W_enc and W_dec. Where they are stored in the dtype asked for they are the file itself, mapped
    into memory and never copied, in the layout of the file; else a feature's encoder lies in a row, as `encoder`
    gathers it. `b_in` is b_dec where the SAE subtracts it from its input, else zero. `k` is TopK's, `threshold`
    JumpReLU's; the other is None. `mean` is the mean activation of every feature over a corpus, and None where it was
    not measured (ingest/means.py). `layer_norm` says that it normalises its input. `W_skip` is a skip transcoder's
    linear path, and None in all others.
    """

    matrices: Callable[[], Matrices]
    b_enc: Float[torch.Tensor, " d_sae"]
    b_in: Float[torch.Tensor, " d_in"]
    b_dec: Float[torch.Tensor, " d_out"]
    threshold: Float[torch.Tensor, " d_sae"] | None
    k: int | None
    record: DictionaryRecord
    mean: Float[torch.Tensor, " d_sae"] | None = None
    layer_norm: bool = False
    W_skip: Float[torch.Tensor, "d_in d_out"] | None = None

    @property
    def W_enc(self) -> Float[torch.Tensor, "d_in d_sae"]:
        """The encoder, a column a feature."""
        return self.matrices().W_enc

    @property
    def W_dec(self) -> Float[torch.Tensor, "d_sae d_out"]:
        """The decoder, a row a feature."""
        return self.matrices().W_dec

    def pre_activations(self, x: Float[torch.Tensor, "pos d_in"]) -> Float[torch.Tensor, "pos d_sae"]:
        """p = (x - b_in) W_enc + b_enc; column-major, as the long side first is how the product is fastest."""
        if self.layer_norm:
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + NORM_EPS)
        return torch.addmm(self.b_enc[:, None], self.W_enc.T, (x - self.b_in).T).T

    def active(self, p: Float[torch.Tensor, "pos d_sae"]) -> Bool[torch.Tensor, "pos d_sae"]:
        """Which features fire; for those that do, a = p."""
        if self.threshold is not None:
            return p > self.threshold.clamp(min=0)
        return p > 0 if self.k is None else strongest(p, self.k)

    def activations(self, x: Float[torch.Tensor, "pos d_in"]) -> Float[torch.Tensor, "pos d_sae"]:
        """a, zero where a feature does not fire."""
        p = self.pre_activations(x)
        return torch.where(self.active(p), p, 0)

    def reconstruct(self, x: Float[torch.Tensor, "pos d_in"]) -> Float[torch.Tensor, "pos d_out"]:
        """x_hat = a W_dec + b_dec, and x W_skip where there is a linear path."""
        x_hat = self.activations(x) @ self.W_dec + self.b_dec
        if self.W_skip is not None:
            x_hat += x @ self.W_skip
        return x_hat * x.std(1, keepdim=True) + x.mean(1, keepdim=True) if self.layer_norm else x_hat

    @property
    def is_open(self) -> bool:
        """Whether it stands for attention without a dictionary, which passes z as it is."""
        return self.record.kind == OPEN

    def encoder(self, index: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n d_in"]:
        """The encoder rows of some features."""
        return self.W_enc.T.index_select(0, index)

    def encoder_sums(
        self, index: Int[torch.Tensor, " n"], weight: Float[torch.Tensor, " n"], first: Int[torch.Tensor, " sum"]
    ) -> Float[torch.Tensor, "sum d_in"]:
        """Weighted sums of features' encoder rows, over the stretches of `index` that begin at `first`."""
        rows = self.W_enc.T
        if not rows.is_contiguous():
            needed, index = index.unique(return_inverse=True)
            rows = self.encoder(needed)
        return functional.embedding_bag(index, rows, first, mode="sum", per_sample_weights=weight)

    @cached_property
    def constant(self) -> Float[torch.Tensor, " d_sae"]:
        """b_enc - b_in . enc: the features' pre-activations on an input of zero."""
        return self.b_enc - self.b_in @ self.W_enc

    @cached_property
    def decoder_norm(self) -> Float[torch.Tensor, " d_sae"]:
        """The lengths of what the features write."""
        return self.W_dec.norm(dim=1)


def strongest(p: Float[torch.Tensor, "pos d_sae"], k: int) -> Bool[torch.Tensor, "pos d_sae"]:
    """Which are above 0 and among the `k` greatest of their row; of equal ones those that torch.topk takes.

    Features are dealt into columns of about TALL. A row's k + 1 greatest are all in the k + 1 columns of the greatest
    maxima, as each of the others has that many above it; so only these columns are searched.
    """
    d_sae = p.shape[1]
    n = d_sae // TALL
    if n <= k:
        return _topk(p, k)
    tall, rest = divmod(d_sae, n)
    maxima = p.T[: tall * n].unflatten(0, (tall, n)).amax(0)
    torch.maximum(maxima[:rest], p.T[tall * n :], out=maxima[:rest])
    column = maxima.T.topk(k + 1, dim=1, sorted=False).indices
    index = (column[:, :, None] + n * torch.arange(tall + 1, device=p.device)).flatten(1)
    searched = p.gather(1, index.clamp(max=d_sae - 1)).masked_fill_(index >= d_sae, -torch.inf)
    *_, least, next = searched.topk(k + 1, dim=1).values.unbind(1)
    below = torch.nextafter(least, torch.full_like(least, -torch.inf)).clamp(min=0)
    on = p > below[:, None]
    tied = (least == next).nonzero()[:, 0]
    if len(tied):
        on[tied] = _topk(p[tied], k)
    return on


def _topk(p: Float[torch.Tensor, "pos d_sae"], k: int) -> Bool[torch.Tensor, "pos d_sae"]:
    index = p.contiguous().topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(p, dtype=torch.bool).scatter_(1, index, value=True) & (p > 0)


def places_in(directory: Path) -> list[Place]:
    """The dictionaries in `directory`, one folder each. Raises AtlasError when there is none."""
    places = [Place(file.parent) for file in sorted(directory.glob("*/cfg.json"))]
    if not places:
        raise AtlasError(f"No dictionaries in {directory}: one folder each is expected, with cfg.json inside.")
    return places


def weights_of(place: Place) -> str:
    """The convention of the model's weights that a dictionary was trained on (CONVENTIONS of the registry).

    The registry's word; else `weights` in the metadata of cfg.json, else SAELens' `model_from_pretrained_kwargs`,
    else processed. Raises AtlasError where that is no convention.
    """
    if place.origin is not None:
        return place.origin.weights
    config = _config(place.folder)
    metadata = config.get("metadata") or config
    arguments = metadata.get("model_from_pretrained_kwargs")
    weights = metadata.get("weights") or (
        convention(place.folder, arguments) if isinstance(arguments, dict) else "processed"
    )
    if weights not in CONVENTIONS:
        raise AtlasError(f"{place.folder} says it was trained on {weights!r} weights, not {', '.join(CONVENTIONS)}.")
    return weights


def layer_of(folder: Path) -> int:
    """The layer of the dictionary in `folder`. Raises AtlasError where it reads no site of the atlas."""
    config = _config(folder)
    metadata = config.get("metadata") or config
    return _site(str(metadata.get("hook_name") or metadata.get("hook_point") or ""), folder)[0]


def write_beside(file: Path, content: bytes) -> None:
    """Write a file into a dictionary's folder, whole or not at all. Raises AtlasError where it cannot be written."""
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".part-") as part:
            (Path(part) / file.name).write_bytes(content)
            os.replace(Path(part) / file.name, file)
    except OSError as error:
        raise AtlasError(f"{file} cannot be written: {error.strerror or error}.") from error


def load_dictionaries(places: Sequence[Place], model: LanguageModel, shelf: Shelf | None = None) -> list[Dictionary]:
    """A dictionary for every site of every layer of `model`: attn and mlp of each layer in turn.

    Where there is none stands one without features: attention stays open (METHOD 3), and what an MLP writes is
    reconstruction error altogether. Raises AtlasError when a site has two, when a dictionary does not fit the model,
    is of a kind that the atlas cannot read, or holds a number that is not finite.
    """
    found: dict[tuple[int, str], Dictionary] = {}
    for place in places:
        dictionary = load_dictionary(place.folder, model, place.origin, shelf)
        site = (dictionary.record.layer, dictionary.record.site)
        if site in found:
            raise AtlasError(f"{place.folder} is a second dictionary for layer {site[0]} {site[1]}; keep one of them.")
        found[site] = dictionary
    sites = [(layer, site) for layer in range(model.record.n_layers) for site in ("attn", "mlp")]
    return [found.get(site) or no_features(model, *site) for site in sites]


def load_dictionary(
    folder: Path, model: LanguageModel, origin: Origin | None = None, shelf: Shelf | None = None
) -> Dictionary:
    """The dictionary in `folder`, in SAELens' format, checked against `model`; `shelf` holds its matrices."""
    weights, like = weights_of(Place(folder, origin)), model.weights.W_V
    sae = _load_sae(folder, like)
    metadata: dict[str, Any] = sae.cfg.metadata.to_dict()
    hook_in = str(metadata.get("hook_name") or "")
    layer, site = _site(hook_in, folder)
    architecture = _check_kind(folder, sae, site)
    if model.record.weight_processing != processing(weights):
        raise AtlasError(
            f"{folder} was trained on {weights} weights, but model {model.record.id} was loaded with "
            f"{model.record.weight_processing}."
        )
    if weights != "processed" and site == "mlp":
        raise AtlasError(f"{folder} is a transcoder of {weights} weights; the atlas reads those of processed weights.")
    tensors = sae.state_dict()
    for name, value in tensors.items():
        if not finite(value):
            raise AtlasError(f"{folder} has NaN or infinite values in {name}; its file is damaged.")
    d_in, d_sae = tensors["W_enc"].shape
    d_out = tensors["W_dec"].shape[1]
    _check_fit(folder, model, layer, hook_in, d_in, d_out)
    name = origin.name if origin else neuronpedia_source(metadata.get("neuronpedia_id"))
    record = DictionaryRecord(
        id=f"{model.record.id}/{layer}/{site}" + (f"/{name}" if name else ""),
        layer=layer,
        site=site,
        kind="sae" if site == "attn" else "transcoder",
        activation=ACTIVATIONS[architecture],
        hook_in=hook_in,
        hook_out=str(metadata.get("hook_name_out") or hook_in),
        d_in=d_in,
        d_sae=d_sae,
        source=origin.source if origin else str(metadata.get("source") or folder.parent.name),
        revision=origin.revision if origin else str(metadata.get("revision") or "local"),
        sha256=sha256(folder / WEIGHTS),
    )
    record = replace(record, **_quality(folder, record.sha256, metadata))
    shelf = shelf or Shelf()
    shelf.take(folder, lambda: _matrices(folder, sae))
    # The others are copied, as a view would keep the whole file open.
    b_dec, threshold = tensors["b_dec"].clone(), tensors.get("threshold")
    return Dictionary(
        matrices=lambda: shelf.take(folder, lambda: _matrices(folder, _load_sae(folder, like))),
        b_enc=tensors["b_enc"].clone(),
        b_in=b_dec if sae.cfg.apply_b_dec_to_input else b_dec.new_zeros(d_in),
        b_dec=b_dec,
        threshold=None if threshold is None else threshold.clone(),
        k=getattr(sae.cfg, "k", None),
        record=record,
        mean=_mean(folder, record, like),
        layer_norm=sae.cfg.normalize_activations == "layer_norm",
        W_skip=tensors["W_skip"].T.clone() if "W_skip" in tensors else None,
    )


def replacement_id(model: LanguageModel, dictionaries: list[Dictionary], dtype: torch.dtype) -> str:
    """The id of a ReplacementModel: a hash of the model's and the dictionaries' bytes, and of a dtype but float32."""
    parts = [model.record.id, model.record.revision, model.record.weight_processing]
    parts += [] if dtype is torch.float32 else [str(dtype)]
    parts += [f"{d.record.id}:{d.record.sha256}" for d in dictionaries]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _mean(folder: Path, record: DictionaryRecord, like: torch.Tensor) -> Float[torch.Tensor, " d_sae"] | None:
    """The feature means beside a dictionary; None where there are none, or they were taken with other weights."""
    file = folder / MEANS
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            measured_with, mean = (opened.metadata() or {}).get("sha256"), opened.get_tensor("mean").to(like)
    except (SafetensorError, OSError) as error:
        raise AtlasError(f"{file} holds no feature means ({cause(error)}); remove it.") from error
    if measured_with != record.sha256:
        return None
    if mean.shape != (record.d_sae,) or not torch.isfinite(mean).all():
        raise AtlasError(f"{file} does not hold a finite mean for each of {record.d_sae} features; remove it.")
    return mean


def _quality(folder: Path, weights_sha256: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a dictionary: beside it by `atlas dictionaries measure`, or by who trained it."""
    names = ("explained_variance", "l0", "loss_kept", "error_share", "measured_on")
    file = folder / QUALITY
    if not file.is_file():
        return {name: metadata.get(name) for name in names}
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
        if measured["sha256"] == weights_sha256:
            return {name: measured[name] for name in names}
    except (ValueError, TypeError, KeyError) as error:
        raise AtlasError(f"{file} cannot be read ({cause(error)}); remove it, and measure anew.") from error
    raise AtlasError(f"{file} is of other weights; remove it, or measure anew: atlas dictionaries measure.")


def no_features(model: LanguageModel, layer: int, site: str) -> Dictionary:
    """A dictionary without features: open attention, or an MLP of which everything is error."""
    is_open = site == "attn"
    width = model.record.n_heads * model.record.d_head if is_open else model.record.d_model
    zeros = model.weights.W_V.new_zeros(width)
    record = DictionaryRecord(
        id=f"{model.record.id}/{layer}/{site}/" + ("open" if is_open else "none"),
        layer=layer,
        site=site,
        kind=OPEN if is_open else "transcoder",
        activation="relu",
        hook_in=f"blocks.{layer}." + ("attn.hook_z" if is_open else "ln2.hook_normalized"),
        hook_out=f"blocks.{layer}." + ("attn.hook_z" if is_open else "hook_mlp_out"),
        d_in=len(zeros),
        d_sae=0,
        source="none",
        revision="none",
        sha256="none",
    )
    empty = zeros.new_zeros(0, len(zeros))
    return Dictionary(lambda: Matrices(empty.T, empty), empty[:, 0], zeros, zeros, None, None, record, mean=empty[:, 0])


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AtlasError(f"{folder / 'cfg.json'} cannot be read as JSON ({cause(error)}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("metadata") or {}, dict):
        raise AtlasError(f"{folder / 'cfg.json'} is no configuration of a dictionary.")
    return config


def _check_kind(folder: Path, sae: Any, site: str) -> str:
    """SAELens' name of the architecture. Raises AtlasError where the atlas has no arithmetic for it."""
    architecture: str = sae.cfg.architecture()
    if architecture not in ACTIVATIONS:
        raise AtlasError(f"{folder} is a {architecture!r} dictionary; the atlas reads {', '.join(ACTIVATIONS)}.")
    normalised = sae.cfg.normalize_activations
    if normalised != "none" and (normalised, site) != ("layer_norm", "attn"):
        raise AtlasError(f"{folder} normalises its input by {normalised!r}, which is not supported.")
    if sae.cfg.metadata.hook_head_index is not None:
        raise AtlasError(f"{folder} reads one head alone (hook_head_index), which is not supported.")
    return architecture


def _matrices(folder: Path, sae: Any) -> Matrices:
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        mapped = (W_enc.device, W_enc.dtype) == (torch.device("cpu"), file.get_tensor("W_enc").dtype)
    # What had to be copied is laid out a row a feature.
    return Matrices(W_enc if mapped else W_enc.T.contiguous().T, W_dec)


def _load_sae(folder: Path, like: torch.Tensor) -> Any:
    """SAELens' object in the dtype and on the device of `like`: the file itself, mapped, where that is the file's."""
    from sae_lens import SAE

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae: Any = SAE.load_from_disk(folder, str(like.device), str(like.dtype).removeprefix("torch."))
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
