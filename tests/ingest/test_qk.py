"""Scores against the model's own, pairs against the bilinear form written plainly, lift against autograd.

The references below take W_Q, W_K and the biases from the model and each node's write from its dictionary; they
share no code with the projection. Everything is in float64.
"""

import json
from dataclasses import replace

import pytest
import torch

from atlas.records import Kind
from ingest.model import load_model
from ingest.qk import LIFTED, NEGLIGIBLE, STRONGEST, score_nodes, score_parts, score_records
from ingest.setup import set_up
from tests.ingest.models import write_model, write_random
from tests.ingest.test_attribution import KINDS, TEXT

# What an open path brings is in no pair.
CLOSED = [kinds for kinds in KINDS if len(kinds) == 3 and kinds[2] != "skip"]


@pytest.fixture(scope="module", params=CLOSED, ids=lambda kinds: "-".join(kinds))
def setup(request, tmp_path_factory):
    attention, hook, mlp = request.param
    return set_up(str(write_random(tmp_path_factory.mktemp("model"), attention, hook, mlp)), torch.float64)


@pytest.fixture(scope="module")
def replacement(setup):
    return setup.replace(setup.model.tokens(TEXT))


def all_looks(replacement):
    """Every (layer, head, query, key) with key <= query."""
    pattern = torch.ones_like(replacement.trace.pattern).tril()
    return pattern.nonzero()


def model_scores(model, tokens):
    """The scores that the model itself computes before its softmax, [layer, head, query, key]."""
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(tokens[None], names_filter=lambda name: "attn_scores" in name)
    return torch.stack([cache[f"blocks.{i}.attn.hook_attn_scores"][0] for i in range(model.record.n_layers)])


def parts_of(replacement, looks):
    nodes = score_nodes(replacement, looks)
    return nodes, score_parts(replacement, nodes, looks)


def writes(setup, replacement, nodes, n):
    """What node `n` adds to the residual stream."""
    kind, layer, name = nodes.groups[nodes.group[n]]
    t, place, trace = int(nodes.position[n]), int(nodes.place[n]), replacement.trace
    if kind is Kind.EMBEDDING:
        return trace.embed[t]
    if kind is Kind.POSITION:
        return trace.pos_embed[t]
    site = (replacement.attn if name == "attn" else replacement.mlp)[layer]
    dictionary, weights = site.dictionary, setup.model.weights
    on_z = name == "attn" and dictionary.record.hook_in.endswith("hook_z")
    if kind is Kind.BIAS:
        written, rest = dictionary.b_dec, weights.b_O[layer] if on_z else 0
    elif kind is Kind.ERROR:
        written, rest = site.error[t], 0
    else:
        assert int(site.position[place]) == t
        written, rest = dictionary.W_dec[site.index[place]] * site.value[place], 0
    return (
        torch.einsum("he,hed->d", written.view(weights.W_O[layer].shape[:2]), weights.W_O[layer]) if on_z else written
    ) + rest


def side(setup, replacement, nodes, n, look, letter):
    """q_u or k_v of node `n`, without the scale."""
    layer, head = look[:2]
    bridge, trace = setup.model.bridge, replacement.trace
    if nodes.groups[nodes.group[n]][2] == letter.lower():
        return getattr(bridge, f"b_{letter}")[layer, head].detach()
    x = writes(setup, replacement, nodes, n)
    x = (x - x.mean()) / trace.sigma_pre[layer, nodes.position[n]]
    return x @ getattr(bridge, f"W_{letter}")[layer, head].detach()


def readers(nodes, look, position, side):
    """The numbers of all nodes that one side of a head reads at a position."""
    layer = look[0]
    found = [
        n
        for n, g in enumerate(nodes.group.tolist())
        if int(nodes.position[n]) == position and below(nodes.groups[g], layer, side)
    ]
    return torch.tensor(found)


def below(group, layer, side):
    _, at, site = group
    return (at, site) == (layer, side) if site in ("q", "k") else at < layer


def test_stored_pairs_and_the_rest_are_the_models_score(setup, replacement):
    """I3, for every score of the prompt."""
    looks = all_looks(replacement)
    _, parts = parts_of(replacement, looks)
    real = model_scores(setup.model, replacement.trace.tokens)[tuple(looks.T)]
    torch.testing.assert_close(parts.score, real, rtol=1e-9, atol=1e-9)
    total = parts.unstored.index_add(0, parts.of, parts.qk)
    torch.testing.assert_close(total, parts.score, rtol=1e-9, atol=1e-9)
    assert torch.equal(parts.pattern, replacement.trace.pattern[tuple(looks.T)])
    assert parts.qk.isfinite().all()
    assert parts.lift.isfinite().all()


