"""A GPT-2-architecture language model with TransformerLens' processed weights.

`mini` comes with the package; any other name is a directory written by `save_pretrained`, a published model of
the registry, or a repository of the hub. Weights are folded and centred (fold_ln, center_writing_weights,
center_unembed, fold_value_biases), the convention METHOD.md is written in. For dictionaries that were trained on
other weights, the steps that would move what they read are left out (CONVENTIONS in ingest/registry.py); layer
norms are folded always, which moves nothing but what stands inside of them.
"""

import json
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers.decoders import ByteLevel

from atlas.errors import AtlasError, cause
from atlas.records import ModelRecord
from ingest.hub import commit_of, fetch, sha256
from ingest.registry import CONVENTIONS, published_model

MINI = Path(__file__).parent / "mini" / "weights"
STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
WEIGHTS = "model.safetensors"
CUT = "\ufffd"  # what a part of a character decodes to
FILES = ("config.json", WEIGHTS, "tokenizer.json")


@dataclass(frozen=True)
class Weights:
    """The processed weights that attribution needs, named and shaped as in TransformerLens; float32 or float64.

    `attn_scale` is what each layer multiplies q . k by: 1 / sqrt(d_head), over the layer's number where the
    model scales so.
    """

    W_Q: Float[torch.Tensor, "layer head d_model d_head"]
    b_Q: Float[torch.Tensor, "layer head d_head"]
    W_K: Float[torch.Tensor, "layer head d_model d_head"]
    b_K: Float[torch.Tensor, "layer head d_head"]
    attn_scale: tuple[float, ...]
    W_V: Float[torch.Tensor, "layer head d_model d_head"]
    b_V: Float[torch.Tensor, "layer head d_head"]
    W_O: Float[torch.Tensor, "layer head d_head d_model"]
    b_O: Float[torch.Tensor, "layer d_model"]
    W_U: Float[torch.Tensor, "d_model d_vocab"]
    b_U: Float[torch.Tensor, " d_vocab"]


@dataclass(frozen=True)
class LanguageModel:
    """The model (`bridge`, a TransformerBridge), its tokenizer, its weights, and what is stored of it."""

    bridge: Any
    tokenizer: Any
    weights: Weights
    record: ModelRecord

    @property
    def device(self) -> torch.device:
        """Where the model, its dictionaries and all that is computed with them are."""
        return self.weights.W_V.device

    @property
    def bos(self) -> int:
        """The token that stands in front of every prompt."""
        return int(self.tokenizer.bos_token_id)

    def tokens(self, text: str) -> list[int]:
        """BOS and the token ids of `text`."""
        return [self.bos, *self.tokenizer.encode(text, add_special_tokens=False)]

    def text(self, tokens: list[int]) -> str:
        """The text of several tokens."""
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def texts(self, tokens: Sequence[list[int]]) -> list[str]:
        """The texts of many stretches of tokens, at a fraction of what `text` takes for each."""
        return self.tokenizer.backend_tokenizer.decode_batch(list(tokens), skip_special_tokens=False)

    def stretches(self, tokens: list[int], bounds: Sequence[tuple[int, int]]) -> list[str]:
        """The texts from one of `tokens` to another, both with it.

        Byte-level tokens decode one by one, where none ends within a character.
        """
        if not isinstance(self.tokenizer.backend_tokenizer.decoder, ByteLevel):
            return self.texts([tokens[a : b + 1] for a, b in bounds])
        pieces = self.texts([[token] for token in tokens])
        texts = ["".join(pieces[a : b + 1]) for a, b in bounds]
        cut = [i for i, text in enumerate(texts) if CUT in text]
        for i, text in zip(cut, self.texts([tokens[bounds[i][0] : bounds[i][1] + 1] for i in cut]), strict=True):
            texts[i] = text
        return texts

    def token_text(self, token: int) -> str:
        """The text of one token, as a person reads it."""
        return self.text([token])


