"""Published transcoders: files in exactly their format come out equal; hostile ones run nothing."""

import dataclasses
import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from atlas.errors import AtlasError
from ingest.convert import convert
from ingest.dictionaries import load_dictionary
from ingest.dictionary_commands import dictionaries
from ingest.model import LanguageModel, load_model, sha256
from ingest.pickled import read_pickled
from tests.ingest.models import write_model

D_IN, D_SAE = 16, 40


@dataclasses.dataclass
class LanguageModelSAERunnerConfig:
    """As in the training code of the published files: plain fields, a dtype and a device among them."""

    hook_point: str = "blocks.1.ln2.hook_normalized"
    out_hook_point: str | None = "blocks.1.hook_mlp_out"
    hook_point_head_index: int | None = None
    model_name: str = "gpt2-small"
    is_transcoder: bool = True
    use_ghost_grads: tuple[bool, ...] = (False,)
    lr: float = 4e-4
    dtype: torch.dtype = torch.float32
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cuda", 0))


@pytest.fixture
def training_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class under the module's name that it has in the published files."""
    package, module = types.ModuleType("sae_training"), types.ModuleType("sae_training.config")
    monkeypatch.setattr(LanguageModelSAERunnerConfig, "__module__", "sae_training.config")
    module.LanguageModelSAERunnerConfig = LanguageModelSAERunnerConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sae_training", package)
    monkeypatch.setitem(sys.modules, "sae_training.config", module)


def random_weights(seed: int = 0) -> "OrderedDict[str, torch.Tensor]":
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), "b_dec_out": (D_IN,)}
    return OrderedDict((name, torch.randn(shape, generator=generator)) for name, shape in shapes.items())


