"""Interventions against Hugging Face's own model with hooks written here; shares on a circuit that is known.

The reference runs the unprocessed `GPT2LMHeadModel` in float64 and edits its sites through `SiteModel`; it shares
with the code under test nothing but the dictionaries' encoder.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from atlas.errors import AtlasError
from atlas.faithfulness import circuits_without_shares, stored_shares, write_shares
from atlas.records import SharesRecord
from atlas.store import Store
from ingest import faithfulness
from ingest.circuits import CircuitRequest, prompt_record
from ingest.faithfulness import (
    DRAWS,
    Ablation,
    Claim,
    Intervention,
    ablation,
    as_features,
    measure,
    measured,
    root_of,
    root_values,
)
from ingest.job import circuit_requests, prepare_tasks, run
from ingest.measure_stored import measure_stored
from ingest.mini.sites import Site, SiteModel
from ingest.prompts import Prompt
from ingest.roots import Root, from_the_top, parse_root, root_table
from ingest.setup import Setup, set_up
from tests.ingest.models import write_random
from tests.ingest.test_attribution import KINDS, TEXT, some_roots
from tests.ingest.test_planted import LETTERS, write_planted

OTHER = "Mary and John said the old house"


@pytest.fixture(scope="module", params=KINDS, ids=lambda kinds: "-".join(kinds))
def directory(request, tmp_path_factory) -> Path:
    attention, hook, mlp = request.param
    return write_random(tmp_path_factory.mktemp("model") / "little", attention, hook, mlp)


@pytest.fixture(scope="module")
def setup(directory) -> Setup:
    return set_up(str(directory), torch.float64)


@pytest.fixture(scope="module")
def replacement(setup):
    return setup.replace(setup.model.tokens(TEXT))


def random_interventions(setup, replacement, n_features=40) -> list[Intervention]:
    """Every root with a random set of active and silent features, ablated, and everything else ablated."""
    rng = torch.Generator().manual_seed(5)
    n_pos = len(replacement.trace.tokens)
    made = []
    for root in some_roots(replacement):
        site = torch.randint(len(setup.dictionaries), (n_features,), generator=rng)
        width = torch.tensor([setup.dictionaries[s].record.d_sae for s in site])
        index = (torch.rand(n_features, generator=rng) * width).long()
        features = torch.stack([site, torch.randint(n_pos, (n_features,), generator=rng), index], 1)
        made += [Intervention(root, features, outside, seed=len(made)) for outside in (False, True)]
    return made


def edited_by_hand(d, number, intervention, fill, x, y):
    """`y` [1, pos, d] with every ablated feature's part exchanged, cell by cell."""
    features = {tuple(row) for row in intervention.features.tolist()}
    a = d.activations(x[0])
    new = a.clone()
    for t in range(1, len(a)):
        for i in range(d.record.d_sae):
            if ((number, t, i) in features) != intervention.outside:
                new[t, i] = fill[number][0, i]
    change = (new - a) @ d.W_dec
    change[0] = 0
    return y + change[None]


def after_attention(edit, _module, _args, out):
    """hook_attn_out in processed weights is centred."""
    return edit(out[0] - out[0].mean(-1, keepdim=True), out[0]), *out[1:]


def reference_value(setup, hugging_face, tokens, intervention, fill) -> float:
    """The root's value in the Hugging Face model with the sites edited, one intervention at a time."""
    root, seen, replacements, handles = intervention.root, {}, {}, []
    for number, d in enumerate(setup.dictionaries):
        site = Site(d.record.layer, d.record.site)
        edited = 2 * site.layer + (site.kind == "mlp") < 2 * root.layer + (root.site == "mlp")

        def edit(x, y, number=number, d=d, edited=edited):
            seen[number] = x
            return edited_by_hand(d, number, intervention, fill, x, y) if edited else y

        if d.record.hook_in.endswith("hook_attn_out"):
            attention = hugging_face.model.transformer.h[site.layer].attn
            handles.append(attention.register_forward_hook(partial(after_attention, edit)))
        else:
            replacements[site] = edit
    with torch.no_grad(), hugging_face.replaced(replacements):
        logits = hugging_face.logits(torch.tensor([tokens]))[0, root.position]
    for handle in handles:
        handle.remove()
    if root.site == "logit":
        return float(logits[root.index] - (logits.mean() if root.versus is None else logits[root.versus]))
    number = 2 * root.layer + (root.site == "mlp")
    return float(setup.dictionaries[number].activations(seen[number][0])[root.position, root.index])


