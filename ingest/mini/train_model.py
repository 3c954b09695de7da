"""Trains `mini`, the small GPT-2-architecture model that comes with the atlas.

    python -m ingest.mini.train_model --text FOLDER_OR_FILE... --out DIR

From a seed: byte-level BPE, then next-token cross entropy over windows of `n_ctx` tokens.
Matrices of the blocks are trained with Muon, everything else with AdamW. The learning rate
is constant after a warm-up and falls linearly to zero over the last `COOLDOWN` of the run
(so a run may be lengthened or shortened by resuming it with another --tokens).
Every batch is a function of the seed and the step: a killed run resumes from its checkpoint.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ingest.mini.corpus import BOS, Corpus, text_files, train_tokenizer

BATCH = 64
WARMUP_STEPS = 100
COOLDOWN = 0.5
CHECKPOINT_EVERY = 100
IGNORED = -100


def float32_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in float32 under autocast: on CPUs its backward is faster than bfloat16's."""
    with torch.autocast("cpu", enabled=False):
        z = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    return z.transpose(1, 2), None


def config(d_vocab: int, n_ctx: int) -> GPT2Config:
    """The shape of `mini`: 4 layers, d_model 256, 8 heads."""
    return GPT2Config(
        vocab_size=d_vocab,
        n_positions=n_ctx,
        n_embd=256,
        n_layer=4,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def optimizers(model: GPT2LMHeadModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, biases and layer norms."""
    blocks = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(blocks, lr=lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=lr / 8, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, n_steps: int) -> float:
    """The share of the peak learning rate that is in force at `step`."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (n_steps - step) / (COOLDOWN * n_steps))


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy in nats; logits [batch, pos, d_vocab], tokens [batch, pos]."""
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def validation_loss(model: Any, corpus: Corpus, n_ctx: int) -> float:
    """Mean cross entropy over all held-out windows, float32."""
    total, count = 0.0, 0
    for tokens in corpus.validation(BATCH, n_ctx):
        total += float(loss_of(model(tokens).logits, tokens)) * len(tokens)
        count += len(tokens)
    return total / count


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model as a `GPT2LMHeadModel` directory in half precision."""
    half = GPT2LMHeadModel(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=model.config.n_positions
    )
    wrapped.save_pretrained(out)


@click.command()
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--tokens", "n_tokens", default=30_000_000, show_default=True)
@click.option("--d-vocab", default=8192, show_default=True)
@click.option("--n-ctx", default=128, show_default=True)
@click.option("--lr", default=0.02, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
def main(
    texts: Sequence[Path], out: Path, n_tokens: int, d_vocab: int, n_ctx: int, lr: float, seed: int, compiled: bool
) -> None:
    """Train the model, or resume where a checkpoint in OUT stands."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    files = text_files(texts)
    tokenizer_file = out / "bpe.json"
    if not tokenizer_file.exists():
        train_tokenizer(files, d_vocab).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    corpus = Corpus.read(files, tokenizer)
    n_steps = n_tokens // (BATCH * n_ctx)
    click.echo(f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held out, {n_steps:,} steps")

    AttentionInterface.register("float32_causal", float32_attention)
    model = GPT2LMHeadModel(config(d_vocab, n_ctx))
    model.set_attn_implementation("float32_causal")
    forward: Any = torch.compile(model) if compiled else model
    opts = optimizers(model, lr)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]
    step = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step = state["step"]
    started, first = time.monotonic(), step
    log = (out / "model.log.jsonl").open("a")
    while step < n_steps:
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * rate(step, n_steps)
        tokens = corpus.batch(step, BATCH, n_ctx, seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(forward(tokens).logits, tokens)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            speed = (step - first) * BATCH * n_ctx / (time.monotonic() - started)
            row = {
                "step": step,
                "tokens": step * BATCH * n_ctx,
                "loss": round(float(loss.detach()), 4),
                "tokens_per_s": round(speed),
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
        if step % CHECKPOINT_EVERY == 0 or step == n_steps:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": step}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        if step % 500 == 0 or step == n_steps:
            row = {"step": step, "validation_loss": round(validation_loss(model, corpus, n_ctx), 4)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            click.echo(str(row))
    save(model, tokenizer, out)


if __name__ == "__main__":
    main()