def write_published(path: Path, weights: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    state: OrderedDict[str, torch.Tensor] = OrderedDict(random_weights() if weights is None else weights)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    torch.save({"cfg": LanguageModelSAERunnerConfig(**fields), "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    return load_model(str(directory))


@pytest.mark.usefixtures("training_code")
def test_a_converted_transcoder_computes_the_published_formula(tmp_path: Path, model: LanguageModel) -> None:
    weights = random_weights()
    file = write_published(tmp_path / "final_blocks.1.pt", weights)
    folder = convert(file, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.mlp"]
    loaded = load_dictionary(folder, model)

    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    w = {name: value.double() for name, value in weights.items()}
    p = (x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    assert torch.allclose(loaded.pre_activations(x).double(), p, rtol=1e-5, atol=2e-5)
    acts = torch.where(loaded.active(loaded.pre_activations(x)), loaded.pre_activations(x), 0)
    assert 0 < (acts > 0).float().mean() < 1
    expected = p.relu() @ w["W_dec"] + w["b_dec_out"]
    assert torch.allclose((acts @ loaded.W_dec + loaded.b_dec).double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(loaded.W_enc, weights["W_enc"])
    assert torch.equal(loaded.W_dec, weights["W_dec"])
    assert loaded.b_in.count_nonzero() == 0


@pytest.mark.usefixtures("training_code")
def test_what_is_recorded(tmp_path: Path, model: LanguageModel) -> None:
    revision = "4f3ca345572ce2d75018a60d10b4dca8bd899e99"
    cache = tmp_path / "models--pchlenski--gpt2-transcoders" / "snapshots" / revision
    cache.mkdir(parents=True)
    file = write_published(cache / "final.pt")
    folder = convert(file, tmp_path / "out")
    record = load_dictionary(folder, model).record
    assert (record.layer, record.site, record.kind, record.activation) == (1, "mlp", "transcoder", "relu")
    assert (record.hook_in, record.hook_out) == ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    assert (record.source, record.revision) == ("pchlenski/gpt2-transcoders", revision)
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["source_sha256"] == sha256(file)
    elsewhere = write_published(tmp_path / "mine.pt", hook_point="blocks.2.ln2.hook_normalized",
                                out_hook_point="blocks.2.hook_mlp_out")  # fmt: skip
    record = load_dictionary(convert(elsewhere, tmp_path / "out"), model).record
    assert (record.layer, record.source, record.revision) == (2, "mine", "local")


@pytest.mark.usefixtures("training_code")
def test_views_of_a_storage_are_read_as_torch_would(tmp_path: Path) -> None:
    weights = random_weights()
    everything = torch.randn(3 + D_SAE * D_IN)
    weights["W_enc"] = everything[3:].view(D_SAE, D_IN).T
    weights["b_dec"] = everything[: 2 * D_IN : 2]
    weights["b_enc"] = weights["b_enc"].double()
    values, tensors = read_pickled(write_published(tmp_path / "views.pt", weights))
    assert all(torch.equal(tensors[name], weights[name]) for name in weights)
    assert tensors["b_enc"].dtype is torch.float64
    assert (values["device"], values["dtype"], values["use_ghost_grads"]) == ("cuda:0", "float32", (False,))


@pytest.mark.usefixtures("training_code")
def test_the_command_and_what_is_there_already(tmp_path: Path) -> None:
    file, out = write_published(tmp_path / "one.pt"), tmp_path / "out"
    done = CliRunner().invoke(dictionaries, ["convert", str(file), "--out", str(out)])
    assert (done.exit_code, done.output) == (0, f"one.pt -> {out / '1.mlp'}\n")
    before = {path.name: path.read_bytes() for path in (out / "1.mlp").iterdir()}
    assert set(before) == {"cfg.json", "sae_weights.safetensors"}
    with pytest.raises(AtlasError, match="is there already"):
        convert(write_published(tmp_path / "two.pt", random_weights(seed=2)), out)
    assert {path.name: path.read_bytes() for path in (out / "1.mlp").iterdir()} == before


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in random_weights().items() if key != name}


@pytest.mark.usefixtures("training_code")
@pytest.mark.parametrize(
    ("weights", "fields", "sentence"),
    [
        ({**random_weights(), "b_enc": torch.full((D_SAE,), torch.nan)}, {}, "NaN or infinite values in b_enc"),
        ({**random_weights(), "W_dec": torch.full((D_SAE, D_IN), torch.inf)}, {}, "NaN or infinite values in W_dec"),
        ({**random_weights(), "W_dec": torch.zeros(D_IN, D_SAE)}, {}, r"W_dec of shape \(16, 40\)"),
        ({**random_weights(), "W_enc": torch.zeros(D_SAE)}, {}, r"W_enc of shape \(40,\)"),
        ({**random_weights(), "W_enc": torch.zeros(2, 2, 2)}, {}, "shape is not that of a vector or matrix"),
        ({**random_weights(), "b_dec": torch.zeros(0)}, {}, "is not what it is said to be"),
        ({**random_weights(), "b_dec": torch.zeros(D_IN, dtype=torch.long)}, {}, "LongStorage"),
        ({**random_weights(), "threshold": torch.zeros(D_SAE)}, {}, "exactly the tensors W_enc"),
        (without("b_dec_out"), {}, "exactly the tensors W_enc"),
        (None, {"is_transcoder": False}, "does not say is_transcoder"),
        (None, {"hook_point": "blocks.1.hook_mlp_out"}, "goes from 'blocks.1.hook_mlp_out'"),
        (None, {"out_hook_point": "blocks.2.hook_mlp_out"}, "to 'blocks.2.hook_mlp_out'"),
        (None, {"out_hook_point": None}, "to ''"),
    ],
)
def test_what_is_no_transcoder_is_refused_in_a_sentence(
    tmp_path: Path, weights: dict[str, torch.Tensor] | None, fields: dict[str, Any], sentence: str
) -> None:
    file = write_published(tmp_path / "bad.pt", weights, **fields)
    with pytest.raises(AtlasError, match=sentence) as caught:
        convert(file, tmp_path / "out")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def write_attention_sae(folder: Path, weights: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    """As ckkissane/attn-saes-gpt2-small-all-layers publishes them: NAME.pt, and NAME_cfg.json beside it."""
    config = {"act_name": "blocks.2.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE, "model_name": "gpt2-small"}
    (folder / "gpt2-small_L2_Hcat_z_v9_cfg.json").write_text(json.dumps(config | fields))
    torch.save(OrderedDict(without("b_dec_out") if weights is None else weights), folder / "gpt2-small_L2_Hcat_z_v9.pt")
    return folder / "gpt2-small_L2_Hcat_z_v9.pt"


def test_an_attention_sae_comes_out_as_saelens_reads_it(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    file = write_attention_sae(tmp_path)
    folder = convert(file, tmp_path / "out")
    assert folder == tmp_path / "out" / "2.attn"
    loaded = load_dictionary(folder, model)
    assert (loaded.record.id, loaded.record.hook_in) == (f"{model.record.id}/2/attn/att-kk", "blocks.2.attn.hook_z")

    def downloaded(repo_id: str, filename: str, force_download: bool) -> str:
        return str(tmp_path / filename)

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", downloaded)
    config, weights, _ = pretrained_sae_loaders.connor_rob_hook_z_huggingface_loader("any", file.name)
    theirs = StandardSAE(
        StandardSAEConfig(
            d_in=config["d_in"], d_sae=config["d_sae"], apply_b_dec_to_input=config["apply_b_dec_to_input"]
        )
    )
    theirs.load_state_dict(weights)
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded.activations(x), theirs.encode(x).detach())
    torch.testing.assert_close(loaded.reconstruct(x), theirs(x).detach())
    for name, value in weights.items():
        assert torch.equal(getattr(loaded, name), value)


@pytest.mark.parametrize(
    ("weights", "fields", "sentence"),
    [
        (None, {"act_name": "blocks.2.hook_mlp_out"}, "is for 'blocks.2.hook_mlp_out'"),
        (None, {"act_name": 5}, "is for ''"),
        (None, {"dict_size": 41}, "is not what .* says"),
        (random_weights(), {}, "exactly the tensors W_enc, b_enc, W_dec, b_dec"),
        ({}, {}, "exactly the tensors"),
    ],
)
def test_what_is_no_attention_sae_is_refused_in_a_sentence(
    tmp_path: Path, weights: dict[str, torch.Tensor] | None, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AtlasError, match=sentence):
        convert(write_attention_sae(tmp_path, weights, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_attention_sae_needs_its_configuration(tmp_path: Path) -> None:
    file = write_attention_sae(tmp_path)
    beside = tmp_path / f"{file.stem}_cfg.json"
    beside.write_text("oops")
    with pytest.raises(AtlasError, match="is not JSON"):
        convert(file, tmp_path / "out")
    beside.unlink()
    with pytest.raises(AtlasError, match=f"needs {beside.name} beside it"):
        convert(file, tmp_path / "out")


CONFIG = b"csae_training.config\nLanguageModelSAERunnerConfig\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def zipped(program: bytes) -> bytes:
    """A torch file whose pickle is `program`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(4 * 8))
    return buffer.getvalue()


def storage(numel: int = 8) -> bytes:
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
    return pid + bytes([numel]) + b"tQ"


def tensor_file(arguments: bytes) -> bytes:
    """A state_dict of one tensor that is rebuilt from `arguments`."""
    state = b"}X\x05\x00\x00\x00W_enc" + REBUILD + b"(" + arguments + b"tRs"
    return zipped(b"\x80\x02}(X\x03\x00\x00\x00cfg" + CONFIG + b")\x81}bX\x0a\x00\x00\x00state_dict" + state + b"u.")


class _Reduced:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


CALLS = "import pathlib; pathlib.Path('canary').touch()"


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes) -> str:
    """The one sentence that `program` is refused with, having done nothing."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "hostile.pt"
    file.write_bytes(zipped(program))
    modules = set(sys.modules)
    with pytest.raises(AtlasError) as caught:
        convert(file, tmp_path / "out")
    sentence = str(caught.value)
    assert sentence.startswith(f"{file} ")
    assert len(sentence) < 500
    assert "\n" not in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pt"]
    assert "sae_training" not in {name.split(".")[0] for name in set(sys.modules) - modules}
    return sentence


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(b"cos\nsystem\n(X\x0c\x00\x00\x00touch canarytR.", id="os.system"),
        pytest.param(b"cposix\nsystem\n(X\x0c\x00\x00\x00touch canarytR.", id="posix.system"),
        pytest.param(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.", id="STACK_GLOBAL"),
        pytest.param(b"(S'touch canary'\nios\nsystem\n.", id="INST"),
        pytest.param(b"(cos\nsystem\nS'touch canary'\no.", id="OBJ"),
        pytest.param(b"c__builtin__\neval\n(S'1'\ntR.", id="the old name of builtins"),
        pytest.param(pickle.dumps(_Reduced(exec, CALLS)), id="exec"),
        pytest.param(pickle.dumps(_Reduced(eval, f"exec({CALLS!r})"), protocol=2), id="eval"),
        pytest.param(pickle.dumps({"cfg": [_Reduced(exec, CALLS)]}), id="nested"),
        pytest.param(pickle.dumps(_Reduced(getattr, "", "format")), id="getattr"),
        pytest.param(CONFIG + b")\x81}X\x01\x00\x00\x00acos\nsystem\nsb.", id="a global within the state"),
        pytest.param(
            b"\x80\x04\x8c\x13sae_training.config\x8c%LanguageModelSAERunnerConfig.__init__\x93.", id="dotted"
        ),
        pytest.param(b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", id="dotted dict"),
        pytest.param(b"ccollections\nCounter\n)R.", id="an unknown class"),
        pytest.param(b"csae_training.config\nRunnerConfig\n)\x81.", id="its neighbour"),
        pytest.param(b"ctorch\nload\n(S'x'\ntR.", id="torch.load"),
        pytest.param(b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.", id="torch's own nested unpickling"),
    ],
)
def test_a_pickle_that_asks_for_more_than_data_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes
) -> None:
    assert "it asks for '" in refused(tmp_path, monkeypatch, program)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(CONFIG + b"}X\x08\x00\x00\x00__init__X\x01\x00\x00\x00xsb.", id="state of the class itself"),
        pytest.param(CONFIG + b"N}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.", id="slots of the class itself"),
        pytest.param(REBUILD + b"N}X\x08\x00\x00\x00__call__K\x01s\x86b.", id="slots of the tensor maker"),
        pytest.param(REBUILD + b"}X\x08\x00\x00\x00__call__K\x01sb.", id="state of the tensor maker"),
        pytest.param(CONFIG + b")\x81N}X\x09\x00\x00\x00__class__K\x01s\x86b.", id="slots of the configuration"),
        pytest.param(CONFIG + b")\x81]b.", id="a state that is no table"),
        pytest.param(CONFIG + b")\x81}K\x01K\x02sb.", id="a state with names that are no texts"),
        pytest.param(storage() + b"N}X\x03\x00\x00\x00keyX\x02\x00\x00\x00..s\x86b.", id="another key for a storage"),
        pytest.param(b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x05\x00\x00\x00../../NK\x08tQ.", id="a path"),
        pytest.param(b"(K\x01K\x02tQ.", id="no storage"),
        pytest.param(b"\x82\x01.", id="an extension code"),
        pytest.param(b"\x80\x05\x97.", id="a buffer from outside"),
        pytest.param(b"X\xff\xff\xff\x7f", id="cut off"),
        pytest.param(b"", id="empty"),
        pytest.param(b".", id="an empty stack"),
        pytest.param(b"}.", id="an empty table"),
        pytest.param(b"(" * 1_000_001, id="too large"),
        pytest.param(b"]" * 100_000 + b"a" * 99_999 + b".", id="deep"),
    ],
)
def test_a_pickle_that_makes_something_else_of_the_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes
) -> None:
    refused(tmp_path, monkeypatch, program)


def test_the_canary_sings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hostile programs do run where pickle is trusted, so the test above can fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"cos\nsystem\n(X\x0c\x00\x00\x00touch canarytR.")
    assert (tmp_path / "canary").exists()


def test_attributes_of_the_configuration_never_become_those_of_an_object(tmp_path: Path) -> None:
    names = b"".join(
        b"X" + len(name).to_bytes(4, "little") + name + b"K\x07"
        for name in (b"__class__", b"__dict__", b"__setstate__", b"values", b"get")
    )
    state = b"}(" + names + b"u"
    program = b"\x80\x02}(X\x03\x00\x00\x00cfg" + CONFIG + b")\x81" + state + b"bX\x0a\x00\x00\x00state_dict}u."
    (tmp_path / "odd.pt").write_bytes(zipped(program))
    values, tensors = read_pickled(tmp_path / "odd.pt")
    assert type(values) is dict
    assert set(values.values()) == {7}
    assert tensors == {}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(storage() + b"K\x00K\x02K\x05\x86K\x05K\x01\x86\x89", id="beyond the storage"),
        pytest.param(storage() + b"K\x07K\x02\x85K\x01\x85\x89", id="an offset beyond the storage"),
        pytest.param(storage() + b"J\xff\xff\xff\xffK\x02\x85K\x01\x85\x89", id="before the storage"),
        pytest.param(storage() + b"K\x00K\x64\x85K\x00\x85\x89", id="one number repeated"),
        pytest.param(storage() + b"K\x00K\x02\x85K\x01K\x01\x86\x89", id="strides that do not fit"),
        pytest.param(storage() + b"K\x00]K\x01\x85\x89", id="a shape that is no tuple"),
        pytest.param(storage() + b"K\x00\x8a\x09" + b"\xff" * 8 + b"\x00\x85K\x00\x85\x89", id="a huge shape"),
        pytest.param(storage(9) + b"K\x00K\x02\x85K\x01\x85\x89", id="a storage shorter than it says"),
        pytest.param(b"X\x01\x00\x00\x00aK\x00K\x02\x85K\x01\x85\x89", id="a text as storage"),
        pytest.param(b"K\x00", id="too few arguments"),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path: Path, arguments: bytes) -> None:
    file = tmp_path / "bad.pt"
    file.write_bytes(tensor_file(arguments))
    with pytest.raises(AtlasError):
        read_pickled(file)
    file.write_bytes(tensor_file(storage() + b"K\x00K\x02K\x04\x86K\x04K\x01\x86\x89"))
    assert read_pickled(file)[1]["W_enc"].shape == (2, 4)


@pytest.mark.usefixtures("training_code")
def test_files_that_are_damaged_or_something_else(tmp_path: Path) -> None:
    whole = write_published(tmp_path / "whole.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"data/0") + 200] ^= 1
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"}.")
    legacy = io.BytesIO()
    torch.save({}, legacy, _use_new_zipfile_serialization=False)
    no_pickle = io.BytesIO()
    zipfile.ZipFile(no_pickle, "w").close()
    bad = [b"", b"PK", b"hello", whole[:-1], whole[: len(whole) // 2], bytes(flipped)]
    bad += [compressed.getvalue(), legacy.getvalue(), no_pickle.getvalue()]
    for content in bad:
        file = tmp_path / "bad.pt"
        file.write_bytes(content)
        with pytest.raises(AtlasError, match=r"bad\.pt (is no torch file|was refused)"):
            convert(file, tmp_path / "out")
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(AtlasError, match="cannot be read"):
            convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