def test_interventions_are_what_hooks_on_hugging_faces_model_do(directory, setup, replacement):
    tokens = replacement.trace.tokens.tolist()
    by = ablation(setup, "mean")
    interventions = random_interventions(setup, replacement)
    found = root_values(setup, tokens, interventions, by)
    hugging_face = SiteModel(GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64))
    clean = root_table(from_the_top({i.root: None for i in interventions}), replacement).value
    moved = 0
    for intervention, value in zip(interventions, found.tolist(), strict=True):
        want = reference_value(setup, hugging_face, tokens, intervention, by.fill)
        assert value == pytest.approx(want, rel=1e-6, abs=1e-6), intervention.root
        moved += float((clean - value).abs().min()) > 1e-3
    assert moved > len(interventions) // 2


def test_a_mean_that_is_the_value_changes_nothing(setup, replacement):
    """At one position every feature is set to what it is there."""
    tokens, t = replacement.trace.tokens.tolist(), 3
    fill, rows = [], []
    for number, d in enumerate(setup.dictionaries):
        site = replacement.site(d.record.layer, d.record.site)
        value = torch.zeros(1, d.record.d_sae, dtype=torch.float64)
        here = site.position == t
        value[0, site.index[here]] = site.value[here]
        fill.append(value)
        rows += [(number, t, i) for i in range(d.record.d_sae)]
    roots = from_the_top(some_roots(replacement))
    interventions = [Intervention(root, as_features(setup, rows), False) for root in roots]
    values = root_values(setup, tokens, interventions, Ablation("mean", tuple(fill)))
    torch.testing.assert_close(values, root_table(roots, replacement).value, rtol=1e-9, atol=1e-9)


