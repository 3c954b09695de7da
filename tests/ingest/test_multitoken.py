"""Multi-token circuits: a planted one is found with its head, and not where nothing crosses; the rest by autograd."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from atlas.errors import AtlasError
from atlas.verify import verify
from ingest.ablation import ablate_first_token
from ingest.attribution import RULES, attribute
from ingest.crossing import N_DRAWS, flow, measure
from ingest.job import circuit_requests, prepare_tasks, run
from ingest.multitoken import best_spans, chains, false_discovery_rates, find, multitoken
from ingest.prompts import Prompt
from ingest.roots import Root
from ingest.roots import root_table as sweep_table
from ingest.setup import set_up
from tests.ingest.models import write_random
from tests.ingest.test_attribution import KINDS, Frozen, dense
from tests.ingest.test_planted import LETTERS, write_planted

TEXT = "CDDEA"  # D at 2 and 3: the first layer says so at 3 and 4, and the second, a token later, at 4 and 5
D = LETTERS.index("D") + 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return set_up(str(write_planted(tmp_path_factory.mktemp("planted") / "planted")))


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The same features, but the second layer copies what its own token says."""
    return set_up(str(write_planted(tmp_path_factory.mktemp("planted") / "apart", back=0)))


@pytest.fixture(scope="module", params=KINDS[::2], ids=lambda kinds: "-".join(kinds))
def exact(request, tmp_path_factory):
    attention, hook, mlp = request.param
    return set_up(str(write_random(tmp_path_factory.mktemp("model"), attention, hook, mlp)), torch.float64)


def ignored(stage, steps):
    return lambda: None


def no_complaint(sentence):
    raise AssertionError(sentence)


def ingest(store, setup, texts, specs):
    tasks = prepare_tasks(setup, [Prompt(text, "test", task="t") for text in texts], False, no_complaint)
    run(store, setup, tasks, circuit_requests(setup, specs, "relative", 0.02), no_complaint, lambda summary: None)
    return tasks


def by_autograd(setup, replacement, root, start):
    """What crosses into a root: every activation at the earlier tokens detached, its derivative times its value."""
    stop = root.position
    frozen = Frozen(setup, replacement)
    for layer in range(replacement.n_layers):
        for site in ("attn", "mlp"):
            open_to = torch.ones(len(replacement.trace.tokens), frozen.dictionary(layer, site).record.d_sae).bool()
            open_to[start:stop] = False
            frozen.kept[layer, site] = open_to
    grads = frozen.gradients(root)
    crossing, leaves = 0.0, 0.0
    for layer in range(replacement.n_layers):
        for name in ("attn", "mlp"):
            site = replacement.site(layer, name)
            crossing += float((grads[layer, name] * dense(site, site.value))[start:stop].sum())
            leaves += float((grads[layer, name, "error"] * site.error)[start:stop].sum())
            leaves += float((grads[layer, name, "bias"] * site.bias)[start:stop].sum())
            if (layer, name, "b_O") in grads:
                leaves += float((grads[layer, name, "b_O"] * setup.model.weights.b_O[layer])[start:stop].sum())
    trace = replacement.trace
    leaves += float((grads["embedding"] * trace.embed + grads["position"] * trace.pos_embed)[start:stop].sum())
    return float(frozen.target(root)), crossing, leaves


