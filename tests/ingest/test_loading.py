"""Models against transformers, dictionaries of every kind against SAELens, and both under each weight convention.

TransformerLens processes weights in single precision, so values of the model agree to about 1e-7; dictionaries to 1e-9.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.topk_sae import TopK
from torch.nn.functional import layer_norm
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel

from atlas.errors import AtlasError
from ingest.dictionaries import Place, load_dictionary, strongest, weights_of
from ingest.model import LanguageModel, Weights, finite, load_model
from ingest.setup import set_up
from ingest.trace import Trace, trace
from tests.ingest.models import attention_sae, randomized, transcoder, write_model, write_random

TOKENS = [0, 17, 4, 250, 33, 91]
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "little"
    write_model(directory)
    return directory


@pytest.fixture(scope="module")
def models(directory: Path) -> dict[str, LanguageModel]:
    return {weights: load_model(str(directory), torch.float64, weights) for weights in ("processed", "centred", "raw")}


@pytest.fixture(scope="module")
def published(directory: Path) -> dict[str, torch.Tensor]:
    """What stands at the sites of layer 1, and the logits, by transformers alone; double precision."""
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    found: dict[str, torch.Tensor] = {}
    block = model.transformer.h[1]
    block.attn.c_proj.register_forward_hook(lambda m, x, y: found.update(z=x[0][0], attn_out=y[0]))
    block.ln_2.register_forward_hook(lambda m, x, y: found.update(resid_mid=x[0][0]))
    block.mlp.register_forward_hook(lambda m, x, y: found.update(mlp_out=y[0]))
    with torch.no_grad():
        found["logits"] = model(torch.tensor([TOKENS])).logits[0]
    d = model.config.n_embd  # the value bias as it is folded: with the layer norm's own bias in it
    bias = block.attn.c_attn.bias[2 * d :].detach()
    found["value_bias"] = bias + block.ln_1.bias.detach() @ block.attn.c_attn.weight[:, 2 * d :].detach()
    return found


def test_logits_are_those_of_transformers(models: dict[str, LanguageModel], published: dict[str, torch.Tensor]) -> None:
    for weights, model in models.items():
        logits = trace(model, TOKENS).logits
        torch.testing.assert_close(logits.log_softmax(1), published["logits"].log_softmax(1), rtol=0, atol=2e-6)
        if weights != "processed":
            torch.testing.assert_close(logits, published["logits"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("n_layers", "n_heads", "d_model"), [(6, 12, 96), (24, 16, 64), (12, 12, 48)])
def test_every_shape_of_gpt2_is_read(tmp_path: Path, n_layers: int, n_heads: int, d_model: int) -> None:
    """Layers and heads of distilgpt2, gpt2-medium and gpt2, narrow."""
    write_model(tmp_path)
    config = GPT2LMHeadModel.from_pretrained(tmp_path).config
    config.n_layer, config.n_head, config.n_embd = n_layers, n_heads, d_model
    torch.manual_seed(1)
    real = GPT2LMHeadModel(config).eval()
    real.save_pretrained(tmp_path)
    found = trace(load_model(str(tmp_path)), TOKENS).logits
    with torch.no_grad():
        expected = real(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found.log_softmax(1), expected.log_softmax(1), rtol=1e-4, atol=1e-4)


def test_what_dictionaries_read_under_each_convention(
    models: dict[str, LanguageModel], published: dict[str, torch.Tensor]
) -> None:
    """METHOD's sites are those of the unprocessed model but for what the convention takes out."""
    found = {weights: trace(model, TOKENS) for weights, model in models.items()}
    normalised = layer_norm(published["resid_mid"], (16,), eps=1e-5)
    centred = {name: published[name] - published[name].mean(1, keepdim=True) for name in ("attn_out", "mlp_out")}
    expected = {
        "raw": (published["z"], published["attn_out"], published["mlp_out"]),
        "centred": (published["z"], centred["attn_out"], centred["mlp_out"]),
        "processed": (published["z"] - published["value_bias"], centred["attn_out"], centred["mlp_out"]),
    }
    for weights, (z, attn_out, mlp_out) in expected.items():
        have = found[weights]
        torch.testing.assert_close(have.z[1].flatten(1), z, rtol=0, atol=2e-6)
        torch.testing.assert_close(have.attn_out[1], attn_out, rtol=0, atol=2e-6)
        torch.testing.assert_close(have.mlp_out[1], mlp_out, rtol=0, atol=2e-6)
        torch.testing.assert_close(have.mlp_in[1], normalised, rtol=0, atol=2e-6)


