"""A GPT-2-architecture language model with TransformerLens' processed weights.

`mini` comes with the package; any other name is a directory written by `save_pretrained` or a
name that the hub's cache knows. Weights are folded and centred (fold_ln, center_writing_weights,
center_unembed, fold_value_biases), the convention METHOD.md is written in.
"""

import contextlib
import hashlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from atlas.errors import AtlasError, cause
from atlas.records import ModelRecord

MINI = Path(__file__).parent / "mini" / "weights"
PROCESSING = "fold_ln,center_writing_weights,center_unembed,fold_value_biases"


@dataclass(frozen=True)
class Weights:
    """The processed weights that attribution needs, named and shaped as in TransformerLens.

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
    def bos(self) -> int:
        """The token that stands in front of every prompt."""
        return int(self.tokenizer.bos_token_id)

    def tokens(self, text: str) -> list[int]:
        """BOS and the token ids of `text`."""
        return [self.bos, *self.tokenizer.encode(text, add_special_tokens=False)]

    def text(self, tokens: list[int]) -> str:
        """The text of several tokens."""
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def token_text(self, token: int) -> str:
        """The text of one token, as a person reads it."""
        return self.text([token])


def load_model(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model called `mini`, in the directory `name`, or known to the hub's cache by `name`.

    Raises AtlasError when there is no such model, when it is not of GPT-2's architecture, or when a
    weight is not a finite number.
    """
    directory = MINI if name == "mini" else Path(name)
    if directory.is_dir():
        _require_files(directory)
    bridge = _boot(str(directory) if directory.is_dir() else name)
    config = bridge.original_model.config
    if config.model_type != "gpt2":
        raise AtlasError(f"Model {name!r} is of type {config.model_type!r}; the atlas reads GPT-2's architecture only.")
    if dtype is not torch.float32:
        with contextlib.redirect_stdout(io.StringIO()):
            bridge = bridge.to(dtype)
    for parameter_name, parameter in bridge.named_parameters():
        if not torch.isfinite(parameter).all():
            raise AtlasError(f"Model {name!r} has NaN or infinite values in {parameter_name}; its file is damaged.")
    record = ModelRecord(
        id="mini" if name == "mini" else directory.resolve().name if directory.is_dir() else name,
        architecture="gpt2",
        n_layers=bridge.cfg.n_layers,
        n_heads=bridge.cfg.n_heads,
        d_model=bridge.cfg.d_model,
        d_head=bridge.cfg.d_head,
        n_ctx=bridge.cfg.n_ctx,
        d_vocab=bridge.cfg.d_vocab,
        revision=_revision(directory) if directory.is_dir() else str(getattr(config, "_commit_hash", "unknown")),
        weight_processing=PROCESSING,
    )
    return LanguageModel(bridge, bridge.tokenizer, _weights(bridge), record)


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_files(directory: Path) -> None:
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / file).is_file():
            raise AtlasError(
                f"{directory} has no {file}; a model directory holds what GPT2LMHeadModel.save_pretrained "
                "and its tokenizer's save_pretrained write."
            )


def _revision(directory: Path) -> str:
    return sha256(directory / "model.safetensors")


def _boot(name: str) -> Any:
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
            bridge: Any = TransformerBridge.boot_transformers(name)
            bridge.enable_compatibility_mode(disable_warnings=True)
    except Exception as error:
        raise AtlasError(
            f"No model {name!r} could be loaded: give `mini`, a directory of a GPT-2-architecture model, "
            f"or a name that is in the hub's cache ({cause(error)})."
        ) from error
    finally:
        logging.disable(previous)
    return bridge


def _weights(bridge: Any) -> Weights:
    names = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O", "W_U", "b_U")
    by_layer = getattr(bridge.cfg, "scale_attn_by_inverse_layer_idx", False)
    scale = tuple(bridge.cfg.d_head**-0.5 / (layer + 1 if by_layer else 1) for layer in range(bridge.cfg.n_layers))
    return Weights(attn_scale=scale, **{name: getattr(bridge, name).detach() for name in names})
