"""Models and dictionaries by name, from a hub on this machine that holds them as they are published."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from click.testing import CliRunner

from atlas.errors import AtlasError
from atlas.labels import PAGE, SOURCES, import_labels
from atlas.store import Store
from atlas.verify import verify
from ingest.dictionaries import load_dictionary
from ingest.dictionary_commands import dictionaries as commands
from ingest.hub import fetch, sha256
from ingest.job import circuit_requests, prepare_tasks, run
from ingest.model import load_model
from ingest.prompts import Prompt
from ingest.registry import (
    CONVENTIONS,
    DEFAULTS,
    MODELS,
    SETS,
    convention,
    parse_layers,
    published_model,
    published_set,
)
from ingest.setup import Setup, load_with_places, places_for, set_up
from tests.ingest.hub_server import Hub, serving
from tests.ingest.published import COMMITS, write_hub

KK, TRES, V5 = "gpt2-small-hook-z-kk", "pchlenski/gpt2-transcoders", "gpt2-small-attn-out-v5-32k"
TEXT = "Texas is"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The hub, an empty cache, and the tiny model's own sha256 in the table of models."""
    root = write_hub(tmp_path_factory.mktemp("hub"))
    cache = tmp_path_factory.mktemp("cache")
    with serving(root, COMMITS) as hub, pytest.MonkeyPatch.context() as patch:
        constants = huggingface_hub.constants
        patch.setattr(constants, "ENDPOINT", hub.address)
        url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setenv("ATLAS_CACHE", str(cache / "atlas"))
        known = sha256(root / MODELS["gpt2"].repository / "model.safetensors")
        patch.setattr("ingest.registry.MODELS", {**MODELS, "gpt2": replace(MODELS["gpt2"], sha256=known)})
        yield hub


@pytest.fixture(scope="module")
def gpt2(hub: Hub) -> Setup:
    return set_up("gpt2")


def test_gpt2_comes_with_its_default_sets(gpt2: Setup, hub: Hub) -> None:
    record = gpt2.model.record
    assert (record.id, record.n_layers, record.revision) == ("gpt2", 12, MODELS["gpt2"].revision)
    assert record.weight_processing == "fold_ln,center_writing_weights,center_unembed,fold_value_biases"
    found = gpt2.record.dictionaries
    assert len(found) == 24
    assert {(d.source, d.revision) for d in found} == {
        (SETS[KK].repository, "c" * 40),
        (SETS[TRES].repository, SETS[TRES].revision),
    }
    assert [d.id for d in found[10:12]] == ["gpt2/5/attn/att-kk", "gpt2/5/mlp/tres-dc"]
    assert (found[10].hook_in, found[11].hook_in) == ("blocks.5.attn.hook_z", "blocks.5.ln2.hook_normalized")
    asked = len(hub.asked)
    assert set_up("gpt2", layers=frozenset({5})).record.dictionaries == found[10:12]
    pinned = [path for method, path, _ in hub.asked[asked:] if COMMITS[TRES] in path or "openai" in path]
    assert pinned == [], "what is pinned and in the cache is not asked for again"