def test_everything_that_is_frozen_is_what_transformer_lens_own_model_gives(
    directory: Path, models: dict[str, LanguageModel]
) -> None:
    """Every field of Trace and of Weights against HookedTransformer, which shares no code with the bridge."""
    real = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64)
    c = real.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, n_heads=c.n_head, d_model=c.n_embd, d_head=c.n_embd // c.n_head, n_ctx=c.n_positions,
        d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", eps=c.layer_norm_epsilon,
        dtype=torch.float64, device="cpu",
    )  # fmt: skip
    theirs = HookedTransformer(cfg)
    theirs.load_and_process_state_dict(convert_gpt2_weights(real, cfg))
    logits, cache = theirs.run_with_cache(torch.tensor([TOKENS]))

    def layers(hook: str) -> torch.Tensor:
        return torch.stack([cache[f"blocks.{layer}.{hook}"][0] for layer in range(c.n_layer)])

    expected = {
        "tokens": torch.tensor(TOKENS),
        "embed": cache["hook_embed"][0],
        "pos_embed": cache["hook_pos_embed"][0],
        "pattern": layers("attn.hook_pattern"),
        "sigma_pre": layers("ln1.hook_scale").squeeze(-1),
        "sigma_mid": layers("ln2.hook_scale").squeeze(-1),
        "sigma_final": cache["ln_final.hook_scale"][0].squeeze(-1),
        "v": layers("attn.hook_v"),
        "z": layers("attn.hook_z"),
        "attn_out": layers("hook_attn_out"),
        "mlp_in": layers("ln2.hook_normalized"),
        "mlp_out": layers("hook_mlp_out"),
        "resid_pre": layers("hook_resid_pre"),
        "resid_mid": layers("hook_resid_mid"),
        "resid_final": layers("hook_resid_post")[-1],
        "logits": logits[0],
    }
    found = trace(models["processed"], TOKENS)
    assert set(expected) == {field.name for field in fields(Trace)}
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(found, name), value, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    for field in fields(Weights):
        if field.name != "attn_scale":
            ours = getattr(models["processed"].weights, field.name)
            torch.testing.assert_close(ours, getattr(theirs, field.name), rtol=0, atol=2e-6)


def _say_weights(folder: Path, weights: str) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["weights"] = weights
    (folder / "cfg.json").write_text(json.dumps(config))


def _site(found: Trace, hook: str) -> torch.Tensor:
    return {"attn.hook_z": found.z[1].flatten(1), "hook_attn_out": found.attn_out[1]}[hook]


@pytest.mark.parametrize("weights", ["processed", "centred", "raw"])
@pytest.mark.parametrize(("kind", "hook"), [("relu", "attn.hook_z"), ("topk", "hook_attn_out")])
def test_pre_activations_are_those_on_the_model_that_a_dictionary_was_trained_on(
    tmp_path: Path,
    models: dict[str, LanguageModel],
    published: dict[str, torch.Tensor],
    weights: str,
    kind: str,
    hook: str,
) -> None:
    """SAELens on the activations of transformers' model, moved as TransformerLens' processing moves them."""
    attention_sae(kind, hook, 1, 32).save_model(tmp_path)
    _say_weights(tmp_path, weights)
    sae = SAE.load_from_disk(tmp_path, dtype="float64")
    x = published["z"] if hook == "attn.hook_z" else published["attn_out"]
    if weights == "processed" and hook == "attn.hook_z":
        x = x - published["value_bias"]
    if weights != "raw" and hook == "hook_attn_out":
        x = x - x.mean(1, keepdim=True)
    sae.turn_off_forward_pass_hook_z_reshaping()
    dictionary = load_dictionary(tmp_path, models[weights])
    found = dictionary.activations(_site(trace(models[weights], TOKENS), hook))
    torch.testing.assert_close(found, sae.encode(x).detach(), rtol=0, atol=2e-6)
    assert (found > 0).any()
    for other in {"processed", "centred", "raw"} - {weights}:
        with pytest.raises(AtlasError, match=f"was trained on {weights} weights"):
            load_dictionary(tmp_path, models[other])


