"""Labels: from Neuronpedia's exports and tables onto features, on both engines; nothing lost, nothing doubled."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from atlas import labels as module
from atlas.errors import AtlasError
from atlas.labels import import_labels, labels
from atlas.store import Store, connect
from atlas.verify import verify
from atlas.writer import register, write_prompt
from tests.synthetic import synthetic_model, synthetic_prompt, synthetic_run

ASK = (
    "MATCH (f:Feature)-[:IN]->(d:Dictionary) RETURN f.id AS id, f.layer AS layer, f.site AS site, f.index AS index, "
    "f.label AS label, f.labels AS labels, f.label_source AS source, f.url AS url, d.id AS dictionary ORDER BY id"
)


def row(layer: str = "5-tres-dc", index: object = "123", description: object = "dates", **more: Any) -> dict[str, Any]:
    """A row as Neuronpedia exports it."""
    found = {"id": "c1", "modelId": "gpt2-small", "layer": layer, "index": index, "description": description}
    return {**found, "explanationModelName": "gpt-4o-mini", **more}


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def imported(store: Store, *files: Path, source: str | None = None) -> tuple[module.Summary, list[str]]:
    complaints: list[str] = []
    return import_labels(store, files, complaints.append, source), complaints


def stored(store: Store) -> dict[str, tuple[str, list[str]]]:
    found = store.read(ASK)
    return {r["id"]: (r["label"], r["labels"]) for r in found.to_dict("records")}


def test_rows_become_labels_of_features(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(row(), row("7-att-kk", 9, " the word “to” 😀\n", explanationModelName=None)))
    summary, complaints = imported(store, file)
    assert (summary.labels, summary.features, complaints) == (2, 2, [])
    mlp, attn = store.read(ASK).to_dict("records")
    assert mlp == {
        "id": "gpt2/5/mlp/tres-dc/123",
        "layer": 5,
        "site": "mlp",
        "index": 123,
        "label": "dates",
        "labels": ["dates"],
        "source": "gpt-4o-mini",
        "url": "https://www.neuronpedia.org/gpt2-small/5-tres-dc/123",
        "dictionary": "gpt2/5/mlp/tres-dc",
    }
    assert (attn["id"], attn["label"], attn["source"]) == ("gpt2/7/attn/att-kk/9", "the word “to” 😀", "a.jsonl")
    assert attn["url"] == "https://www.neuronpedia.org/gpt2-small/7-att-kk/9"
    assert all(check.violations == 0 for check in verify(store))


def test_the_newest_wins_and_all_are_kept_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_TRANSACTION", 2)
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*(row(index=i % 5, description=f"{i % 5}: {'abca'[i // 5]}") for i in range(20))))
    summary, _ = imported(store, file)
    expected = {f"gpt2/5/mlp/tres-dc/{i}": (f"{i}: a", [f"{i}: b", f"{i}: c", f"{i}: a"]) for i in range(5)}
    assert (summary.labels, summary.features) == (20, 5)
    assert stored(store) == expected
    imported(store, file)
    assert stored(store) == expected
    later = tmp_path / "later.jsonl"
    later.write_bytes(lines(row(index=3, description="newest")))
    imported(store, later)
    assert stored(store)["gpt2/5/mlp/tres-dc/3"] == ("newest", ["3: b", "3: c", "3: a", "newest"])
    assert store.read("MATCH (:Feature)-[e:IN]->(d) RETURN count(e) AS n, count(DISTINCT d) AS d").iloc[0].tolist() == [
        5,
        1,
    ]


def test_features_of_prompts_keep_what_they_are(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = synthetic_model()
    register(store, model, synthetic_run())
    write_prompt(store, synthetic_prompt(1, n_tokens=4, n_active=2), "run-1")
    before = store.read("MATCH (f:Feature) RETURN f.id AS id, COUNT { (f)--() } AS n ORDER BY id")
    feature = store.read("MATCH (f:Feature)-[:IN]->(d) RETURN f.layer AS layer, f.site AS site, f.index AS i").iloc[0]
    source = {"mlp": "tres-dc", "attn": "att-kk"}[feature["site"]]
    monkeypatch.setitem(
        module.SOURCES, ("gpt2-small", source), (f"{model.model.id}/{{layer}}/{feature['site']}", feature["site"])
    )
    store.write(lambda t: t.run("MATCH (f:Feature) SET f.label = 'by hand'").consume())
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(row(f"{feature['layer']}-{source}", int(feature["i"]), "read")))
    imported(store, file)
    after = store.read("MATCH (f:Feature) RETURN f.id AS id, COUNT { (f)--() } AS n ORDER BY id")
    assert after.equals(before)
    assert stored(store)[f"{model.model.id}/{feature['layer']}/{feature['site']}/{feature['i']}"] == (
        "read",
        ["by hand", "read"],
    )
    assert all(check.violations == 0 for check in verify(store))


def test_labels_before_the_dictionary(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = synthetic_model(), synthetic_prompt(1, n_tokens=4, n_active=2)
    name, index = prompt.firings.features[0]
    dictionary = next(d for d in model.dictionaries if d.id == name)
    source = {"mlp": "tres-dc", "attn": "att-kk"}[dictionary.site]
    monkeypatch.setitem(
        module.SOURCES, ("gpt2-small", source), (f"{model.model.id}/{{layer}}/{dictionary.site}", dictionary.site)
    )
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(row(f"{dictionary.layer}-{source}", index, "early")))
    imported(store, file)
    register(store, model, synthetic_run())
    write_prompt(store, prompt, "run-1")
    assert stored(store)[f"{name}/{index}"] == ("early", ["early"])
    assert all(check.violations == 0 for check in verify(store))
    kind = store.read("MATCH (d:Dictionary {id: $id}) RETURN d.kind AS kind", id=dictionary.id)["kind"]
    assert kind.tolist() == [dictionary.kind]


def test_every_form_and_packing(embedded_store: Store, tmp_path: Path) -> None:
    table = (
        'modelId,layer,index,description,explanationModelName\ngpt2-small,2-tres-dc,1,"a ""b"",\nc",gpt-4\n'
    ).encode("utf-8-sig")
    files = {
        "a.jsonl.gz": gzip.compress(lines(row(index=1)) + b"\n  \n" + lines(row(index=2))),
        "b.jsonl.xz": lzma.compress(b"\xef\xbb\xbf" + lines(row(index=3))),
        "c.json": json.dumps([row(index="4"), row(index="5")]).encode(),
        "d.csv": table,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    summary, complaints = imported(embedded_store, *(tmp_path / name for name in files))
    assert (summary.labels, complaints) == (6, [])
    found = stored(embedded_store)
    assert set(found) == {"gpt2/2/mlp/tres-dc/1", *(f"gpt2/5/mlp/tres-dc/{i}" for i in range(1, 6))}
    assert found["gpt2/2/mlp/tres-dc/1"][0] == 'a "b",\nc'


def test_a_table_of_scored_labels(embedded_store: Store, tmp_path: Path) -> None:
    file = tmp_path / "scored.csv"
    file.write_text(
        "layer,feature,recall,fuzz,combined,explanation\n"
        '0,0,0.62,0.55,0.58,"The word ""Everybody""."\n'
        "0,1,N/A,N/A,-1.0,Feature not found.\n"
    )
    summary, complaints = imported(embedded_store, file, source="gpt2-small/tres-dc")
    assert (summary.labels, summary.empty, complaints) == (1, 1, [])
    assert stored(embedded_store) == {"gpt2/0/mlp/tres-dc/0": ('The word "Everybody".', ['The word "Everybody".'])}
    _, complaints = imported(embedded_store, file)
    assert complaints == [f"{file}:{n}: it names no model and source; say --source MODEL/SOURCE" for n in (2, 3)]
    with pytest.raises(AtlasError, match="no source 'gpt2-small/x'; the sources are gpt2-small/tres-dc"):
        imported(embedded_store, file, source="gpt2-small/x")


def test_unknown_sources_are_counted_by_name(embedded_store: Store, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    gemma = [row("12-gemmascope-res-16k", i, modelId="gemma-2-2b") for i in range(3)]
    file.write_bytes(lines(*gemma, row("11-gemmascope-res-16k", modelId="gemma-2-2b"), row("5-res-jb"), row("5")))
    summary, complaints = imported(embedded_store, file)
    assert summary.unknown == {"gemma-2-2b/gemmascope-res-16k": 4, "gpt2-small/res-jb": 1, "gpt2-small/": 1}
    assert (summary.labels, complaints) == (0, [])
    assert embedded_store.read("MATCH (n) WHERE n:Feature OR n:Dictionary RETURN n").empty


BAD = [
    b"{",
    b"\xff",
    b"[" * 100_000,
    b"17",
    lines(row(index=-1)),
    lines(row(index="\uff11")),
    lines(row(index=True)),
    lines(row(index=None)),
    lines(row(index="9" * 30)),
    lines(row(index=1.5)),
    lines(row(description=["a"])),
    lines(row(description="\ud800")),
    lines(row(explanationModelName="\udfff")),
    lines(row(modelId=5)),
    lines({"index": 1, "description": "x"}),
]


def test_bad_lines_are_named_and_the_others_go_on(embedded_store: Store, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = lines(row(index=1))
    file.write_bytes(good + b"".join(line.rstrip(b"\n") + b"\n" for line in BAD) + lines(row(index=2)))
    summary, complaints = imported(embedded_store, file)
    assert summary.labels == 2
    assert [sentence.split(": ")[0] for sentence in complaints] == [f"{file}:{n + 2}" for n in range(len(BAD))]
    assert set(stored(embedded_store)) == {"gpt2/5/mlp/tres-dc/1", "gpt2/5/mlp/tres-dc/2"}


def test_damaged_files_are_read_as_far_as_they_go(embedded_store: Store, tmp_path: Path) -> None:
    content = lines(*(row(index=i, description=f"label {i * 7919}") for i in range(3000)))
    for name, packed in (("a.jsonl.gz", gzip.compress(content)), ("a.jsonl.xz", lzma.compress(content))):
        file = tmp_path / name
        file.write_bytes(packed[: len(packed) * 3 // 4])
        summary, complaints = imported(embedded_store, file)
        assert summary.labels < 3000
        assert len(complaints) == 1
        assert complaints[0].startswith(f"{file} cannot be read on after row {summary.labels} (")
    for name, text in (("b.csv", b"modelId,layer\ngpt2\n\xff\n"), ("c.json", b"[{"), ("d.jsonl.gz", b"hello")):
        (tmp_path / name).write_bytes(text)
        summary, complaints = imported(embedded_store, tmp_path / name)
        assert summary.labels == 0
        assert complaints
        assert all(name in sentence and "\n" not in sentence for sentence in complaints)


def test_the_command(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.jsonl", tmp_path / "store"
    file.write_bytes(lines(row(), row("5-res-jb"), row(description=None)))
    done = CliRunner().invoke(labels, ["import", str(file), "--store", str(folder)])
    assert done.exit_code == 0
    assert done.stdout == f"1 labels of 1 features written. Store: {folder}\n1 rows have no label.\n"
    assert done.stderr == "1 labels of the unknown source gpt2-small/res-jb left out.\n"
    file.write_bytes(b"{\n" + lines(row()))
    done = CliRunner().invoke(labels, ["import", str(file), "--store", str(folder)])
    assert isinstance(done.exception, AtlasError)
    assert str(done.exception) == "1 row was left out, see above."
    assert done.stderr == f"Left out: {file}:1: not JSON in UTF-8.\n"
    with connect(folder) as opened:
        assert stored(opened) == {"gpt2/5/mlp/tres-dc/123": ("dates", ["dates"])}


@pytest.mark.parametrize("given", [["missing.jsonl"], ["labels.txt"], ["a.jsonl", "--source", "gpt2-small/x"]])
def test_nothing_is_made_for_what_cannot_be_imported(tmp_path: Path, given: list[str]) -> None:
    (tmp_path / "labels.txt").write_bytes(lines(row()))
    (tmp_path / "a.jsonl").write_bytes(lines(row()))
    name, *more = given
    done = CliRunner().invoke(labels, ["import", str(tmp_path / name), *more, "--store", str(tmp_path / "store")])
    assert isinstance(done.exception, AtlasError)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["missing.jsonl", "labels.txt", "a.jsonl"])
def test_files_are_checked_before_anything_is_written(embedded_store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "good.jsonl").write_bytes(lines(row()))
    (tmp_path / "labels.txt").write_bytes(lines(row()))
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(AtlasError, match=name):
        imported(embedded_store, tmp_path / "good.jsonl", tmp_path / name)
    assert embedded_store.read("MATCH (f:Feature) RETURN f").empty