def test_prompts_are_stored_and_labelled(embedded_store: Store, hub: Hub, tmp_path: Path) -> None:
    """In layers without dictionaries attention is open and the MLP is error, and nothing is lost."""
    setup = set_up("gpt2", torch.float64, layers=frozenset({4, 5}))
    assert [d.id for d in setup.record.dictionaries] == [
        "gpt2/4/attn/att-kk", "gpt2/4/mlp/tres-dc", "gpt2/5/attn/att-kk", "gpt2/5/mlp/tres-dc",
    ]  # fmt: skip
    replacement = setup.replace(setup.model.tokens(TEXT))
    assert torch.equal(replacement.mlp[2].error, replacement.trace.mlp_out[2])
    assert setup.record.open_attention == (0, 1, 2, 3, 6, 7, 8, 9, 10, 11)
    assert not replacement.attn[9].error.any()
    tasks = prepare_tasks(setup, [Prompt(TEXT, "test")], False, pytest.fail)
    requests = circuit_requests(setup, ["default"], "relative", 0.1)
    run(embedded_store, setup, tasks, requests, pytest.fail, lambda summary: None)
    assert [check.name for check in verify(embedded_store) if check.violations] == []
    layers = embedded_store.read("MATCH (a:Activation) RETURN DISTINCT a.layer AS layer ORDER BY layer")["layer"]
    assert layers.tolist() == [4, 5]
    moved = embedded_store.read("MATCH (u)-[:DIRECT]->(v) WHERE u.position < v.position RETURN count(*) AS n")["n"][0]
    assert moved > 0, "some edges run through open attention"
    feature = embedded_store.read(
        "MATCH (f:Feature)-[:IN]->(d:Dictionary {id: 'gpt2/5/mlp/tres-dc'}) RETURN f.id AS id, f.index AS i LIMIT 1"
    ).iloc[0]
    file = tmp_path / "labels.jsonl"
    rows = [
        {"modelId": "gpt2-small", "layer": f"5-{name}", "index": str(feature["i"]), "description": name}
        for name in ("tres-dc", "att-kk", "att_32k-oai")
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    import_labels(embedded_store, [file], pytest.fail)
    labels = embedded_store.read("MATCH (f:Feature) WHERE f.label IS NOT NULL RETURN f.id AS id, f.label AS label")
    found = dict(zip(labels["id"], labels["label"], strict=True))
    assert found[feature["id"]] == "tres-dc"
    assert len(found) == 3, "each label has a feature of its own"
    for spec in ("2/mlp/1", "gpt2/5/mlp/att-kk/1"):
        with pytest.raises(AtlasError, match="this run has"):
            circuit_requests(setup, [spec], "relative", 0.1)
    assert circuit_requests(setup, ["gpt2/5/mlp/tres-dc/1"], "relative", 0.1)[0].root.index == 1


def test_another_number_of_layers_is_another_replacement_model(hub: Hub, gpt2: Setup) -> None:
    part = set_up("gpt2", layers=frozenset({5}))
    assert part.record.id != gpt2.record.id


def test_top_k_with_a_layer_norm_encodes_as_saelens_does(hub: Hub) -> None:
    from sae_lens import SAE

    assert set_up("gpt2", dictionaries=[V5], layers=frozenset({5})).dictionaries[10].layer_norm
    model, (place,) = load_with_places("gpt2", dictionaries=[V5], layers=frozenset({5}))
    assert model.record.weight_processing == "fold_ln"
    dictionary = load_dictionary(place.folder, model, place.origin)
    assert dictionary.record.id == "gpt2/5/attn/att_32k-oai"
    assert (dictionary.k, dictionary.record.activation) == (4, "topk")
    sae = SAE.load_from_disk(place.folder)
    x = 3 + 2 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dictionary.activations(x), sae.encode(x))
    torch.testing.assert_close(dictionary.reconstruct(x), sae(x))


def test_conventions_are_not_mixed(hub: Hub) -> None:
    with pytest.raises(
        AtlasError, match=r"different weights of the model cannot be mixed: .* on raw and .* on processed"
    ):
        set_up("gpt2", dictionaries=[V5, TRES])
    (place,) = places_for("gpt2", [KK], frozenset({3}))
    with pytest.raises(AtlasError, match="trained on processed weights, but model gpt2 was loaded with fold_ln"):
        load_dictionary(place.folder, load_model("gpt2", weights="raw"), place.origin)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["gpt2-small-res-jb"], "reads blocks.0.hook_resid_pre"),
        (["gemma-scope-2b-pt-att"], "form of its own"),
        (["nothing"], "no dictionaries 'nothing'"),
        ([f"{TRES}@" + "0" * 40], "has no revision 0000"),
    ],
)
def test_sets_that_cannot_be_used(hub: Hub, given: list[str], sentence: str) -> None:
    with pytest.raises(AtlasError, match=sentence):
        places_for("gpt2", given, None)


def test_sets_of_another_model_and_layers_that_are_not(hub: Hub) -> None:
    with pytest.raises(AtlasError, match="is for model gpt2, not distilgpt2"):
        places_for("distilgpt2", [KK], None)
    with pytest.raises(AtlasError, match="no dictionary for the layers asked for; it has layers 0, 1"):
        places_for("gpt2", [KK], frozenset({12}))
    with pytest.raises(AtlasError, match=r"Model 'distilgpt2' has no dictionaries.*gpt2-small-hook-z-kk"):
        places_for("distilgpt2", [], None)


