"""Trains the dictionaries of `mini`: per layer an attention SAE on hook_z and an MLP transcoder.

    python -m ingest.mini.train_dictionaries --text FOLDER_OR_FILE... --model DIR --out DIR

All sites learn together from one forward pass. In each site's own units (inputs and outputs
centred and scaled to unit variance), with decoder rows of norm 1:

    a = p where p = x W_enc + b_enc > theta, else 0          y^ = a W_dec + b_dec
    loss = mean |y^ - y|^2                                    theta: k features a token, on average

theta is one number a site: the (1 - k / d_sae) quantile of the pre-activations of a part of each batch,
smoothed over batches. It stays in force after training as the threshold of a JumpReLU, calibrated once
more on fresh training text with the weights as they are stored (float16), so that what is stored is what
was measured. Features silent for a whole block of windows are set on inputs that are reconstructed badly,
but for the last part of the run. What fires on fewer than one token in 32,768 after training is not stored,
so dictionaries differ in width.

Windows come in blocks, shuffled within; each block is a function of the seed and its number, and the
checkpoint after it is where a killed run resumes. Position 0 (BOS) is left out.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, JumpReLUTranscoder, JumpReLUTranscoderConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.functional import normalize, threshold

from atlas.errors import AtlasError
from ingest.mini.corpus import Corpus, text_files
from ingest.mini.sites import Site, SiteModel

Vectors = Float[torch.Tensor, "token d"]
Recorded = dict[Site, tuple[torch.Tensor, torch.Tensor]]

FORWARD_WINDOWS = 64
START_TOKENS = 16_384
QUANTILE_TOKENS = 128
THRESHOLD_MEMORY = 0.8
WARMUP_STEPS = 30
COOLDOWN = 0.5
REVIVAL = 0.85
CALIBRATION_TOKENS = 16_384
CALIBRATION_MARGIN = 0.97
CENSUS_BLOCKS = 4
CENSUS_CHUNK = 8_192
RAREST = 1 / 32_768


@dataclass(frozen=True)
class Recipe:
    """What a run depends on besides the model and the text; `tokens` counts positions without BOS."""

    tokens: int = 4_500_000
    d_sae: int = 2240
    k: int = 32
    batch: int = 2048
    block_windows: int = 512
    lr: float = 1e-3
    seed: int = 0

    def rate(self, done: float) -> float:
        """The share of the peak learning rate in force when the share `done` of the run is done."""
        return min(1.0, (1 - done) / COOLDOWN)


class Dictionary(torch.nn.Module):
    """One site's dictionary in training units, set up from samples of its inputs and outputs.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out] with rows of norm 1, b_dec [d_out].
    """

    def __init__(self, site: Site, x: Vectors, y: Vectors, recipe: Recipe) -> None:
        super().__init__()
        self.site = site
        self.k = recipe.k
        self.mean_in, self.mean_out = _buffer(self, "mean_in", x.mean(0)), _buffer(self, "mean_out", y.mean(0))
        self.scale_in = _buffer(self, "scale_in", (x - self.mean_in).pow(2).mean().sqrt())
        self.scale_out = _buffer(self, "scale_out", (y - self.mean_out).pow(2).mean().sqrt())
        self.theta = _buffer(self, "theta", torch.zeros(()))
        self.fired = _buffer(self, "fired", torch.zeros(recipe.d_sae, dtype=torch.bool))
        x, y = self.scaled(x[:START_TOKENS], y[:START_TOKENS])
        w_enc, w_dec = _start(x, y, recipe, tied=site.kind == "attn")
        self.W_enc = torch.nn.Parameter(w_enc)
        self.b_enc = torch.nn.Parameter(torch.zeros(recipe.d_sae))
        self.W_dec = torch.nn.Parameter(w_dec)
        self.b_dec = torch.nn.Parameter(torch.zeros(y.shape[1]))

    def scaled(self, x: Vectors, y: Vectors) -> tuple[Vectors, Vectors]:
        """Inputs and outputs in training units."""
        return (x.float() - self.mean_in) / self.scale_in, (y.float() - self.mean_out) / self.scale_out

    def loss(self, x: Vectors, y: Vectors) -> tuple[torch.Tensor, Vectors]:
        """The loss on a batch in training units, and the residuals y - y^ [token, d_out]; moves theta."""
        pre = torch.addmm(self.b_enc.bfloat16(), x.bfloat16(), self.W_enc.bfloat16())
        self._follow(quantile(pre.detach()[:QUANTILE_TOKENS], self.k))
        acts = threshold(pre, float(self.theta), 0.0)
        error = y - torch.addmm(self.b_dec.bfloat16(), acts, self.W_dec.bfloat16()).float()
        return error.pow(2).mean(), error.detach()

    def _follow(self, measured: float) -> None:
        memory = THRESHOLD_MEMORY if self.theta > 0 else 0.0
        self.theta.mul_(memory).add_((1 - memory) * max(measured, 1e-3))

    @torch.no_grad()
    def after_step(self) -> None:
        """Decoder rows back to norm 1."""
        self.W_dec.copy_(normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def note_fired(self) -> None:
        """Remember which features fired in the batch: those through which a gradient came."""
        assert self.b_enc.grad is not None
        self.fired |= self.b_enc.grad != 0

    @torch.no_grad()
    def revive(self, x: Vectors, error: Vectors, optimizer: torch.optim.Optimizer) -> None:
        """Set each silent feature on a badly reconstructed input of the batch.

        It fires on the k / d_sae of the batch that are most like that input, as often as a feature does on
        average, and writes the mean residual there, weighted by its activation.
        """
        silent = (~self.fired).nonzero()[:, 0][: len(x)]
        if len(silent) == 0:
            return
        at = normalize(x[torch.multinomial(error.pow(2).sum(1), len(silent))], dim=1).T
        pre = x @ at
        n_firing = max(1, round(len(x) * self.k / len(self.b_enc)))
        at *= self.theta / pre.topk(n_firing + 1, dim=0).values[-1].clamp(min=1e-3)
        self.W_enc[:, silent] = at
        self.W_dec[silent] = normalize(threshold(x @ at, float(self.theta), 0.0).T @ error, dim=1)
        self.b_enc[silent] = 0.0
        for parameter, where in ((self.W_enc, (slice(None), silent)), (self.b_enc, silent), (self.W_dec, silent)):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][moment][where] = 0.0

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """The weights in the model's units, float16; the threshold still to be calibrated."""
        ratio = self.scale_out / self.scale_in
        tensors = {
            "W_enc": self.W_enc * ratio,
            "b_enc": self.b_enc * self.scale_out - ratio * (self.mean_in @ self.W_enc),
            "W_dec": self.W_dec.data,
            "b_dec": self.b_dec * self.scale_out + self.mean_out,
            "threshold": self.theta * self.scale_out * torch.ones_like(self.b_enc),
        }
        return {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}