def test_what_crosses_equals_autograd(exact):
    replacement = exact.replace(exact.model.tokens("The capital of Texas is"))
    last = len(replacement.trace.tokens) - 1
    crossed = 0
    for layer, name in ((1, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")):
        for index in (0, 7, 13):  # some fire there, and some do not
            root = Root(name, layer, last, index)
            found = flow(replacement, root, torch.tensor([index]), last - 2)
            value, crossing, leaves = by_autograd(exact, replacement, root, last - 2)
            assert float(found.value[0]) == pytest.approx(value, rel=1e-9)
            assert float(found.crossing[0]) == pytest.approx(crossing, rel=1e-8, abs=1e-10)
            assert float(found.leaves[0]) == pytest.approx(leaves, rel=1e-8, abs=1e-10)
            crossed += abs(crossing) > 1e-6
    assert crossed > 5


def test_crossing_weight_and_its_nulls(exact):
    replacement = exact.replace(exact.model.tokens("The capital of Texas is"))
    site = replacement.mlp[2]
    start = 3
    firing = [set(site.index[site.position == t].tolist()) for t in (start, start + 1, start + 2)]
    index = min(firing[0] & firing[1] & firing[2])
    roots = [Root("mlp", 2, start + k, index) for k in range(3)]
    everywhere = {f"{site.dictionary.record.id}/{i}": 0.5 for i in range(site.dictionary.record.d_sae)}
    found = measure(exact, replacement, roots, everywhere)
    one, two = (by_autograd(exact, replacement, root, start) for root in roots[1:])
    assert found.weight == pytest.approx((one[1] + two[1]) / (one[0] + two[0]), rel=1e-8)
    assert found.leaves == pytest.approx((one[2] + two[2]) / (one[0] + two[0]), rel=1e-8)
    others = [
        [by_autograd(exact, replacement, Root("mlp", 2, start + k, i), start) for i in sorted(firing[k] - {index})]
        for k in (1, 2)
    ]
    expected = {round((a[1] + b[1]) / (a[0] + b[0]), 9) for a in others[0] for b in others[1]}
    assert set(found.null.round(9).tolist()) <= expected
    assert len(found.null) == min(N_DRAWS, len(others[0]) * len(others[1]))
    assert found.p_value == (1 + sum(null >= found.weight for null in found.null)) / (1 + len(found.null))
    tokens = replacement.trace.tokens.tolist()
    orders = []
    for i, j, k in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        span = [tokens[start + i], tokens[start + j], tokens[start + k]]
        shuffled = exact.replace([*tokens[:start], *span, *tokens[start + 3 :]])
        crossed = sum(by_autograd(exact, shuffled, root, start)[1] for root in roots[1:])
        orders.append(crossed / (one[0] + two[0]))
    assert sorted(found.shuffled) == pytest.approx(sorted(orders), rel=1e-8)
    rare = everywhere | {f"{site.dictionary.record.id}/{index}": 0.01}
    alone = measure(exact, replacement, roots, rare)
    assert (len(alone.null), alone.p_value) == (0, 1.0), "no other feature is of its frequency"


def test_the_planted_circuit_is_found_with_its_head(store, planted):
    (task,) = ingest(store, planted, [TEXT], ["logits"])
    found = {(f.candidate.form, f.text): f for f in find(store, planted, 2, 50, ignored)}
    span, chain = found["span", "E A"], found["chain", "E A"]
    assert span.candidate.roots == (Root("attn", 1, 4, D), Root("attn", 1, 5, D))
    assert chain.candidate.roots == (Root("attn", 0, 4, D), Root("attn", 1, 5, D))
    for each in (span, chain):
        assert each.crossing.weight > 0.9
        assert (each.ablation.n, each.ablation.lost_random) == (1, 0)
        assert each.ablation.lost > 0.9, "all but what the reconstruction error carries"
    rows = store.read(
        "MATCH (m:MultiToken {text: 'E A'})-[:ROOT {order: 2}]->(root)<-[e:OV]-(u:Activation) "
        "MATCH (m)-[:INCLUDES]->(u) WHERE u.position = m.start AND e.weight > 0.5 * root.value "
        "RETURN m.form AS form, u.id AS id, e.layer AS layer, e.head AS head ORDER BY form"
    )
    through = f"{task.id}/4/0/attn/{D}"
    assert rows.to_numpy().tolist() == [["chain", through, 1, 1], ["span", through, 1, 1]]
    joins = store.read(
        "MATCH (m:MultiToken {text: 'E A', form: 'span'})-[j:JOINS]->(c:Circuit)-[:ROOT]->(n) "
        "RETURN n.id AS id, m.crossing_weight AS weight ORDER BY j.order"
    )
    assert joins["id"].tolist() == [f"{task.id}/{t}/1/attn/{D}" for t in (4, 5)]
    assert joins["weight"].tolist() == pytest.approx([span.crossing.weight] * 2)
    assert [check.name for check in verify(store) if check.violations] == []


def test_the_same_features_without_the_path_are_not(embedded_store, apart):
    ingest(embedded_store, apart, [TEXT], ["logits"])
    found = find(embedded_store, apart, 2, 50, ignored)
    (span,) = [f for f in found if f.candidate.roots == (Root("attn", 1, 3, D), Root("attn", 1, 4, D))]
    assert abs(span.crossing.weight) < 1e-5
    assert span.crossing.leaves > 0.9, "it is the token before that speaks, and no activation on it"
    assert [f for f in found if f.candidate.form == "chain"] == []
    assert (span.ablation.n, span.ablation.lost) == (0, 0)


def test_what_was_found_outlives_a_later_run(embedded_store, planted):
    ingest(embedded_store, planted, [TEXT], ["logits"])
    find(embedded_store, planted, 2, 50, ignored)
    query = (
        "MATCH (m:MultiToken)-[j:JOINS]->(c) RETURN m.id AS id, c.id AS circuit, m.lost AS lost ORDER BY id, circuit"
    )
    before = embedded_store.read(query)
    ingest(embedded_store, planted, [TEXT], ["features", "@3"])
    pd.testing.assert_frame_equal(embedded_store.read(query), before)
    find(embedded_store, planted, 2, 50, ignored)
    after = embedded_store.read(query)
    assert set(after["id"]) >= set(before["id"])
    assert not after.duplicated(["id", "circuit"]).any()


@pytest.mark.parametrize("length", [1, 9, 12])
def test_a_length_that_cannot_be(embedded_store, planted, length):
    with pytest.raises(AtlasError, match=f"span of {length} tokens cannot be looked for"):
        find(embedded_store, planted, length, 10, ignored)


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_that_cannot_be(tmp_path, limit):
    found = CliRunner().invoke(multitoken, ["--limit", limit, "--store", str(tmp_path / "none")])
    assert found.exit_code == 2
    assert f"{limit} is not in the range x>=1" in found.output


def test_an_empty_store_and_a_token_alone(embedded_store, planted):
    assert find(embedded_store, planted, 2, 10, ignored) == []
    ingest(embedded_store, planted, ["C"], ["logits"])
    assert find(embedded_store, planted, 2, 10, ignored) == []


def test_chains_are_grown_along_the_largest_shares(exact):
    """Each step of each chain, against a sweep of its own: the largest kept share at the token before."""
    replacement = exact.replace(exact.model.tokens("The capital of Texas is"))
    last = len(replacement.trace.tokens) - 1
    roots = [Root("mlp", 2, last, int(i)) for i in replacement.mlp[2].index[replacement.mlp[2].position == last]]
    found = chains(replacement, roots)
    assert found
    for chain, smallest in found:
        shares = []
        for before, root in pairwise(chain):
            assert before.position == root.position - 1
            sweep = attribute(replacement, sweep_table([root], replacement), RULES["relative"](0.02))
            best = {}
            for layer in range(3):
                for name in ("attn", "mlp"):
                    site, at = replacement.site(layer, name), sweep.site(layer, name)
                    for i in ((site.position == before.position) & at.kept[0]).nonzero()[:, 0].tolist():
                        best[layer, name, int(site.index[i])] = float(at.feature[0, i])
            strongest = max(best, key=best.__getitem__)
            assert strongest == (before.layer, before.site, before.index)
            value = float(sweep_table([root], replacement).value[0])
            shares.append(best[strongest] / value)
            assert shares[-1] >= 0.1
        assert smallest == pytest.approx(min(shares))


def test_ablation_against_runs_one_by_one(exact):
    replacement = exact.replace(exact.model.tokens("The capital of Texas is"))
    last = len(replacement.trace.tokens) - 1
    index = int(replacement.mlp[2].index[replacement.mlp[2].position == last][0])
    roots = [Root("mlp", 0, last - 1, 0), Root("mlp", 2, last, index)]
    found = ablate_first_token(exact, replacement, roots, "relative", 0.001)
    assert found.kind == "mean"
    sweep = attribute(replacement, sweep_table(roots[1:], replacement), RULES["relative"](0.001))
    chosen = {}
    for layer in range(3):
        for name in ("attn", "mlp"):
            site, kept = replacement.site(layer, name), sweep.site(layer, name).kept[0]
            chosen[layer, name] = site.index[kept & (site.position == last - 1)].tolist()
    assert found.n == sum(map(len, chosen.values())) > 0
    value = float(replacement.mlp[2].value[replacement.mlp[2].find(last, index)])
    assert found.lost == pytest.approx(1 - ablated(exact, replacement, chosen, last - 1, roots[1]) / value, rel=1e-6)


def ablated(setup, replacement, chosen, position, root):
    """A feature's activation in the real model with features set to their means at a position."""
    dictionaries = {(d.record.layer, d.record.site): d for d in setup.dictionaries}
    seen, hooks = {}, []
    for key, dictionary in dictionaries.items():

        def read(x, hook, key=key):
            seen[key] = x.flatten(2)[0].clone()

        def write(out, hook, key=key, dictionary=dictionary):
            a = dictionary.activations(seen[key])[position]
            change = ((a - dictionary.mean)[chosen[key]][:, None] * dictionary.W_dec[chosen[key]]).sum(0)
            out = out.clone()
            out[0, position] -= change.view_as(out[0, position])
            return out

        hooks += [(dictionary.record.hook_in, read), (dictionary.record.hook_out, write)]
    with torch.no_grad():
        setup.model.bridge.run_with_hooks(replacement.trace.tokens[None], fwd_hooks=hooks)
    return float(
        dictionaries[root.layer, root.site].activations(seen[root.layer, root.site])[root.position, root.index]
    )


def test_what_fires_everywhere_does_not_win():
    """A common feature with many spans of many texts comes after a rare one with two."""
    common = pd.DataFrame(
        {"prompt": [f"p{i}" for i in range(300)], "feature": "m/1/mlp/0", "index": 0, "text": "of the"}
    )
    rare = pd.DataFrame({"prompt": ["p0", "p1"], "feature": "m/1/mlp/1", "index": 1, "text": "New York"})
    spans = pd.concat([common, rare]).assign(start=2, end=3, mean=1.0, layer=1, site="mlp")
    chosen = best_spans(spans, {}, {"m/1/mlp/0": 0.95, "m/1/mlp/1": 0.001}, 4)
    assert [c.roots[0].index for c in chosen] == [1, 1, 0, 0]
    asked = {"p7": {Root("mlp", 1, 2, 0), Root("mlp", 1, 3, 0)}}
    assert best_spans(spans, asked, {"m/1/mlp/0": 0.95, "m/1/mlp/1": 0.001}, 1)[0].prompt == "p7"


def test_false_discovery_rates():
    p = np.array([0.04, 0.001, 0.5, 0.02, 0.02])
    expected = [min(sorted(p)[j] * len(p) / (j + 1) for j in range(len(p)) if sorted(p)[j] >= each) for each in p]
    assert false_discovery_rates(p) == pytest.approx(expected)
    assert false_discovery_rates(np.zeros(0)).tolist() == []