def load_model(
    name: str, dtype: torch.dtype = torch.float32, weights: str = "processed", device: str = "cpu"
) -> LanguageModel:
    """The model called `mini`, in the directory `name`, or on the hub (NAME or NAME@REVISION).

    It computes in `dtype` on `device` (cpu or cuda); what is attributed of what it computed is float32 at least.
    `weights` is one of CONVENTIONS. Raises AtlasError when there is no such model or device, when the model is not of
    GPT-2's architecture, or when a weight is not a finite number.
    """
    check_device(device)
    directory, id, revision = _locate(name)
    _check_directory(name, directory)
    steps = processing(weights)
    # Processed in the dtype asked for only where that is the more precise one.
    exact = torch.promote_types(dtype, torch.float32)
    bridge = _boot(name, directory, steps.split(","), exact)
    bridge = bridge.to(device, dtype, print_details=False)
    for parameter_name, parameter in bridge.named_parameters():
        if not finite(parameter):
            raise AtlasError(f"Model {name!r} has NaN or infinite values in {parameter_name}; its file is damaged.")
    record = ModelRecord(
        id=id,
        architecture="gpt2",
        n_layers=bridge.cfg.n_layers,
        n_heads=bridge.cfg.n_heads,
        d_model=bridge.cfg.d_model,
        d_head=bridge.cfg.d_head,
        n_ctx=bridge.cfg.n_ctx,
        d_vocab=bridge.cfg.d_vocab,
        revision=revision,
        weight_processing=steps,
    )
    return LanguageModel(bridge, bridge.tokenizer, _weights(bridge, exact), record)


def finite(value: torch.Tensor) -> bool:
    """Whether every number is finite. A sum with one that is not never is, and is far quicker than looking at each."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def processing(weights: str) -> str:
    """The processing of the model for dictionaries of a convention, as it is recorded."""
    return ",".join(step for step in STEPS if step in CONVENTIONS[weights] | {"fold_ln"})


def check_name(name: str) -> None:
    """Raises AtlasError where `name` is neither `mini` nor a directory, and can be no repository of the hub."""
    if name != "mini" and not Path(name).is_dir() and not re.fullmatch(r"([\w.-]+/)?[\w.-]+(@[\w.-]+)?", name):
        raise AtlasError(f"No model {name!r}: there is no such directory, and no repository of the hub is called so.")


def check_device(device: str) -> None:
    """Raises AtlasError where `device` is cuda and PyTorch can use none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise AtlasError("--device cuda: PyTorch finds no GPU that it can use here; leave the option out.")


def _locate(name: str) -> tuple[Path, str, str]:
    """(directory, id, revision) of a model; downloads what is on the hub and not in its cache."""
    directory = MINI if name == "mini" else Path(name)
    if directory.is_dir():
        id = "mini" if name == "mini" else directory.resolve().name
        return directory, id, sha256(directory / WEIGHTS) if (directory / WEIGHTS).is_file() else ""
    check_name(name)
    model = published_model(name)
    files = (*FILES, "tokenizer_config.json")
    paths = fetch(model.repository, model.revision, files, {WEIGHTS: model.sha256})
    return paths[0].parent, name.partition("@")[0].rpartition("/")[2], commit_of(paths[0])


def _check_directory(name: str, directory: Path) -> None:
    for file in FILES:
        if not (directory / file).is_file():
            raise AtlasError(
                f"{directory} has no {file}; a model directory holds what GPT2LMHeadModel.save_pretrained "
                "and its tokenizer's save_pretrained write."
            )
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise AtlasError(f"{directory / 'config.json'} is not JSON in UTF-8.") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "gpt2":
        raise AtlasError(f"Model {name!r} is of type {kind!r}; the atlas reads GPT-2's architecture only.")


def _boot(name: str, directory: Path, steps: Sequence[str], dtype: torch.dtype) -> Any:
    """Load through TransformerBridge, which prints and warns about what no user needs to know."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # Told to, as it takes a GPU wherever there is one, where no dictionary would be.
            bridge: Any = TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=dtype)
            bridge.enable_compatibility_mode(disable_warnings=True, **{step: step in steps for step in STEPS})
    except Exception as error:
        raise AtlasError(f"Model {name!r} in {directory} could not be loaded ({cause(error)}).") from error
    finally:
        logging.disable(previous)
    return bridge


def _weights(bridge: Any, dtype: torch.dtype) -> Weights:
    names = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O", "W_U", "b_U")
    by_layer = getattr(bridge.cfg, "scale_attn_by_inverse_layer_idx", False)
    scale = tuple(bridge.cfg.d_head**-0.5 / (layer + 1 if by_layer else 1) for layer in range(bridge.cfg.n_layers))
    return Weights(attn_scale=scale, **{name: getattr(bridge, name).detach().to(dtype) for name in names})
