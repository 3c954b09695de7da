"""--dtype and --device: one code path, on which the identities hold as far as the dtype allows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import atlas
from atlas.errors import AtlasError
from atlas.verify import TOLERANCES, verify
from ingest.circuits import prompt_record
from ingest.cli import ingest
from ingest.faithfulness import ablation, measured
from ingest.job import circuit_requests, prompt_id
from ingest.model import load_model
from ingest.prompts import Prompt
from ingest.setup import Setup, set_up
from ingest.trace import summed, trace
from tests.ingest.models import write_random

TEXT = "The capital of Texas is"
EVERYTHING = ("default", " Austin- Paris", "@3", "1/attn/3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random") / "little", attention="topk", mlp="jumprelu")


def test_every_dtype_is_ingested_and_its_identities_hold(tmp_path: Path, directory: Path) -> None:
    """METHOD's identities as `atlas verify` asks for them, and faithfulness measured in that dtype, side by side."""
    for dtype in TOLERANCES:
        args = ["--model", str(directory), "--text", TEXT, "--dtype", dtype, "--store", str(tmp_path / "store")]
        done = CliRunner().invoke(ingest, args)
        assert done.exit_code == 0, done.output
    with atlas.connect(tmp_path / "store") as store:
        assert [check for check in verify(store) if check.violations] == []
        dtypes = store.read("MATCH (:Prompt)-[:TRACED_BY]->(m) RETURN m.dtype AS dtype")
        assert dict(Counter(dtypes["dtype"])) == dict.fromkeys(TOLERANCES, 1), "each has a prompt of its own"
        measured = store.read(
            "MATCH (m)<-[:TRACED_BY]-(:Prompt)-[:HAS_CIRCUIT]->(c:Circuit) WHERE c.faithfulness IS NOT NULL "
            "RETURN m.dtype AS dtype, count(c) AS n"
        )
        assert set(measured["dtype"]) == set(TOLERANCES)
        store.write(
            lambda transaction: transaction.run(
                "MATCH (m:ReplacementModel {dtype: 'float32'}) SET m.dtype = 'float64'"
            ).consume()
        )
        failed = {check.name for check in verify(store) if check.violations}
        assert "conservation" in failed, "what is stored as double precision is held to it"


@pytest.mark.parametrize("weights", ["processed", "centred", "raw"])
def test_summing_gives_what_the_model_itself_gives_in_double_precision(directory: Path, weights: str) -> None:
    """What stands in for a bfloat16 model's own sums is what an exact model computes."""
    model = load_model(str(directory), torch.float64, weights)
    found = trace(model, model.tokens(TEXT))
    without = replace(found, **{f.name: torch.full_like(getattr(found, f.name), torch.nan) for f in fields(found)
                                if f.name not in ("tokens", "embed", "pos_embed", "pattern", "mlp_out")})  # fmt: skip
    again = summed(without, model.weights, model.bridge.cfg.eps)
    for field in fields(found):
        name = field.name
        torch.testing.assert_close(
            getattr(again, name), getattr(found, name), rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_bfloat16_is_close_to_and_float32_closer_to_double_precision(directory: Path) -> None:
    setups = {dtype: set_up(str(directory), dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    found = {dtype: setup.replace(setup.model.tokens(TEXT)) for dtype, setup in setups.items()}
    assert [each.trace.logits.dtype for each in found.values()] == [torch.float32, torch.float32, torch.float64]
    exact = found[torch.float64].trace.logits
    off = {d: float((each.trace.logits - exact).abs().max() / exact.abs().max()) for d, each in found.items()}
    assert 1e-4 < off[torch.bfloat16] < 2e-2
    assert off[torch.float32] < 1e-5
    assert next(setups[torch.bfloat16].model.bridge.parameters()).dtype is torch.bfloat16
    assert len({prompt_id(setup, [0, 1]) for setup in setups.values()}) == 3, "another dtype is another prompt"


@pytest.fixture
def nowhere() -> Iterator[None]:
    """Every tensor that is not told where to be has no data."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device("cpu")


def _whole(setup: Setup) -> None:
    """All that `atlas ingest` computes for a prompt, measurements included."""
    tokens = setup.model.tokens(TEXT)
    requests = circuit_requests(setup, EVERYTHING, "support", 0.05)
    replacement = setup.replace(tokens)
    record = prompt_record(Prompt(TEXT, "test"), "p", setup.model, "r", replacement, requests)
    assert len(record.ov.weight) or not any(d.record.d_sae for d in setup.dictionaries if d.record.site == "attn")
    for by in (ablation(setup, "mean"), ablation(setup, "zero"), ablation(setup, "resample", [tokens])):
        found = measured(setup, replacement, record, by)
        assert all(circuit.shares is not None for circuit in found.circuits)


@pytest.mark.parametrize(
    "kinds", [("topk", "attn.hook_z", "jumprelu"), ("layer_norm", "hook_attn_out", "skip", (1, 2))]
)
def test_every_tensor_is_made_where_the_model_is(tmp_path: Path, request: pytest.FixtureRequest, kinds: tuple) -> None:
    """A tensor on the default device would, with the model on a GPU, be on the processor; here it is on neither."""
    setup = set_up(str(write_random(tmp_path / "little", *kinds)))
    request.getfixturevalue("nowhere")
    _whole(setup)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_a_gpu_it_is_computed_alike(directory: Path, dtype: torch.dtype) -> None:
    setup = set_up(str(directory), dtype, device="cuda")
    assert setup.replace([0, 1, 2]).mlp[0].value.device.type == "cuda"
    _whole(setup)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(tmp_path: Path, directory: Path) -> None:
    store = tmp_path / "none"
    args = ["--model", str(directory), "--text", TEXT, "--store", str(store), "--device", "cuda"]
    done = CliRunner().invoke(ingest, args)
    assert isinstance(done.exception, AtlasError), done.output
    assert "PyTorch finds no GPU" in str(done.exception)
    assert not store.exists(), "nothing was written"