def test_with_a_layer_norm_both_conventions_give_the_same(tmp_path: Path, models: dict[str, LanguageModel]) -> None:
    """The norm takes out the mean in which raw and processed attn_out differ."""
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4, normalize_activations="layer_norm"))
    sae.cfg.metadata.hook_name = "blocks.1.hook_attn_out"
    randomized(sae).save_model(tmp_path)
    found = []
    for weights in ("raw", "processed"):
        _say_weights(tmp_path, weights)
        dictionary = load_dictionary(tmp_path, models[weights])
        found.append(dictionary.pre_activations(trace(models[weights], TOKENS).attn_out[1]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("kind", ["relu", "topk", "topk rescaled", "jumprelu", "transcoder", "jumprelu transcoder"])
def test_every_kind_encodes_and_decodes_as_saelens_does(
    tmp_path: Path, models: dict[str, LanguageModel], kind: str, subtracts: bool
) -> None:
    if kind.endswith("transcoder"):
        sae = transcoder("jumprelu" if "jump" in kind else "relu", 1, 40)
    else:
        sae = attention_sae(kind.split()[0], "hook_attn_out", 1 if "rescaled" in kind else 2, 40)
        sae.cfg.apply_b_dec_to_input = subtracts
    sae.save_model(tmp_path)
    theirs = SAE.load_from_disk(tmp_path, dtype="float64")
    ours = load_dictionary(tmp_path, models["processed"])
    x = torch.randn(60, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.activations(x), theirs.encode(x).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.reconstruct(x), theirs(x).detach(), rtol=1e-9, atol=1e-9)
    assert 0 < (ours.activations(x) > 0).double().mean() < 1


@pytest.mark.parametrize(("d_sae", "k"), [(24, 5), (331, 6), (1000, 5), (777, 3)])
def test_the_strongest_are_those_of_saelens_also_where_values_are_equal(d_sae: int, k: int) -> None:
    random = torch.randn(60, d_sae, generator=torch.Generator().manual_seed(d_sae))
    for p in (random, (3 * random).round(), random - 2, random.clamp(max=0), (3 * random).round().T.contiguous().T):
        expected = TopK(k)(p)
        assert torch.equal(torch.where(strongest(p, k), p, 0), expected)
        assert torch.equal(strongest(p, k), expected > 0)


@pytest.mark.skipif(not MAPS.exists(), reason="no /proc/self/maps: which files are mapped cannot be seen here")
def test_large_weights_are_the_file_itself_mapped_into_memory(tmp_path: Path, directory: Path) -> None:
    transcoder("relu", 1, 8).save_model(tmp_path)
    dictionary = load_dictionary(tmp_path, load_model(str(directory)))
    file = str((tmp_path / "sae_weights.safetensors").resolve())
    mapped = [line.split()[0] for line in MAPS.read_text().splitlines() if line.endswith(file)]
    ranges = [tuple(int(end, 16) for end in each.split("-")) for each in mapped]
    for matrix in (dictionary.W_enc, dictionary.W_dec):
        assert any(start <= matrix.data_ptr() < end for start, end in ranges)


def test_numbers_that_are_finite_but_whose_sum_is_not_are_no_damage() -> None:
    large = torch.full((4,), 3e38)
    assert not large.sum().isfinite()
    assert finite(large)
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not finite(torch.tensor([1.0, bad, -bad, 3e38]))


def test_what_a_configuration_says_of_its_weights(tmp_path: Path) -> None:
    transcoder("relu", 1, 8).save_model(tmp_path)
    assert weights_of(Place(tmp_path)) == "processed"
    config = json.loads((tmp_path / "cfg.json").read_text())
    for arguments, weights in (({}, "raw"), ({"center_writing_weights": True}, "centred")):
        config["metadata"]["model_from_pretrained_kwargs"] = arguments
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        assert weights_of(Place(tmp_path)) == weights
    _say_weights(tmp_path, "cooked")
    with pytest.raises(AtlasError, match="says it was trained on 'cooked' weights"):
        weights_of(Place(tmp_path))


def test_a_skip_transcoder_is_read_with_its_linear_path(tmp_path: Path, models: dict[str, LanguageModel]) -> None:
    skip = transcoder("skip", 1, 8)
    skip.save_model(tmp_path)
    x = torch.randn(9, 16)
    found = load_dictionary(tmp_path, models["processed"]).reconstruct(x.double())
    torch.testing.assert_close(found.float(), skip(x))


def test_kinds_without_an_arithmetic_are_refused(tmp_path: Path, models: dict[str, LanguageModel]) -> None:
    normed = transcoder("relu", 1, 8)
    normed.cfg.normalize_activations = "layer_norm"
    normed.save_model(tmp_path)
    with pytest.raises(AtlasError, match="normalises its input by 'layer_norm'"):
        load_dictionary(tmp_path, models["processed"])

    head = attention_sae("relu", "attn.hook_z", 1, 8)
    head.cfg.metadata.hook_head_index = 3
    head.save_model(tmp_path)
    with pytest.raises(AtlasError, match="reads one head alone"):
        load_dictionary(tmp_path, models["processed"])

    transcoder("relu", 1, 8).save_model(tmp_path)
    _say_weights(tmp_path, "raw")
    with pytest.raises(AtlasError, match="is a transcoder of raw weights"):
        load_dictionary(tmp_path, models["raw"])

    for content in ("[]", "{", '{"metadata": 3}'):
        (tmp_path / "cfg.json").write_text(content)
        with pytest.raises(AtlasError, match=r"cfg\.json (cannot be read as JSON|is no configuration)"):
            load_dictionary(tmp_path, models["processed"])


def test_damaged_and_foreign_models_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(AtlasError, match="is of type 'llama'; the atlas reads GPT-2's architecture only"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AtlasError, match="is not JSON"):
        load_model(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(AtlasError, match=r"has no tokenizer\.json"):
        load_model(str(tmp_path))


def test_figures_beside_the_weights_are_of_these_weights(tmp_path: Path) -> None:
    directory = write_random(tmp_path / "little")
    folder = directory / "dictionaries" / "1.mlp"
    (folder / "quality.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(AtlasError, match=r"quality\.json is of other weights"):
        set_up(str(directory))
    (folder / "quality.json").write_text("oops")
    with pytest.raises(AtlasError, match=r"quality\.json cannot be read"):
        set_up(str(directory))