def test_a_download_that_broke_off_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    content = torch.randint(256, (300_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    folder = hub.root / SETS[V5].repository
    (folder / "large.bin").write_bytes(bytes(content.tolist()))
    hub.cut["large.bin"] = 100_000
    (path,) = fetch(SETS[V5].repository, "main", ["large.bin"])
    assert path.read_bytes() == bytes(content.tolist())
    ranges = [asked for method, file, asked in hub.asked if method == "GET" and file.endswith("large.bin")]
    assert ranges[0] is None
    assert ranges[-1] is not None
    assert 0 < int(ranges[-1].removeprefix("bytes=").rstrip("-")) <= 100_000


def test_a_wrong_checksum_is_refused(hub: Hub) -> None:
    folder = hub.root / SETS[V5].repository
    (folder / "altered.bin").write_bytes(bytes(100_000))
    hub.altered.add("altered.bin")
    with pytest.raises(AtlasError, match=r"altered.bin is not what was published: its sha256 is .* Remove .*blobs"):
        fetch(SETS[V5].repository, "main", ["altered.bin"])
    with pytest.raises(AtlasError, match="is not what was published"):
        fetch(MODELS["gpt2"].repository, "main", ["config.json"], {"config.json": "0" * 64})


def test_what_is_not_there_is_named_with_where_to_put_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AtlasError, match=r"has no file none\.pt at revision"):
        fetch(TRES, COMMITS[TRES], ["none.pt"])
    with pytest.raises(AtlasError, match=r"The hub has no x/y"):
        load_model("x/y")
    with pytest.raises(AtlasError, match="no such directory, and no repository"):
        load_model("a model?")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AtlasError) as caught:
        load_model("gpt2-medium")
    sentence = str(caught.value)
    assert "config.json of openai-community/gpt2-medium" in sentence
    assert "HF_HUB_OFFLINE is set" in sentence
    assert "hf download openai-community/gpt2-medium config.json model.safetensors tokenizer.json" in sentence
    assert f"to {huggingface_hub.constants.HF_HUB_CACHE}/models--openai-community--gpt2-medium here" in sentence
    with pytest.raises(AtlasError, match=f"run `hf download {SETS[KK].repository} --revision 0000`, then copy"):
        places_for("gpt2", [f"{KK}@0000"], None)
    assert set_up("gpt2", layers=frozenset({5})).model.record.id == "gpt2", "what is in the cache needs no network"


def test_the_set_is_measured_once_and_the_figures_stay(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris, said Mary to John. " * 20)
    args = [
        "measure",
        str(tmp_path / "text.txt"),
        "--model",
        "gpt2",
        "--layers",
        "6",
        "--store",
        str(tmp_path / "none"),
    ]
    done = CliRunner().invoke(commands, args)
    assert done.exit_code == 0, done.output
    assert "gpt2/6/attn/att-kk" in done.stdout
    assert "bad: explained variance" in done.stdout, "random dictionaries are bad"
    assert "No store was touched" in done.stderr
    first, second = set_up("gpt2", layers=frozenset({6})).record.dictionaries
    assert first.measured_on == second.measured_on
    assert first.measured_on.startswith("text.txt, ")
    assert first.explained_variance < 0.5
    assert first.l0 > 0


def test_the_tables_agree() -> None:
    for entry in SETS.values():
        template, site = SOURCES["gpt2-small", entry.source]
        assert (site, template.format(layer=5)) == (entry.site, f"{entry.model}/5/{entry.site}/{entry.source}")
        assert entry.weights in CONVENTIONS
        assert sorted(entry.files) == list(range(12))
    assert all(name in SETS for names in DEFAULTS.values() for name in names)
    assert "{layer}-{source}" in PAGE


def test_saelens_table_says_the_same() -> None:
    """Names and files of the sets that SAELens knows are those of its own table."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    for name in (KK, V5):
        theirs, ours = get_pretrained_saes_directory()[name], SETS[name]
        assert theirs.repo_id == ours.repository
        for layer, (id, path) in enumerate(theirs.saes_map.items()):
            assert ours.files[layer][1] in (path, f"{path}/sae_weights.safetensors")
            assert theirs.neuronpedia_id[id] == f"gpt2-small/{layer}-{ours.source}"
    release = published_set("gpt2-small-attn-out-v5-128k")
    assert (release.site, release.weights, release.source, release.model) == ("attn", "raw", "att_128k-oai", "gpt2")
    assert release.files[3] == ("v5_128k_layer_3/cfg.json", "v5_128k_layer_3/sae_weights.safetensors")


def test_names_revisions_layers_and_conventions_are_read() -> None:
    assert published_model("gpt2").repository == MODELS["gpt2"].repository
    assert published_model("gpt2@abc").sha256 is None
    assert published_model("x/y@abc").revision == "abc"
    assert published_set(f"{KK}@abc").revision == "abc"
    assert parse_layers("0-2, 7") == {0, 1, 2, 7}
    for text in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(AtlasError, match="cannot be read"):
            parse_layers(text)
    assert convention("x", {}) == "raw"
    assert convention("x", {"center_writing_weights": True, "device": "cuda"}) == "centred"
    assert convention("x", dict.fromkeys(CONVENTIONS["processed"], True)) == "processed"
    with pytest.raises(AtlasError, match="x was trained on weights with fold_ln"):
        convention("x", {"fold_ln": True})