def test_without_ablation_the_roots_are_what_they_were(setup, replacement):
    roots = from_the_top(some_roots(replacement))
    nothing = [Intervention(root, as_features(setup, []), False) for root in roots]
    values = root_values(setup, replacement.trace.tokens.tolist(), nothing, ablation(setup, "zero"))
    torch.testing.assert_close(values, root_table(roots, replacement).value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_a_batch_gives_what_one_by_one_gives(setup, replacement, kind, monkeypatch):
    tokens = replacement.trace.tokens.tolist()
    by = ablation(setup, kind, [setup.model.tokens(OTHER)])
    interventions = random_interventions(setup, replacement)[::3]
    together = root_values(setup, tokens, interventions, by)
    alone = torch.cat([root_values(setup, tokens, [intervention], by) for intervention in interventions])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(faithfulness, "CELLS", 64)
    monkeypatch.setattr(faithfulness, "BATCH", 24)
    torch.testing.assert_close(root_values(setup, tokens, interventions, by), together, rtol=1e-9, atol=1e-9)


def test_resampling_takes_whole_tokens_of_the_other_text(setup, replacement):
    tokens = setup.model.tokens(OTHER)
    by = ablation(setup, "resample", [tokens])
    other = setup.replace(tokens)
    for d, fill in zip(setup.dictionaries, by.fill, strict=True):
        site = other.site(d.record.layer, d.record.site)
        want = torch.zeros(len(tokens), d.record.d_sae, dtype=torch.float64)
        want[site.position, site.index] = site.value
        assert len(fill) == len(tokens) - 1
        assert all((want[1:] - row).abs().amax(1).min() < 1e-9 for row in fill)


def test_baselines_are_of_the_circuits_size(setup, replacement, monkeypatch):
    """Random sets site by site, the strongest in all; only what fires and can reach the root."""
    request = CircuitRequest("relative", 0.03, parse_root("default", setup.model, setup.dictionaries))
    record = prompt_record(Prompt(TEXT, "test"), "p", setup.model, "r", replacement, [request])
    asked = []

    def remember(setup, tokens, interventions, by):
        asked.extend(interventions)
        return torch.zeros(len(interventions), dtype=torch.float64)

    monkeypatch.setattr(faithfulness, "root_values", remember)
    measured(setup, replacement, record, ablation(setup, "mean"))
    lots = [asked[i : i + 2 * (2 + DRAWS)] for i in range(0, len(asked), 2 * (2 + DRAWS))]
    assert len(lots) == len(record.circuits)
    assert max(len(lot[0].features) for lot in lots) > 10
    fires = {
        (number, *at)
        for number, d in enumerate(setup.dictionaries)
        for site in [replacement.site(d.record.layer, d.record.site)]
        for at in zip(site.position.tolist(), site.index.tolist(), strict=True)
    }
    for circuit, lot in zip(record.circuits, lots, strict=True):
        nodes = [record.nodes[i] for i in circuit.members.tolist() if i != circuit.root]
        own = {(n.layer, n.site, n.position, n.index) for n in nodes if n.index is not None and n.position > 0}
        sets = [{tuple(row) for row in i.features.tolist()} for i in lot]
        records = [d.record for d in setup.dictionaries]
        assert {(records[s].layer, records[s].site, t, i) for s, t, i in sets[0]} == own
        assert [i.outside for i in lot] == [True, False] * (2 + DRAWS)
        for n, chosen in enumerate(sets):
            assert len(chosen) == len(own)
            assert chosen <= fires
            assert all(0 < t <= lot[0].root.position for _, t, _ in chosen)
            if n >= 4:
                assert sorted(s for s, _, _ in chosen) == sorted(s for s, _, _ in sets[0])


@pytest.mark.parametrize("circuit", ["p/4/2/mlp/17/relative", "p/4/0/attn/3/paper"])
def test_roots_are_read_from_ids(circuit):
    _, position, layer, site, index, _ = circuit.split("/")
    assert root_of(circuit) == Root(site, int(layer), int(position), int(index))


def test_logit_roots_are_read_from_ids():
    assert root_of("p/4/logit/12/relative") == Root("logit", -1, 4, 12)
    assert root_of("p/4/logit/12-7/relative") == Root("logit", -1, 4, 12, 7)


# A circuit that is known


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Setup:
    """The planted model; its dictionaries without bias, so that nothing is left over, and with means of zero."""
    setup = set_up(str(write_planted(tmp_path_factory.mktemp("planted") / "planted")), torch.float64)
    exact = [
        replace(d, b_enc=torch.zeros_like(d.b_enc) if d.record.site == "attn" else d.b_enc, mean=0 * d.b_enc)
        for d in setup.dictionaries
    ]
    return replace(setup, dictionaries=exact)


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_faithfulness_of_the_planted_circuit_is_1_and_of_its_complement_0(planted, kind):
    text = "CADBE"
    d, t = LETTERS.index("D"), len(text)
    replacement = planted.replace(planted.model.tokens(text))
    own = as_features(planted, [(0, t - 1, d + 1)])
    active = faithfulness._active(planted, replacement)
    complement = active[~(active == own[0]).all(1)]
    root = f"p/{t}/1/attn/{d + 1}/relative"
    claims = [Claim(root, root_of(root), own), Claim(root, root_of(root), complement)]
    circuit, rest = measure(planted, replacement, claims, ablation(planted, kind))
    assert circuit.faithfulness == pytest.approx(1, abs=1e-6)
    assert circuit.necessity == pytest.approx(1, abs=1e-6)
    assert rest.faithfulness == pytest.approx(0, abs=1e-6)
    assert rest.necessity == pytest.approx(0, abs=1e-6)
    assert circuit.top_faithfulness == pytest.approx(1, abs=1e-6)


def test_the_circuit_that_the_sweep_finds_is_the_planted_one(planted):
    text = "CADBE"
    request = CircuitRequest("relative", 0.05, parse_root("logits", planted.model, planted.dictionaries))
    replacement = planted.replace(planted.model.tokens(text))
    record = prompt_record(Prompt(text, "test"), "p", planted.model, "r", replacement, [request])
    shares = measured(planted, replacement, record, ablation(planted, "mean")).circuits[0].shares
    # Not exactly 1: the other features shrink by the last layer norm, and what the SAEs cannot write stays.
    assert shares.faithfulness > 1
    assert shares.necessity > 0.8
    assert shares.random_faithfulness < 0.8


# In the store


@pytest.fixture(scope="module")
def stored_setup(tmp_path_factory) -> Setup:
    return set_up(str(write_random(tmp_path_factory.mktemp("model") / "little", "topk", "attn.hook_z", "jumprelu")))


def ingest(store: Store, setup: Setup, by: Ablation | None, texts=(TEXT, OTHER), rule="relative", threshold=0.05):
    def complain(sentence: str) -> None:
        raise AssertionError(sentence)

    tasks = prepare_tasks(setup, [Prompt(text, "test") for text in texts], False, complain)
    requests = circuit_requests(setup, ["default"], rule, threshold)
    run(store, setup, tasks, requests, complain, lambda summary: None, by=by)
    return [task.id for task in tasks]


def shares_in(store: Store, prompts) -> dict[str, SharesRecord]:
    return {id: found for prompt in prompts for id, (_, found) in stored_shares(store, prompt).items()}


def test_measured_while_ingesting_or_later_is_the_same(store, stored_setup):
    by = ablation(stored_setup, "mean")
    prompts = ingest(store, stored_setup, by)
    while_ingesting = shares_in(store, prompts)
    assert len(while_ingesting) == 22
    store.write(lambda transaction: transaction.run("MATCH (n) WHERE NOT n:Schema DETACH DELETE n").consume())
    ingest(store, stored_setup, None)
    assert shares_in(store, prompts) == {}
    done = measure_stored(store, stored_setup, "mean", [], print, lambda state: None)
    assert (done.prompts, done.circuits, done.changed) == (2, 22, 0)
    later = shares_in(store, prompts)
    assert later.keys() == while_ingesting.keys()
    for id, found in later.items():
        assert list(vars(found).values())[1:] == pytest.approx(list(vars(while_ingesting[id]).values())[1:], abs=1e-4)
    assert measure_stored(store, stored_setup, "mean", [], print, lambda state: None).prompts == 0


def test_replacing_a_prompt_loses_no_shares(embedded_store, stored_setup):
    prompts = ingest(embedded_store, stored_setup, ablation(stored_setup, "mean"), [TEXT])
    before = shares_in(embedded_store, prompts)
    ingest(embedded_store, stored_setup, None, [TEXT], "top_mass", 0.5)
    assert shares_in(embedded_store, prompts) == before
    rules = embedded_store.read("MATCH (c:Circuit) WHERE c.faithfulness IS NULL RETURN DISTINCT c.rule AS rule")
    assert rules["rule"].tolist() == ["top_mass"]
    measure_stored(embedded_store, stored_setup, "mean", [], print, lambda state: None)
    assert len(shares_in(embedded_store, prompts)) == 22
    ingest(embedded_store, stored_setup, None, [TEXT], "relative", 0.2)
    assert len(shares_in(embedded_store, prompts)) == 11, "another threshold is another circuit"


def test_shares_are_not_written_to_a_circuit_that_changed_meanwhile(embedded_store, stored_setup):
    (prompt,) = ingest(embedded_store, stored_setup, None, [TEXT])
    found = circuits_without_shares(embedded_store, prompt, "mean")
    assert len(found) == 11
    ingest(embedded_store, stored_setup, None, [TEXT], threshold=0.2)
    shares = SharesRecord("mean", *[0.5] * 6)
    assert write_shares(embedded_store, dict.fromkeys(found, shares)) == 0
    assert shares_in(embedded_store, [prompt]) == {}


def test_only_named_circuits_and_other_ablations(embedded_store, stored_setup):
    (prompt,) = ingest(embedded_store, stored_setup, None, [TEXT])
    named = circuits_without_shares(embedded_store, prompt, "mean")[0].id
    measure_stored(embedded_store, stored_setup, "zero", [named], print, lambda state: None)
    assert {id: s.ablation for id, s in shares_in(embedded_store, [prompt]).items()} == {named: "zero"}
    measure_stored(embedded_store, stored_setup, "resample", [], print, lambda state: None)
    assert {s.ablation for s in shares_in(embedded_store, [prompt]).values()} == {"resample"}


def test_what_cannot_be_measured_is_said(embedded_store, stored_setup):
    (prompt,) = ingest(embedded_store, stored_setup, None, [TEXT])
    circuit = circuits_without_shares(embedded_store, prompt, "mean")[0].id

    def measure_again(setup, kind="mean", circuits=()):
        return measure_stored(embedded_store, setup, kind, circuits, print, lambda state: None)

    with pytest.raises(AtlasError, match="There is no circuit nothing"):
        measure_again(stored_setup, circuits=["nothing"])
    with pytest.raises(AtlasError, match="no ablation 'median'"):
        measure_again(stored_setup, "median")
    other = replace(stored_setup, record=replace(stored_setup.record, id="other"))
    with pytest.raises(AtlasError, match="another model or other dictionaries"):
        measure_again(other, circuits=[circuit])
    said: list[str] = []
    done = measure_stored(embedded_store, other, "mean", [], said.append, lambda state: None)
    assert (done.prompts, said) == (0, ["1 prompts were traced with another model or other dictionaries"])
    bare = replace(stored_setup, dictionaries=[replace(d, mean=None) for d in stored_setup.dictionaries])
    with pytest.raises(AtlasError, match="atlas dictionaries means"):
        measure_again(bare)
    assert shares_in(embedded_store, [prompt]) == {}


def test_resampling_needs_text(stored_setup):
    with pytest.raises(AtlasError, match="needs other prompts"):
        ablation(stored_setup, "resample")