def test_every_pair_equals_the_bilinear_form_and_the_strongest_are_stored(setup, replacement):
    looks = all_looks(replacement)[::23]
    nodes, parts = parts_of(replacement, looks)
    scale, n_stored = setup.model.record.d_head**-0.5, []
    for i, look in enumerate(looks.tolist()):
        us, vs = readers(nodes, look, look[2], "q"), readers(nodes, look, look[3], "k")
        q = torch.stack([side(setup, replacement, nodes, n, look, "Q") for n in us.tolist()])
        k = torch.stack([side(setup, replacement, nodes, n, look, "K") for n in vs.tolist()])
        direct = q @ k.T * scale
        stored = torch.zeros_like(direct)
        for u, v, qk in zip(
            *(x[parts.of == i].tolist() for x in (parts.query_node, parts.key_node, parts.qk)), strict=True
        ):
            cell = int((us == u).nonzero()), int((vs == v).nonzero())
            assert stored[cell] == 0, "no pair is stored twice"
            assert qk == pytest.approx(float(direct[cell]), rel=1e-9, abs=1e-12)
            stored[cell] = qk
        strongest = direct.abs().flatten().sort(descending=True).values[:STRONGEST]
        strongest = strongest[strongest >= NEGLIGIBLE]
        assert (stored.abs() >= strongest[-1:] - 1e-12).sum() == len(strongest)
        keys = torch.stack([side(setup, replacement, nodes, n, look, "K") for n in vs.tolist()]).sum(0)
        others = torch.stack([whole_key(setup, replacement, look, s) for s in range(look[2] + 1)])
        lift = q @ (keys - replacement.trace.pattern[look[0], look[1], look[2], : look[2] + 1] @ others)
        lifted = [u for u in lift.abs().argsort(descending=True)[:LIFTED].tolist() if abs(lift[u]) >= NEGLIGIBLE]
        best = direct[lifted].abs().argmax(1)
        assert (stored[lifted, best].abs() >= NEGLIGIBLE).equal(direct[lifted, best].abs() >= NEGLIGIBLE)
        n_stored += [int((stored != 0).sum())]
        assert float(parts.unstored[i]) == pytest.approx(float(direct.sum() - stored.sum()), rel=1e-9, abs=1e-9)
    assert STRONGEST < max(n_stored) <= STRONGEST + LIFTED


def whole_key(setup, replacement, look, s):
    """The head's key at `s`, from the residual stream."""
    layer, head = look[:2]
    x, bridge = replacement.trace.resid_pre[layer, s], setup.model.bridge
    x = (x - x.mean()) / replacement.trace.sigma_pre[layer, s]
    return (x @ bridge.W_K[layer, head] + bridge.b_K[layer, head]).detach()


def test_lift_is_the_derivative_of_the_log_of_the_pattern(setup, replacement):
    looks = all_looks(replacement)[::9]
    nodes, parts = parts_of(replacement, looks)
    real = model_scores(setup.model, replacement.trace.tokens)
    scale, compared = setup.model.record.d_head**-0.5, 0
    for pair in range(0, len(parts.of), 3):
        look = looks[parts.of[pair]].tolist()
        query = side(setup, replacement, nodes, int(parts.query_node[pair]), look, "Q")
        keys = torch.stack([whole_key(setup, replacement, look, s) for s in range(look[2] + 1)])
        scores = real[look[0], look[1], look[2], : look[2] + 1]
        more = torch.zeros((), dtype=torch.float64, requires_grad=True)
        log_pattern = (scores + more * (keys @ query) * scale).log_softmax(0)
        assert float(log_pattern[look[3]].detach().exp()) == pytest.approx(
            float(parts.pattern[parts.of[pair]]), rel=1e-9
        )
        (derivative,) = torch.autograd.grad(log_pattern[look[3]], more)
        assert float(parts.lift[pair]) == pytest.approx(float(derivative), rel=1e-9, abs=1e-12)
        compared += look[2] > 0
    assert compared > 30


