"""Virtual weights against their direct evaluation, pair by pair, in float64; and what is stored of them."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import queries
from atlas.schema import prepare
from atlas.store import Store
from atlas.wiring import write_dictionaries, write_wires
from ingest import wiring
from ingest.setup import Setup, set_up
from ingest.wiring import KINDS, wired_blocks
from tests.ingest.models import write_random

TOP = 7


@pytest.fixture(scope="module", params=["attn.hook_z", "hook_attn_out"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    directory: Path = tmp_path_factory.mktemp("wiring")
    return set_up(str(write_random(directory, hook=request.param)), torch.float64)


def direct(setup: Setup) -> dict[tuple, dict[tuple, float]]:
    """Every virtual weight by its definition: {(via, layer, target): {(source, head): weight}}."""
    W, n_heads = setup.model.weights, setup.model.record.n_heads
    P = torch.eye(16, dtype=torch.float64) - torch.full((16, 16), 1 / 16, dtype=torch.float64)
    features = []
    for d in setup.dictionaries:
        r = d.record
        for i in range(r.d_sae):
            write = d.W_dec[i]
            if r.hook_in.endswith("hook_z"):
                write = sum(write[8 * h : 8 * h + 8] @ W.W_O[r.layer, h] for h in range(n_heads))
            features.append((f"{r.id}/{i}", 2 * r.layer + (r.site == "mlp"), r, d.W_enc[:, i], write))
    weights: dict[tuple, dict[tuple, float]] = {}
    for target, rank, r, encoder, query in features:
        for source, below, s, _, write in features:
            if r.site == "mlp" and below < rank:
                weights.setdefault(("MLP", None, target), {})[source, None] = float(write @ P @ encoder)
            for h in range(n_heads):
                if r.site == "attn" and s.layer < r.layer:
                    z = encoder[8 * h : 8 * h + 8] if r.hook_in.endswith("hook_z") else W.W_O[r.layer, h] @ encoder
                    weight = float(write @ P @ W.W_V[r.layer, h] @ z)
                    weights.setdefault(("OV", r.layer, target), {})[source, h] = weight
                for layer in range(max(r.layer, s.layer) + 1, 3):
                    weight = float((query @ P @ W.W_Q[layer, h]) @ (write @ P @ W.W_K[layer, h]))
                    weights.setdefault(("QK", layer, target), {})[source, h] = weight
    return weights


def test_the_strongest_weights_are_those_of_a_direct_evaluation(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "BLOCK", 10)
    wanted = direct(setup)
    found: dict[tuple, list] = {}
    for block in wired_blocks(setup, [0, 1, 2], KINDS, TOP):
        for wire in block.wires:
            assert wire.target in block.targets
            found.setdefault((wire.via, wire.layer, wire.target), []).append(wire)
    assert set(found) == set(wanted)
    for key, wires in found.items():
        everything = wanted[key]
        assert [wire.rank for wire in wires] == list(range(1, min(TOP, len(everything)) + 1))
        assert all(abs(first.weight) >= abs(second.weight) for first, second in pairwise(wires))
        strongest = sorted((abs(weight) for weight in everything.values()), reverse=True)[: len(wires)]
        assert [abs(wire.weight) for wire in wires] == pytest.approx(strongest, rel=1e-9)
        for wire in wires:
            assert wire.weight == pytest.approx(everything[wire.source, wire.head], rel=1e-9)


def test_wires_are_stored_once_and_asked_for(setup: Setup, embedded_store: Store) -> None:
    prepare(embedded_store)
    blocks = list(wired_blocks(setup, [1], KINDS, 3))
    for _ in range(2):
        write_dictionaries(embedded_store, [d.record for d in setup.dictionaries])
        for block in blocks:
            write_wires(embedded_store, block.via, block.targets, block.wires, block.layer)
    count = "MATCH ()-[w:VIRTUAL_WEIGHT]->() RETURN count(w) AS n"
    assert embedded_store.read(count)["n"][0] == sum(len(block.wires) for block in blocks)
    answer = queries.wired(embedded_store, via="OV", among=100_000, limit=100_000)
    wires = {(w.source, w.target, w.head): w.weight for block in blocks if block.via == "OV" for w in block.wires}
    assert {(r.source, r.target, r.head): r.weight for r in answer.itertuples()} == wires
    assert (answer["n_prompts"] == 0).all()