def _buffer(module: torch.nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    module.register_buffer(name, value)
    return value


def _start(x: Vectors, y: Vectors, recipe: Recipe, *, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random encoder directions; decoder rows the same (tied), or the mean output where a feature fires.

    The encoder is scaled so that the first reconstruction has the size that fits best.
    """
    w_enc = normalize(torch.randn(x.shape[1], recipe.d_sae), dim=0)
    pre = x @ w_enc
    acts = threshold(pre, quantile(pre[:QUANTILE_TOKENS], recipe.k), 0.0)
    # rows that never fired are left with the small random part alone
    w_dec = w_enc.T.clone() if tied else acts.T @ y + 1e-3 * torch.randn(recipe.d_sae, y.shape[1])
    w_dec = normalize(w_dec, dim=1)
    y_hat = acts @ w_dec
    scale = ((y_hat * y).sum() / y_hat.pow(2).sum()).clamp(min=0.05)
    return w_enc * scale, w_dec


def quantile(pre: Float[torch.Tensor, "token d_sae"], k: int | float) -> float:
    """The value that `k` pre-activations a token exceed on average."""
    flat = pre.float().flatten()
    rank = flat.numel() - round(k * len(pre))
    return float(flat.kthvalue(max(1, min(rank, flat.numel()))).values)


class Training:
    """A run: the model, its dictionaries and their optimizer, and how many blocks are done."""

    def __init__(self, model: SiteModel, corpus: Corpus, recipe: Recipe) -> None:
        if corpus.n_windows(model.n_ctx) < recipe.block_windows:
            raise AtlasError(
                f"the text has {max(0, corpus.n_windows(model.n_ctx))} windows of {model.n_ctx} tokens, "
                f"fewer than the {recipe.block_windows} of one block: give more text"
            )
        self.model, self.corpus, self.recipe = model, corpus, recipe
        self.block = 0
        self.step = 0
        torch.manual_seed(recipe.seed)
        samples = self.activations(0)
        self.dictionaries = [Dictionary(s, x.float(), y.float(), recipe) for s, (x, y) in samples.items()]
        parameters = [p for d in self.dictionaries for p in d.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=recipe.lr, fused=True)

    @property
    def done(self) -> float:
        """The share of the run's blocks that are done."""
        return self.block / self.n_blocks

    @property
    def n_blocks(self) -> int:
        return max(1, round(self.recipe.tokens / (self.recipe.block_windows * (self.model.n_ctx - 1))))

    def activations(self, block: int) -> Recorded:
        """What every site reads and writes on block number `block`, bfloat16, BOS left out."""
        tokens = self.corpus.batch(block, self.recipe.block_windows, self.model.n_ctx, self.recipe.seed)
        return read(self.model, tokens)

    def run_block(self) -> dict[str, Any]:
        """Train on the next block; returns its row of the log."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.block)
        values = self.activations(self.block)
        n_tokens = self.recipe.block_windows * (self.model.n_ctx - 1)
        order = torch.randperm(n_tokens)
        n_batches = max(1, n_tokens // self.recipe.batch)
        for dictionary in self.dictionaries:
            dictionary.fired.zero_()
        totals = [0.0 for _ in self.dictionaries]
        worst: list[tuple[Vectors, Vectors]] = []
        for i, chosen in enumerate(order[: n_batches * self.recipe.batch].chunk(n_batches)):
            rate = self.recipe.rate((self.block + i / n_batches) / self.n_blocks)
            self.optimizer.param_groups[0]["lr"] = self.recipe.lr * min(rate, (self.step + 1) / WARMUP_STEPS)
            worst = self._train_batch(values, chosen, totals)
        silent = [int((~d.fired).sum()) for d in self.dictionaries]
        if self.done < REVIVAL:
            for dictionary, (x, error) in zip(self.dictionaries, worst, strict=True):
                dictionary.revive(x, error, self.optimizer)
        self.block += 1
        ev = {d.site.name: round(1 - t / n_batches, 4) for d, t in zip(self.dictionaries, totals, strict=True)}
        return {"block": self.block, "tokens": self.block * n_tokens, "explained_variance": ev, "silent": silent}

    def _train_batch(
        self, values: Recorded, chosen: Int[torch.Tensor, " chosen"], totals: list[float]
    ) -> list[tuple[Vectors, Vectors]]:
        """One step of all dictionaries; adds their losses to `totals`, returns inputs and residuals of each."""
        seen: list[tuple[Vectors, Vectors]] = []
        for n, dictionary in enumerate(self.dictionaries):
            x, y = dictionary.scaled(*(v[chosen] for v in values[dictionary.site]))
            loss, error = dictionary.loss(x, y)
            torch.autograd.backward(loss)
            dictionary.note_fired()
            totals[n] += float(loss.detach())
            seen.append((x, error))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for dictionary in self.dictionaries:
            dictionary.after_step()
        return seen

    def save_checkpoint(self, path: Path) -> None:
        """Write the state of the run, whole or not at all."""
        state = {
            "dictionaries": [d.state_dict() for d in self.dictionaries],
            "optimizer": self.optimizer.state_dict(),
            "block": self.block,
            "step": self.step,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load_checkpoint(self, path: Path) -> None:
        """Take up the state that `save_checkpoint` wrote."""
        state = torch.load(path, weights_only=True)
        for dictionary, saved in zip(self.dictionaries, state["dictionaries"], strict=True):
            dictionary.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.block, self.step = state["block"], state["step"]


def read(model: SiteModel, tokens: Int[torch.Tensor, "batch pos"]) -> Recorded:
    """What every site reads and writes on `tokens`, bfloat16 [batch * (pos - 1), d], BOS left out."""
    parts: dict[Site, list[tuple[torch.Tensor, torch.Tensor]]] = {site: [] for site in model.sites}
    for some in tokens.split(FORWARD_WINDOWS):
        with torch.autocast("cpu", torch.bfloat16):
            recorded = model.record(some)
        for site, pair in recorded.items():
            x, y = (v[:, 1:].flatten(0, 1).bfloat16() for v in pair)
            parts[site].append((x, y))
    return {s: (torch.cat([x for x, _ in p]), torch.cat([y for _, y in p])) for s, p in parts.items()}


@torch.no_grad()
def calibrate(tensors: dict[str, torch.Tensor], x: Vectors, k: int | float) -> None:
    """Set the stored threshold so that just under `k` features a token fire on the inputs `x`."""
    pre = x.float() @ tensors["W_enc"].float() + tensors["b_enc"].float()
    tensors["threshold"].fill_(quantile(pre, CALIBRATION_MARGIN * k))


@torch.no_grad()
def count_fired(tensors: dict[str, torch.Tensor], x: Vectors) -> Int[torch.Tensor, " d_sae"]:
    """On how many of the inputs `x` each stored feature fires."""
    w_enc, b_enc, theta = (tensors[name].float() for name in ("W_enc", "b_enc", "threshold"))
    counts = [(some.float() @ w_enc + b_enc > theta).sum(0) for some in x.split(CENSUS_CHUNK)]
    return torch.stack(counts).sum(0)


def kept_features(tensors: dict[str, torch.Tensor], keep: Bool[torch.Tensor, " d_sae"]) -> dict[str, torch.Tensor]:
    """The stored weights without the features that are not in `keep`."""
    narrower = {name: tensors[name][keep] for name in ("b_enc", "W_dec", "threshold")}
    return {**narrower, "W_enc": tensors["W_enc"][:, keep].contiguous(), "b_dec": tensors["b_dec"]}


def save_dictionary(site: Site, tensors: dict[str, torch.Tensor], model_name: str, folder: Path) -> None:
    """Write one dictionary in SAELens' on-disk format: float16 on disk, float32 in use."""
    sae = _sae(site, tensors, model_name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(sae.cfg.to_dict(), indent=1) + "\n")


def _sae(site: Site, tensors: dict[str, torch.Tensor], model_name: str) -> SAE[Any]:
    d_in, d_sae = tensors["W_enc"].shape
    if site.kind == "attn":
        sae: SAE[Any] = JumpReLUSAE(
            JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False, reshape_activations="hook_z")
        )
    else:
        d_out = tensors["W_dec"].shape[1]
        sae = JumpReLUTranscoder(
            JumpReLUTranscoderConfig(d_in=d_in, d_sae=d_sae, d_out=d_out, apply_b_dec_to_input=False)
        )
    metadata: Any = sae.cfg.metadata
    metadata.model_name = model_name
    metadata.hook_name = site.hook_in
    metadata.hook_name_out = site.hook_out
    metadata.prepend_bos = True
    return sae


def save_all(training: Training, model_name: str, out: Path) -> None:
    """Calibrate every dictionary of the run and write it, one folder each: `{layer}.{attn|mlp}`."""
    values = training.activations(training.n_blocks)
    torch.manual_seed(training.recipe.seed)
    chosen = torch.randperm(len(next(iter(values.values()))[0]))[:CALIBRATION_TOKENS]
    stored = {d.site: d.stored() for d in training.dictionaries}
    for site, tensors in stored.items():
        calibrate(tensors, values[site][0][chosen], training.recipe.k)
    counts = {site: torch.zeros(training.recipe.d_sae, dtype=torch.int64) for site in stored}
    for block in range(CENSUS_BLOCKS):
        values = training.activations(training.n_blocks + block)
        for site, tensors in stored.items():
            counts[site] += count_fired(tensors, values[site][0])
    n_tokens = CENSUS_BLOCKS * training.recipe.block_windows * (training.model.n_ctx - 1)
    for site, tensors in stored.items():
        often = counts[site] >= max(1.0, RAREST * n_tokens)
        save_dictionary(site, kept_features(tensors, often), model_name, out / site.name)


def train(training: Training, out: Path, checkpoint_every: int) -> None:
    """Run to the end, from the checkpoint in `out` if there is one; writes the log and the dictionaries."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        training.load_checkpoint(checkpoint)
    with (out / "dictionaries.log.jsonl").open("a") as log:
        while training.block < training.n_blocks:
            started = time.monotonic()
            row = training.run_block() | {"seconds": round(time.monotonic() - started, 1)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            if training.block % checkpoint_every == 0 or training.block == training.n_blocks:
                training.save_checkpoint(checkpoint)
    save_all(training, "mini", out)


@click.command()
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", "directory", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--tokens", default=Recipe.tokens, show_default=True)
@click.option("--d-sae", default=Recipe.d_sae, show_default=True)
@click.option("--k", default=Recipe.k, show_default=True)
@click.option("--lr", default=Recipe.lr, show_default=True)
@click.option("--seed", default=Recipe.seed, show_default=True)
def main(
    texts: Sequence[Path], directory: Path, out: Path, tokens: int, d_sae: int, k: int, lr: float, seed: int
) -> None:
    """Train the dictionaries of the model in DIR, or resume where a checkpoint in OUT stands."""
    recipe = Recipe(tokens=tokens, d_sae=d_sae, k=k, lr=lr, seed=seed)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    training = Training(SiteModel.load(directory), Corpus.read(text_files(texts), tokenizer), recipe)
    train(training, out, checkpoint_every=5)


if __name__ == "__main__":
    main()