def test_removing_a_key_node_moves_the_score_by_its_pairs(setup, replacement, monkeypatch):
    """With every pair stored: the score recomputed from a residual stream that lacks the node, sigma frozen."""
    monkeypatch.setattr("ingest.qk.STRONGEST", 10**9)
    monkeypatch.setattr("ingest.qk.NEGLIGIBLE", 0.0)
    layer = replacement.n_layers - 1
    looks = torch.tensor([[layer, 1, len(replacement.trace.tokens) - 1, s] for s in (0, 2, 4)])
    nodes, parts = parts_of(replacement, looks)
    torch.testing.assert_close(parts.unstored, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    scale, bridge = setup.model.record.d_head**-0.5, setup.model.bridge
    removed = 0
    for i, look in enumerate(looks.tolist()):
        t, s = look[2:]
        x = replacement.trace.resid_pre[layer, t]
        q = (
            (x - x.mean()) / replacement.trace.sigma_pre[layer, t] @ bridge.W_Q[layer, 1] + bridge.b_Q[layer, 1]
        ).detach()
        for v in parts.key_node[parts.of == i].unique().tolist():
            if nodes.groups[nodes.group[v]][2] == "k":
                continue
            x = replacement.trace.resid_pre[layer, s] - writes(setup, replacement, nodes, v)
            x = (x - x.mean()) / replacement.trace.sigma_pre[layer, s]
            recomputed = float(q @ (x @ bridge.W_K[layer, 1] + bridge.b_K[layer, 1]).detach()) * scale
            change = float(parts.qk[(parts.of == i) & (parts.key_node == v)].sum())
            assert recomputed == pytest.approx(float(parts.score[i]) - change, rel=1e-9, abs=1e-9)
            removed += 1
    assert removed > 30


def test_what_comes_after_the_query_changes_nothing(setup, replacement):
    """The same scores from a prompt that ends at the query: no masked position has a part in them."""
    tokens = setup.model.tokens(TEXT)
    cut = 5
    shorter = setup.replace(tokens[:cut])
    looks = all_looks(shorter)
    _, whole = parts_of(replacement, looks)
    _, short = parts_of(shorter, looks)
    for name in ("score", "pattern", "unstored", "of", "qk", "lift"):
        torch.testing.assert_close(getattr(short, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_a_few_pairs_and_a_look_at_a_time_they_are_the_same(replacement, monkeypatch):
    looks = all_looks(replacement)[::7]
    _, together = parts_of(replacement, looks)
    monkeypatch.setattr("ingest.qk.PAIRS_AT_ONCE", 50)
    for i in range(0, len(looks), 5):
        _, alone = parts_of(replacement, looks[i : i + 1])
        torch.testing.assert_close(alone.unstored, together.unstored[i : i + 1], rtol=1e-9, atol=1e-9)
        qk = together.qk[together.of == i]
        torch.testing.assert_close(alone.qk.sort().values, qk.sort().values, rtol=1e-9, atol=1e-12)


def test_what_no_pair_explains_is_all_unstored(replacement):
    """Heads whose queries are all but zero: no pair is worth storing, and scores that nothing asks for are none."""
    weights = replace(replacement.weights, W_Q=replacement.weights.W_Q * 1e-9, b_Q=replacement.weights.b_Q * 0)
    _, parts = parts_of(replace(replacement, weights=weights), all_looks(replacement)[::5])
    assert len(parts.of) == len(parts.nodes) == 0
    torch.testing.assert_close(parts.unstored, parts.score, rtol=1e-9, atol=1e-12)
    nodes, parts = parts_of(replacement, all_looks(replacement)[:0])
    assert len(parts.score) == len(parts.nodes) == 0
    assert len(nodes.place) > 0


def test_a_direction_that_nodes_share_is_each_ones_own_write(setup, replacement):
    nodes = score_nodes(replacement, all_looks(replacement))
    assert len(nodes.direction) < len(nodes.of)
    for n in range(0, len(nodes.of), 7):
        written = nodes.direction[nodes.of[n]] * nodes.value[n]
        torch.testing.assert_close(written, writes(setup, replacement, nodes, n), rtol=1e-9, atol=1e-12)


def test_records_name_the_prompts_own_nodes(replacement):
    looks = all_looks(replacement)[::11]
    nodes, parts = parts_of(replacement, looks)
    number = torch.full((len(nodes.group),), -1)
    number[parts.nodes] = 100 + torch.arange(len(parts.nodes))
    scores, edges = score_records(parts, number)
    assert torch.tensor([*zip(scores.layer, scores.head, scores.query, scores.key, strict=True)]).equal(looks)
    assert min(edges.source.min(), edges.target.min()) == 100
    for i in range(0, len(edges.score), 17):
        source, target = parts.nodes[edges.source[i] - 100], parts.nodes[edges.target[i] - 100]
        look = looks[parts.of[i]].tolist()
        assert [edges.layer[i], edges.head[i], int(nodes.position[target]), int(nodes.position[source])] == look
        assert edges.score[i] == float(parts.qk[i])
    of_nothing = score_parts(replacement, nodes, looks[:0])
    scores, edges = score_records(of_nothing, number)
    assert len(scores.score) == len(edges.score) == 0


def test_the_scale_is_the_models_own(tmp_path):
    """A model whose layers divide their scores by their number."""
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scale_attn_by_inverse_layer_idx": True}))
    model = load_model(str(tmp_path))
    assert model.weights.attn_scale == pytest.approx([8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3])
    tokens = torch.tensor(model.tokens(TEXT))
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(tokens[None])
    for layer, scale in enumerate(model.weights.attn_scale):
        q, k = (cache[f"blocks.{layer}.attn.hook_{letter}"][0] for letter in "qk")
        scores = torch.einsum("the,she->hts", q, k) * scale
        seen = torch.ones_like(scores).tril().bool()
        torch.testing.assert_close(scores[seen], cache[f"blocks.{layer}.attn.hook_attn_scores"][0][seen])
