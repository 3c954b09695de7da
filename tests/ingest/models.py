"""Small random models with random dictionaries of every kind, written to disk in the real formats."""

from collections.abc import Collection
from pathlib import Path

import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ingest.dictionaries import MEANS
from ingest.model import sha256

BOS = "<|endoftext|>"
TEXT = "The capital of Texas is Austin and the capital of France is Paris, said Mary to John in the old house."
N_CTX = 24


def write_tokenizer(directory: Path) -> int:
    """A byte-level tokenizer trained on one sentence; returns its vocabulary size."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=[BOS], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)
    wrapped.save_pretrained(directory)
    return tokenizer.get_vocab_size()


def write_model(directory: Path, n_layers: int = 3, seed: int = 0) -> None:
    """A random GPT-2-architecture model with layer norms and biases that matter."""
    torch.manual_seed(seed)
    d_vocab = write_tokenizer(directory)
    config = GPT2Config(
        vocab_size=d_vocab,
        n_positions=N_CTX,
        n_embd=16,
        n_layer=n_layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)


def attention_sae(kind: str, hook: str, layer: int, d_sae: int) -> SAE:
    """A random SAE of `kind` (relu, topk, layer_norm or jumprelu) on hook_z or hook_attn_out."""
    common = dict(d_in=16, d_sae=d_sae, apply_b_dec_to_input=kind != "jumprelu")
    if kind == "topk":
        sae = TopKSAE(TopKSAEConfig(k=5, rescale_acts_by_decoder_norm=layer == 1, **common))
    elif kind == "layer_norm":
        sae = TopKSAE(TopKSAEConfig(k=5, normalize_activations="layer_norm", **common))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
    else:
        sae = StandardSAE(StandardSAEConfig(**common))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.{hook}"
    return randomized(sae)


def transcoder(kind: str, layer: int, d_sae: int) -> SAE:
    """A random transcoder of `kind` (relu, jumprelu or skip) for the MLP of `layer`."""
    common = dict(d_in=16, d_out=16, d_sae=d_sae, apply_b_dec_to_input=False)
    if kind == "jumprelu":
        sae = JumpReLUTranscoder(JumpReLUTranscoderConfig(**common))
    elif kind == "skip":
        sae = SkipTranscoder(SkipTranscoderConfig(**common))
    else:
        sae = Transcoder(TranscoderConfig(**common))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.ln2.hook_normalized"
    sae.cfg.metadata.hook_name_out = f"blocks.{layer}.hook_mlp_out"
    return randomized(sae)


def randomized(sae: SAE) -> SAE:
    """Every parameter drawn anew, thresholds positive."""
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) * 0.3 if name == "threshold" else 0.3 * torch.randn_like(parameter)
            )
    return sae


def write_random(
    directory: Path,
    attention: str = "relu",
    hook: str = "attn.hook_z",
    mlp: str = "relu",
    closed: Collection[int] = range(3),
) -> Path:
    """A model directory with dictionaries of the given kinds, a different width per layer.

    Attention has one at the `closed` layers, and stays open at the others.
    """
    write_model(directory)
    for layer in range(3):
        folder = directory / "dictionaries"
        if layer in closed:
            attention_sae(attention, hook, layer, 24 + 8 * layer).save_model(folder / f"{layer}.attn")
            write_random_means(folder / f"{layer}.attn")
        transcoder(mlp, layer, 40 - 8 * layer).save_model(folder / f"{layer}.mlp")
        write_random_means(folder / f"{layer}.mlp")
    return directory


def write_random_means(folder: Path) -> None:
    """Positive means of every feature, beside the dictionary in `folder`."""
    weights = folder / "sae_weights.safetensors"
    mean = 0.3 * torch.rand(load_file(weights)["b_enc"].shape)
    save_file({"mean": mean}, folder / MEANS, {"sha256": sha256(weights)})
