"""--dtype and --device: one code path, on which the identities hold as far as the dtype allows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import atlas
from atlas.errors import AtlasError
from atlas.records import PromptRecord
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
KINDS = [("topk", "attn.hook_z", "jumprelu"), ("layer_norm", "hook_attn_out", "skip", (1, 2))]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


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
    """Every tensor that is not told where to be has no data; in this thread, which computes alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_device("meta")
    yield
    torch.set_default_device("cpu")
    torch.set_num_threads(threads)


def _whole(setup: Setup) -> PromptRecord:
    """All that `atlas ingest` computes for a prompt; measurements are made, too."""
    tokens = setup.model.tokens(TEXT)
    requests = circuit_requests(setup, EVERYTHING, "support", 0.05)
    replacement = setup.replace(tokens)
    record = prompt_record(Prompt(TEXT, "test"), "p", setup.model, "r", replacement, requests)
    assert len(record.ov.weight) or not any(d.record.d_sae for d in setup.dictionaries if d.record.site == "attn")
    for by in (ablation(setup, "mean"), ablation(setup, "zero"), ablation(setup, "resample", [tokens])):
        found = measured(setup, replacement, record, by)
        assert all(circuit.shares is not None for circuit in found.circuits)
    return record


@pytest.mark.parametrize("kinds", KINDS)
def test_every_tensor_is_made_where_the_model_is(tmp_path: Path, request: pytest.FixtureRequest, kinds: tuple) -> None:
    """A tensor on the default device would, with the model on a GPU, be on the processor; here it is on neither."""
    setup = set_up(str(write_random(tmp_path / "little", *kinds)))
    request.getfixturevalue("nowhere")
    _whole(setup)


@gpu
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_computes_what_the_processor_computes(tmp_path: Path, kinds: tuple, dtype: torch.dtype) -> None:
    directory = str(write_random(tmp_path / "little", *kinds))
    _assert_alike(*(_whole(set_up(directory, dtype, device=device)) for device in ("cuda", "cpu")), dtype)


def test_single_precision_computes_what_double_precision_computes(directory: Path) -> None:
    _assert_alike(*(_whole(set_up(str(directory), dtype)) for dtype in (torch.float32, torch.float64)), torch.float32)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_the_identities_hold(tmp_path: Path, kinds: tuple, dtype: str, device: str) -> None:
    """Those of METHOD 3, 4 and 5, which `atlas verify` looks for in a store, on a record without one."""
    setup = set_up(str(write_random(tmp_path / "little", *kinds)), getattr(torch, dtype), device=device)
    assert setup.replace([0, 1, 2]).mlp[0].value.device.type == device
    for name, residual in _residuals(_whole(setup)).items():
        assert len(residual), name
        assert residual.max() <= TOLERANCES[dtype], name


@gpu
def test_on_a_gpu_bfloat16_is_close_to_double_precision(directory: Path) -> None:
    rounded, exact = set_up(str(directory), torch.bfloat16, device="cuda"), set_up(str(directory), torch.float64)
    tokens = exact.model.tokens(TEXT)
    logits, expected = rounded.replace(tokens).trace.logits.cpu(), exact.replace(tokens).trace.logits
    assert (logits - expected).abs().max() < 2e-2 * expected.abs().max()


def _assert_alike(found: PromptRecord, expected: PromptRecord, dtype: torch.dtype) -> None:
    """The same nodes, edges, scores and attributions, to what `dtype` can say, a share of the greatest of each."""
    tables = zip(_numbers(found).items(), _numbers(expected).values(), strict=True)
    for (name, a), b in tables:
        assert len(b), name
        assert set(a.index) == set(b.index), name
        off = (a - b).abs().max() / b.abs().max()
        assert off <= TOLERANCES[str(dtype).removeprefix("torch.")], f"{name}: {off}"


def _numbers(record: PromptRecord) -> dict[str, pd.Series]:
    """All numbers of a record by the names of what they belong to."""
    name = np.array([node.id for node in record.nodes])
    direct, ov, qk, scores = record.direct, record.ov, record.qk, record.scores
    fires = record.firings
    features = np.repeat(np.array([f"{d}/{i}" for d, i in fires.features]), np.diff(fires.start))
    reading = [node for node in record.nodes if node.pre_activation is not None]
    members = [(c.id, name[i], a) for c in record.circuits for i, a in zip(c.members, c.attribution, strict=True)]
    columns = {
        "firings": (features, fires.position, fires.value),
        "pre-activations": ([n.id for n in reading], [n.pre_activation for n in reading]),
        "constants": ([n.id for n in reading], [n.constant for n in reading]),
        "DIRECT": (name[direct.source], name[direct.target], direct.weight),
        "OV": (name[ov.source], name[ov.target], ov.head, ov.weight),
        "scores": (scores.layer, scores.head, scores.query, scores.key, scores.score),
        "QK": (name[qk.source], name[qk.target], qk.layer, qk.head, qk.score),
        "lifts": (name[qk.source], name[qk.target], qk.layer, qk.head, qk.lift),
        "attributions": tuple(zip(*members, strict=True)),
    }
    return {
        what: pd.Series(np.array(values, dtype=float), pd.MultiIndex.from_arrays([*keys]), name=what)
        for what, (*keys, values) in columns.items()
    }


def _residuals(record: PromptRecord) -> dict[str, np.ndarray]:
    """By how much each identity is missed, reckoned as `atlas verify` does."""
    edges = pd.DataFrame({"target": [*record.direct.target, *record.ov.target],
                          "weight": [*record.direct.weight, *record.ov.weight]})  # fmt: skip
    nodes = pd.DataFrame(record.nodes).dropna(subset="pre_activation")
    position = np.array([node.position for node in record.nodes])
    qk, scores = record.qk, pd.DataFrame(vars(record.scores)).set_index(["layer", "head", "query", "key"])
    pairs = pd.DataFrame({"layer": qk.layer, "head": qk.head, "query": position[qk.target],
                          "key": position[qk.source], "weight": qk.score})  # fmt: skip
    shares = [c.completeness + c.error_share + c.pruned_share for c in record.circuits]
    return {
        "conservation": _missed(nodes, nodes["pre_activation"], ["constant", "unstored"], edges.groupby("target")),
        "scores": _missed(scores, scores["score"], ["unstored"], pairs.groupby(["layer", "head", "query", "key"])),
        "shares": np.abs(np.array(shares) - 1),
    }


def _missed(things: pd.DataFrame, whole: pd.Series, parts: list[str], edges) -> np.ndarray:
    """|sum of all terms - whole|, relative to |whole|, but at least to a hundredth of the terms' sizes."""
    weight = edges["weight"]
    total = weight.sum().reindex(things.index, fill_value=0) + things[parts].sum(axis=1)
    size = weight.agg(lambda w: w.abs().sum()).reindex(things.index, fill_value=0) + things[parts].abs().sum(axis=1)
    return ((total - whole).abs() / np.maximum(whole.abs(), size / 100 + 1e-12)).to_numpy(float)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(tmp_path: Path, directory: Path) -> None:
    store = tmp_path / "none"
    args = ["--model", str(directory), "--text", TEXT, "--store", str(store), "--device", "cuda"]
    done = CliRunner().invoke(ingest, args)
    assert isinstance(done.exception, AtlasError), done.output
    assert "PyTorch finds no GPU" in str(done.exception)
    assert not store.exists(), "nothing was written"
