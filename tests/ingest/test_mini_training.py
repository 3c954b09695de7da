"""The trainer, the measurement and the context printer of `mini`'s dictionaries, on a tiny model and text."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from sae_lens import SAE
from tokenizers import Tokenizer
from torch.nn.functional import cosine_similarity, cross_entropy, threshold
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from atlas.errors import AtlasError
from ingest.mini import look, measure
from ingest.mini.corpus import BOS, Corpus, train_tokenizer
from ingest.mini.sites import SiteModel
from ingest.mini.train_dictionaries import (
    Recipe,
    Training,
    calibrate,
    count_fired,
    kept_features,
    quantile,
    train,
)

N_CTX, D_MODEL, N_HEADS = 16, 32, 4
RECIPE = Recipe(tokens=4 * 32 * (N_CTX - 1), d_sae=48, k=6, batch=96, block_windows=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 lines of made-up sentences."""
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "saw", "two", "small", "birds", "fly"]
    lines = [" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(2000)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A random two-layer model with nothing at its default: layer norms, value biases, uncentred outputs."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text], 300)
    shape = {"n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": 2, "n_head": N_HEADS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> SiteModel:
    return SiteModel.load(directory)


@pytest.fixture(scope="module")
def corpus(directory: Path, text: Path) -> Corpus:
    return Corpus.read([text], Tokenizer.from_file(str(directory / "tokenizer.json")))


@pytest.fixture(scope="module")
def trained(model: SiteModel, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dictionaries of an undisturbed run."""
    out = tmp_path_factory.mktemp("dictionaries")
    train(Training(model, corpus, RECIPE), out, checkpoint_every=1)
    return out


@pytest.fixture(scope="module")
def bridge(directory: Path) -> TransformerBridge:
    bridge = TransformerBridge.boot_transformers(str(directory))
    bridge.enable_compatibility_mode()
    return bridge


@pytest.fixture(scope="module")
def held_out(corpus: Corpus) -> torch.Tensor:
    return next(corpus.validation(24, N_CTX))


def test_sites_read_what_transformer_lens_hooks_give(
    model: SiteModel, bridge: TransformerBridge, held_out: torch.Tensor
) -> None:
    _, cache = bridge.run_with_cache(held_out)
    for site, (x, y) in model.record(held_out).items():
        torch.testing.assert_close(x, cache[site.hook_in].reshape(x.shape), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, cache[site.hook_out].reshape(y.shape), rtol=1e-4, atol=1e-4)


def test_a_replaced_site_changes_the_loss_as_the_same_hook_does(
    model: SiteModel, bridge: TransformerBridge, held_out: torch.Tensor
) -> None:
    clean = measure.mean_loss(model, [held_out], {})
    for site in model.sites:
        ours = measure.mean_loss(model, [held_out], {site: lambda _x, y: 0.3 * y})

        def shrink(value: torch.Tensor, hook: object) -> torch.Tensor:
            return torch.cat([value[:, :1], 0.3 * value[:, 1:]], dim=1)

        logits = bridge.run_with_hooks(held_out, fwd_hooks=[(site.hook_out, shrink)])
        theirs = cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
        assert ours == pytest.approx(theirs.item(), abs=1e-4)
        assert abs(ours - clean) > 1e-3


def test_stored_dictionaries_load_with_sae_lens_and_encode_as_the_formula_says(
    trained: Path, model: SiteModel, bridge: TransformerBridge, held_out: torch.Tensor
) -> None:
    _, cache = bridge.run_with_cache(held_out)
    recorded = model.record(held_out)
    for site in model.sites:
        sae = SAE.load_from_disk(trained / site.name, dtype="float32")
        w = {name: value.float() for name, value in sae.state_dict().items()}
        pre = recorded[site][0] @ w["W_enc"] + w["b_enc"]
        acts = torch.where(pre > w["threshold"], pre, 0.0)
        torch.testing.assert_close(sae.encode(cache[site.hook_in]), acts, rtol=1e-3, atol=1e-3)
        expected = (acts @ w["W_dec"] + w["b_dec"]).reshape(cache[site.hook_out].shape)
        torch.testing.assert_close(sae(cache[site.hook_in]), expected, rtol=1e-3, atol=2e-3)
        assert sae.cfg.metadata.hook_name == site.hook_in
        assert sae.cfg.metadata.hook_name_out == site.hook_out
        torch.testing.assert_close(w["W_dec"].norm(dim=1), torch.ones(sae.cfg.d_sae), rtol=2e-3, atol=0)


def test_training_units_fold_into_the_models_units(model: SiteModel, corpus: Corpus) -> None:
    training = Training(model, corpus, RECIPE)
    training.run_block()
    x_all = training.activations(1)
    for d in training.dictionaries:
        x, y = (v.float() for v in x_all[d.site])
        scaled, _ = d.scaled(x, y)
        pre = scaled @ d.W_enc + d.b_enc
        y_hat = torch.where(pre > d.theta, pre, 0.0) @ d.W_dec + d.b_dec
        stored = {name: value.float() for name, value in d.stored().items()}
        pre = x @ stored["W_enc"] + stored["b_enc"]
        again = torch.where(pre > stored["threshold"], pre, 0.0) @ stored["W_dec"] + stored["b_dec"]
        difference = again - (y_hat * d.scale_out + d.mean_out)
        # float16 moves a feature across the threshold now and then, so most rows and not each
        close = difference.norm(dim=1) < 0.02 * y.norm(dim=1)
        assert float(close.float().mean()) > 0.9


def test_an_interrupted_run_resumes_to_the_same_dictionaries(
    trained: Path, model: SiteModel, corpus: Corpus, tmp_path: Path
) -> None:
    first = Training(model, corpus, RECIPE)
    for _ in range(2):
        first.run_block()
    first.save_checkpoint(tmp_path / "checkpoint.pt")
    train(Training(model, corpus, RECIPE), tmp_path, checkpoint_every=1)
    for site in model.sites:
        name = f"{site.name}/sae_weights.safetensors"
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    assert len((tmp_path / "dictionaries.log.jsonl").read_text().splitlines()) == 2


def test_training_explains_more_and_keeps_k_features(model: SiteModel, corpus: Corpus, tmp_path: Path) -> None:
    recipe = Recipe(tokens=16 * 32 * (N_CTX - 1), d_sae=48, k=6, batch=96, block_windows=32, lr=5e-3)
    training = Training(model, corpus, recipe)
    rows = [training.run_block() for _ in range(16)]
    for site in model.sites:
        first, last = (rows[i]["explained_variance"][site.name] for i in (0, -1))
        assert last > first + 0.03
    train(training, tmp_path, checkpoint_every=1)
    batches = list(corpus.validation(32, N_CTX))
    for l0, _, _ in measure.reconstruction(model, batches, measure.load_dictionaries(model, tmp_path)).values():
        assert l0 == pytest.approx(6, rel=0.15)


def test_silent_features_are_set_where_they_fire_as_often_as_others(model: SiteModel, corpus: Corpus) -> None:
    training = Training(model, corpus, RECIPE)
    training.run_block()
    d = training.dictionaries[1]
    x, y = d.scaled(*training.activations(1)[d.site])
    with torch.no_grad():
        d.fired.fill_(True)
        d.fired[7] = False
        d.b_enc[7] = -100.0
    kept = d.W_enc[:, 6].clone()
    d.revive(x, y, training.optimizer)
    acts = threshold(x @ d.W_enc + d.b_enc, float(d.theta), 0.0)[:, 7]
    assert int((acts > 0).sum()) == pytest.approx(len(x) * RECIPE.k / RECIPE.d_sae, abs=1)
    assert cosine_similarity(d.W_dec[7], acts @ y, dim=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(d.W_enc[:, 6], kept)
    assert float(training.optimizer.state[d.W_dec]["exp_avg_sq"][7].abs().max()) == 0


def test_silent_features_are_not_stored_and_the_others_do_the_same(model: SiteModel, corpus: Corpus) -> None:
    training = Training(model, corpus, RECIPE)
    training.run_block()
    d = training.dictionaries[0]
    x = training.activations(1)[d.site][0].float()
    stored = d.stored()
    calibrate(stored, x, RECIPE.k)
    stored["b_enc"][3] = -1000.0
    keep = count_fired(stored, x) > 0
    narrower = kept_features(stored, keep)
    assert not keep[3]
    assert narrower["W_enc"].shape[1] == int(keep.sum()) >= RECIPE.k
    outputs: list[torch.Tensor] = []
    for tensors in (stored, narrower):
        w = {name: value.float() for name, value in tensors.items()}
        pre = x @ w["W_enc"] + w["b_enc"]
        outputs.append(torch.where(pre > w["threshold"], pre, 0.0) @ w["W_dec"] + w["b_dec"])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_quantile_is_exceeded_by_k_a_row() -> None:
    pre = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    assert int((pre > quantile(pre, 5)).sum()) == 250


def test_figures_against_their_definition(
    trained: Path, directory: Path, text: Path, model: SiteModel, held_out: torch.Tensor
) -> None:
    dictionaries = measure.load_dictionaries(model, trained)
    report = measure.measure(model, held_out.split(10), dictionaries)
    recorded = model.record(held_out)
    for site, sae in dictionaries.items():
        x, y = (v[:, 1:].reshape(-1, D_MODEL) for v in recorded[site])
        acts = sae.encode(x)
        residual, spread = (y - sae.decode(acts)), (y - y.mean(0))
        figures = report.figures[site]
        assert figures.l0 == pytest.approx(float((acts > 0).float().sum(1).mean()), rel=1e-4)
        assert figures.explained_variance == pytest.approx(
            1 - float(residual.pow(2).sum() / spread.pow(2).sum()), abs=1e-4
        )
        assert figures.dead_share == pytest.approx(float((acts.amax(0) == 0).float().mean()), abs=1e-6)
    assert report.loss_clean == pytest.approx(measure.mean_loss(model, [held_out], {}), rel=1e-5)
    assert measure.kept(1.0, 1.0, 3.0) == 1
    assert measure.kept(1.0, 3.0, 3.0) == 0


def test_perfect_reconstructions_keep_the_whole_loss(model: SiteModel, held_out: torch.Tensor) -> None:
    clean = measure.mean_loss(model, [held_out], {})
    assert measure.mean_loss(model, [held_out], {s: lambda _x, y: y for s in model.sites}) == pytest.approx(
        clean, rel=1e-5
    )


def test_measuring_notes_the_figures_in_the_configuration(trained: Path, directory: Path, text: Path) -> None:
    arguments = ["--text", str(text), "--model", str(directory), "--dictionaries", str(trained)]
    result = CliRunner().invoke(measure.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "| 1.mlp |" in result.output
    metadata = json.loads((trained / "1.mlp" / "cfg.json").read_text())["metadata"]
    assert all(math.isfinite(metadata[name]) for name in ("l0", "explained_variance", "dead_share", "loss_kept"))
    assert SAE.load_from_disk(trained / "1.mlp").cfg.metadata.l0 == metadata["l0"]


def test_contexts_mark_the_token_on_which_a_feature_fires(
    trained: Path, directory: Path, text: Path, model: SiteModel, corpus: Corpus
) -> None:
    windows = corpus.batch(0, 40, N_CTX, 0)
    recorded = model.record(windows)
    found = look.search(model, windows, trained, 10, seed=0)
    assert sum(len(f.features) for f in found.values()) == 10
    for site, f in found.items():
        acts = measure.load_dictionaries(model, trained)[site].encode(recorded[site][0])
        for n, feature in enumerate(f.features.tolist()):
            window = int(f.values[:, n].argmax())
            assert float(acts[window, int(f.positions[window, n]), feature]) == pytest.approx(
                float(acts[:, 1:, feature].max()), rel=1e-4
            )
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert f"[[{tokenizer.decode([int(windows[3, 5])])}]]" in look.context(tokenizer, windows[3], 5)
    arguments = ["--text", str(text), "--model", str(directory), "--dictionaries", str(trained), "--windows", "40"]
    result = CliRunner().invoke(look.main, ["--features", "4", *arguments], catch_exceptions=False)
    assert result.output.count("density") == 4


def test_too_little_text_and_missing_parts_are_named(model: SiteModel, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="fewer than the 100000 of one block"):
        Training(model, corpus, Recipe(block_windows=100_000))
    with pytest.raises(AtlasError, match="holds no model"):
        SiteModel.load(tmp_path)
    with pytest.raises(AtlasError, match=r"has no dictionary 0\.attn"):
        measure.load_dictionaries(model, tmp_path)
