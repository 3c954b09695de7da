"""The scan of a corpus against exact encodings window by window, and `atlas wild` as a user runs it."""

import lzma
import time
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner

from atlas.cli import atlas as command
from atlas.errors import AtlasError
from atlas.store import connect
from atlas.verify import verify
from ingest import scan as scanning
from ingest.corpus import BEGINNING, blocks, text_files
from ingest.firings import firings, spans
from ingest.scan import Finds, Scanner
from ingest.setup import set_up
from ingest.wild import picks, scan, tasks
from tests.graph import span_rows
from tests.ingest.test_planted import LETTERS, N_CTX, write_planted


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_planted(tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="module")
def setup(directory):
    return set_up(str(directory))


@pytest.fixture(autouse=True)
def few_letters(monkeypatch):
    """With ten letters every feature is frequent."""
    monkeypatch.setattr(scanning, "DENSE", 1.0)


@pytest.fixture
def corpus(tmp_path):
    """Two files of letters at random, the second compressed, in which DDE stands often."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    texts = ["".join("DDE" if rng.uniform() < 0.1 else rng.choice(list(LETTERS)) for _ in range(400)) for _ in "ab"]
    (folder / "a.txt").write_text(texts[0], encoding="utf-8")
    (folder / "b.txt.xz").write_bytes(lzma.compress(texts[1].encode()))
    (folder / "notes.md").write_text("not text", encoding="utf-8")
    return folder


def no_complaint(sentence):
    raise AssertionError(sentence)


def windows_of(corpus, setup, place=BEGINNING, complain=no_complaint):
    return np.concatenate([found for _, found in blocks(text_files(corpus), setup.model, place, complain)])


def scanned(corpus, setup, path, until=float("inf")):
    scanner = Scanner(setup)
    return scanner, scan(scanner, text_files(corpus), path, until, no_complaint, lambda n, file: None)


def equal(one, other):
    assert one.n_tokens == other.n_tokens
    assert (one.firings == other.firings).all()
    for name, column in one.finds.columns.items():
        np.testing.assert_array_equal(column, other.finds.columns[name])
    assert {n: t.tolist() for n, t in one.tokens.items()} == {n: t.tolist() for n, t in other.tokens.items()}


def test_windows_are_the_files_in_order(corpus, setup):
    found = windows_of(corpus, setup)
    texts = [(corpus / "a.txt").read_text(), lzma.decompress((corpus / "b.txt.xz").read_bytes()).decode()]
    expected = [text[i : i + N_CTX - 1] for text in texts for i in range(0, len(text) - N_CTX + 2, N_CTX - 1)]
    assert [setup.model.text(row[1:].tolist()).replace(" ", "") for row in found] == expected
    assert (found[:, 0] == setup.model.bos).all()


def test_the_scan_counts_what_exact_encoding_finds(corpus, setup, tmp_path):
    scanner, counted = scanned(corpus, setup, tmp_path / "scan.npz")
    windows = windows_of(corpus, setup)
    fired, shown = Counter(), Counter()
    for row in windows:
        replacement = setup.replace(row.tolist())
        for site in (*replacement.attn, *replacement.mlp):
            after = site.position > 0
            fired.update((site.dictionary.record.id, i) for i in site.index[after].tolist())
        phrases = set()
        fires = firings(replacement)
        for span in span_rows(fires, spans(fires, row.tolist(), setup.model)):
            dictionary, _, index = span.feature.rpartition("/")
            if span.end - span.start < 8 and dictionary.endswith("1/attn") and index != "0":
                # no letter of the second layer is due to a token alone after BOS: all is carried
                phrases.add((int(index), span.text))
        shown.update(phrases)
    assert counted.firings.sum() > 1000
    for number, n in enumerate(counted.firings.tolist()):
        dictionary, index = scanner.feature(number)
        assert n == fired[dictionary.record.id, index]
    assert counted.n_tokens == windows[:, 1:].size
    columns = counted.finds.columns
    ours = {}
    for row in range(len(counted.finds)):
        dictionary, index = scanner.feature(int(columns["feature"][row]))
        if dictionary.record.id.endswith("1/attn"):
            tokens, start = counted.tokens[int(columns["window"][row])], int(columns["start"][row])
            text = setup.model.text(tokens[start : start + int(columns["length"][row])].tolist())
            ours[index, text] = int(columns["windows"][row])
            assert columns["carried"][row] == pytest.approx(columns["windows"][row])
    assert ours == dict(shown)
    assert len(ours) > 5


def test_a_scan_that_was_stopped_goes_on(corpus, setup, tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.corpus.LINES", 1)
    for name in ("a.txt", "b.txt"):
        text = lzma.decompress((corpus / "b.txt.xz").read_bytes()).decode()
        (corpus / name).write_text("\n".join(text[i : i + 37] for i in range(0, 400, 37)), encoding="utf-8")
    _, whole = scanned(corpus, setup, tmp_path / "whole.npz")
    counted = None
    for _ in range(100):  # every call scans one block and is out of time
        _, counted = scanned(corpus, setup, tmp_path / "parts.npz", until=time.monotonic())
        if counted.n_tokens == whole.n_tokens:
            break
    equal(counted, whole)
    before = (tmp_path / "parts.npz").read_bytes()
    _, again = scanned(corpus, setup, tmp_path / "parts.npz")
    equal(again, whole)
    assert (tmp_path / "whole.npz").exists()
    assert not (tmp_path / "parts.npz.part").exists()
    assert len(before) > 0


def test_an_interrupted_scan_keeps_whole_blocks(corpus, setup, tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.corpus.LINES", 1)
    (corpus / "a.txt").write_text("\n".join(["CDDEA" * 9] * 6), encoding="utf-8")
    _, whole = scanned(corpus, setup, tmp_path / "whole.npz")
    scanner = Scanner(setup)
    add, calls = scanner.add, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(*given)

    scanner.add = interrupted
    path = tmp_path / "parts.npz"
    with pytest.raises(KeyboardInterrupt):
        scan(scanner, text_files(corpus), path, float("inf"), no_complaint, lambda n, file: None)
    _, rest = scanned(corpus, setup, path)
    equal(rest, whole)


def test_a_common_feature_does_not_win():
    """Features 0 and 1 on the same phrase in as many windows; the first fires on nearly all tokens."""
    ones = np.ones(2)
    columns = {"feature": [0, 1], "length": [2, 2], "windows": [50, 5], "carried": [50, 5]}
    finds = Finds(Finds.none().columns | {name: np.array(column) for name, column in columns.items()} | {"key": ones})
    rare, everywhere = 0.001, 0.99
    scores = finds.scores(np.array([everywhere, rare]))
    assert scores[1] > 100 * scores[0]
    assert finds.scores(np.array([1.0, 1.0])).tolist() == [0, 0]


def test_the_prompts_show_what_was_found(corpus, setup, tmp_path):
    scanner, counted = scanned(corpus, setup, tmp_path / "scan.npz")
    chosen = list(picks(scanner, counted, 2))
    assert chosen
    assert max(Counter(pick.name for pick in chosen).values()) <= 2
    assert all(pick.n_windows >= 2 for pick in chosen)
    for task in tasks(scanner, iter(chosen), 5, "corpus"):
        replacement = setup.replace(task.tokens)
        for request in task.requests:
            site = replacement.site(request.root.layer, request.root.kind)
            assert site.find(request.root.position, request.root.index) is not None
        assert task.prompt.fields["phrase"] in task.prompt.text


def wild(directory, corpus, store, *more):
    given = ["wild", str(corpus), "--model", str(directory), "--store", str(store), *more]
    return CliRunner().invoke(command, given)


def test_atlas_wild_ingests_and_does_not_do_it_twice(directory, corpus, tmp_path):
    first = wild(directory, corpus, tmp_path / "store", "--prompts", "4")
    assert first.exit_code == 0, first.output
    assert "4 prompts with" in first.output
    assert len(list(tmp_path.glob("store.wild-*.npz"))) == 1
    again = wild(directory, corpus, tmp_path / "store", "--prompts", "4")
    assert "0 prompts with 0 circuits written, 4 already stored" in again.output
    with connect(tmp_path / "store") as store:
        tasks = store.read("MATCH (p:Prompt) RETURN p.task AS task, p.source AS source")
        assert tasks.to_numpy().tolist() == [["wild", "corpus"]] * 4
        assert [check.name for check in verify(store) if check.violations] == []


@pytest.mark.parametrize(
    ("given", "status", "sentence"),
    [
        (("--prompts", "0"), 2, "0 is not in the range x>=1"),
        (("--prompts", "-3"), 2, "-3 is not in the range x>=1"),
        (("--seconds", "0"), 1, "--seconds 0.0 is no time to stop in"),
        (("--seconds", "-1"), 1, "--seconds -1.0 is no time to stop in"),
        (("--seconds", "nan"), 1, "--seconds nan is no time to stop in"),
        (("--seconds", "inf"), 1, "--seconds inf is no time to stop in"),
    ],
)
def test_numbers_that_cannot_be_are_refused_at_once(corpus, tmp_path, given, status, sentence):
    found = wild("no/such/model", corpus, tmp_path / "store", *given)
    assert found.exit_code == status, "an AtlasError is 1 here, and 2 through main"
    assert sentence in found.output + str(found.exception)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none", None, "There is no "),
        ("empty", {}, "There is no text"),
        ("markdown", {"a.md": b"text"}, "There is no text"),
        ("nothing", {"a.txt": b""}, "There is no text"),
        ("short", {"a.txt": b"CDD"}, "less text than one window"),
    ],
)
def test_a_corpus_without_text(directory, tmp_path, name, content, sentence):
    folder = tmp_path / name
    if content is not None:
        folder.mkdir()
        for file, data in content.items():
            (folder / file).write_bytes(data)
    found = wild(directory, folder, tmp_path / "store")
    assert isinstance(found.exception, AtlasError)
    assert sentence in str(found.exception)


def test_undecodable_bytes_leave_the_rest(directory, corpus, tmp_path):
    (corpus / "0.txt").write_bytes(b"CDDEA\n" * 20 + b"\xff\xfe")
    found = wild(directory, corpus, tmp_path / "store", "--prompts", "2")
    assert isinstance(found.exception, AtlasError)
    assert "1 part left out" in str(found.exception)
    assert "is not UTF-8" in found.output
    assert "2 prompts with" in found.output


def test_lengths_and_damaged_checkpoints(directory, setup, corpus, tmp_path):
    found = wild(directory, corpus, tmp_path / "store", "--length", "12")
    assert "span of 12 tokens cannot be looked for" in str(found.exception)
    path = tmp_path / "scan.npz"
    path.write_bytes(b"PK no")
    with pytest.raises(AtlasError, match="cannot be read; delete the file"):
        scanned(corpus, setup, path)
    assert path.read_bytes() == b"PK no"
