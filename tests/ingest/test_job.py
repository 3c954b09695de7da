"""Ingestion jobs as a user runs them: stored once, resumed after a kill, replaced when more is asked."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from atlas.cli import atlas as group
from atlas.cli import main
from atlas.errors import AtlasError
from atlas.store import Store, connect
from atlas.verify import verify
from atlas.writer import write_prompt
from ingest.faithfulness import ablation
from ingest.job import circuit_requests, prepare_tasks, run
from ingest.prompts import Prompt, read_prompts
from ingest.setup import set_up
from queries.summary import summary
from tests.graph import graph_in, graph_of
from tests.ingest.models import N_CTX, write_random

ATLAS = [sys.executable, "-m", "tests.ingest.atlas_main"]
TEXTS = ["The capital of Texas is", "Mary and John said", "The old house in Paris", "France is the old"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model") / "little", "topk", "attn.hook_z", "jumprelu")


@pytest.fixture(scope="module")
def setup(directory):
    return set_up(str(directory))


def no_complaint(sentence: str) -> None:
    raise AssertionError(sentence)


def ingest(
    store: Store, setup, texts, specs=("default",), rule="relative", threshold=0.05, complain=no_complaint, logits=None
):
    tasks = prepare_tasks(setup, [Prompt(text, "test", task="t") for text in texts], False, complain)
    requests = circuit_requests(setup, specs, rule, threshold, logit_threshold=logits)
    return run(store, setup, tasks, requests, complain, lambda summary: None), tasks, requests


def counts(store: Store) -> dict[str, int]:
    frame = store.read("MATCH (c:Circuit) RETURN c.rule AS rule, count(*) AS n")
    return dict(zip(frame["rule"], frame["n"], strict=True))


def test_what_is_written_is_what_was_computed(store, setup, monkeypatch):
    records = []

    def writing(store, record, run_id):
        records.append(record)
        return write_prompt(store, record, run_id)

    monkeypatch.setattr("ingest.job.write_prompt", writing)
    summary, tasks, _ = ingest(store, setup, TEXTS)
    assert summary.prompts == len(TEXTS) == len(records)
    for task, record in zip(tasks, records, strict=True):
        assert (record.id, len(record.circuits)) == (task.id, 11)
        assert graph_in(store, task.id) == graph_of(record)
    assert [check.name for check in verify(store) if check.violations] == []


def test_only_what_is_written_is_counted(tmp_path, directory, monkeypatch):
    written = []

    def writing(store, record, run_id):
        if len(written) == 2:
            raise OSError("No space left on device")
        write_prompt(store, record, run_id)
        written.append(record)

    monkeypatch.setattr("ingest.job.write_prompt", writing)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    status, printed = atlas("ingest", str(file), "--model", str(directory), "--store", str(tmp_path / "s"))
    assert status == 2
    assert "The store stopped taking prompts: No space left on device" in printed
    assert "2 prompts with 22 circuits and " in printed


def test_a_threshold_of_logits_is_kept_with_the_prompt(store, setup):
    _, (task,), _ = ingest(store, setup, TEXTS[:1], threshold=0.1, logits=0.02)
    find = "MATCH (c:Circuit {prompt: $id})-[:ROOT]->(n) RETURN n:Logit AS logit, c.threshold AS threshold"
    found = store.read(find, id=task.id)
    assert (found["threshold"] == found["logit"].map({True: 0.02, False: 0.1})).all()
    assert set(found["logit"]) == {True, False}
    again, _, _ = ingest(store, setup, TEXTS[:1], threshold=0.1, logits=0.02)
    assert (again.prompts, again.skipped) == (0, 1)
    ingest(store, setup, TEXTS[:1], specs=("features",), rule="paper", threshold=0.0)
    kept = store.read(find.replace("{prompt: $id}", "{prompt: $id, rule: 'relative'}"), id=task.id)
    assert sorted(kept["threshold"]) == sorted(found["threshold"])
    other, _, _ = ingest(store, setup, TEXTS[:1], threshold=0.1)
    assert other.prompts == 1
    assert set(store.read("MATCH (c:Circuit {rule: 'relative'}) RETURN c.threshold AS t")["t"]) == {0.1}


def test_with_open_attention_what_is_stored_is_consistent(embedded_store, tmp_path):
    """Attention in one layer of three has a dictionary: edges of both kinds run through the others."""
    setup = set_up(str(write_random(tmp_path / "little", "relu", "attn.hook_z", "skip", closed=(1,))))
    tasks = prepare_tasks(setup, prompts(TEXTS), False, no_complaint)
    requests = circuit_requests(setup, ("default",), "support", 0.01)
    by = ablation(setup, "mean")
    run(embedded_store, setup, tasks, requests, no_complaint, lambda summary: None, by=by)
    assert [check.name for check in verify(embedded_store) if check.violations] == []
    found = embedded_store.read(
        "MATCH (u:CircuitNode)-[e:DIRECT|OV]->(v) RETURN type(e) AS via, count(*) AS n, "
        "sum(CASE WHEN u.position < v.position THEN 1 ELSE 0 END) AS moved"
    ).set_index("via")
    assert found.loc["OV", "n"] > 0
    assert 0 < found.loc["DIRECT", "moved"] < found.loc["DIRECT", "n"]
    measured = embedded_store.read("MATCH (c:Circuit) RETURN count(*) AS n, count(c.faithfulness) AS measured").iloc[0]
    assert measured["measured"] == measured["n"] == 11 * len(TEXTS)


def test_the_same_again_writes_nothing(store, setup):
    ingest(store, setup, TEXTS[:2])
    before = [graph_in(store, task.id) for task in prepare_tasks(setup, prompts(TEXTS[:2]), False, no_complaint)]
    summary, tasks, _ = ingest(store, setup, TEXTS[:2])
    assert (summary.prompts, summary.skipped) == (0, 2)
    assert [graph_in(store, task.id) for task in tasks] == before


def test_a_prompts_task_is_the_last_that_it_was_given_with(store, setup):
    def stored(*given, threshold=0.05):
        tasks = prepare_tasks(setup, [Prompt(TEXTS[0], "test", task=task) for task in given], False, no_complaint)
        requests = circuit_requests(setup, ["default"], "relative", threshold)
        run(store, setup, tasks, requests, no_complaint, lambda summary: None)
        return store.read("MATCH (p:Prompt) RETURN p.task AS task")["task"].tolist()

    assert stored(None) == [None]
    assert stored("capitals", "states") == ["states"]
    assert stored("capitals") == ["capitals"]
    assert stored(None) == ["capitals"]
    assert stored(None, threshold=0.1) == ["capitals"], "also when the prompt is replaced"
    assert stored("states", None, threshold=0.2) == ["states"]


def prompts(texts):
    return [Prompt(text, "test", task="t") for text in texts]


def test_another_rule_is_added_and_nothing_is_lost(store, setup):
    ingest(store, setup, TEXTS[:1], ["logits"])
    assert counts(store) == {"relative": 3}
    ingest(store, setup, TEXTS[:1], ["logits"], rule="top_mass", threshold=0.5)
    assert counts(store) == {"relative": 3, "top_mass": 3}
    ingest(store, setup, TEXTS[:1], ["features"])
    assert counts(store) == {"relative": 11, "top_mass": 3}


def test_another_threshold_replaces(store, setup):
    ingest(store, setup, TEXTS[:1], ["logits"], threshold=0.05)
    ingest(store, setup, TEXTS[:1], ["logits"], threshold=0.2)
    frame = store.read("MATCH (c:Circuit) RETURN c.threshold AS threshold")
    assert frame["threshold"].tolist() == [0.2] * 3


def test_nothing_fires_or_is_rooted_on_bos(store, setup):
    ingest(store, setup, TEXTS)
    positions = store.read("MATCH (:Feature)-[f:FIRES_ON]->(:Prompt) UNWIND f.positions AS position RETURN position")
    assert len(positions) > 100
    assert positions["position"].min() >= 1
    roots = store.read("MATCH (:Circuit)-[:ROOT]->(n) RETURN n.position AS position")
    assert roots["position"].min() >= 1


@pytest.mark.parametrize("spec", ["logits", "features", "@2", "2/mlp/{feature}", "2/mlp/{feature}@2", " is", " is-The"])
def test_every_kind_of_root(embedded_store, setup, spec):
    replacement = setup.replace(setup.model.tokens(TEXTS[0]))
    site = replacement.mlp[2]
    feature = int(site.index[(site.value * (site.position == 2)).argmax()])
    spec = spec.format(feature=feature)
    summary, _, _ = ingest(embedded_store, setup, TEXTS[:1], [spec])
    expected = {"logits": 3, "features": 8, "@2": 7}.get(spec, 1)
    assert summary.circuits == expected
    frame = embedded_store.read("MATCH (c:Circuit)-[:ROOT]->(n) RETURN n.position AS position, n.id AS id")
    if "@2" in spec:
        assert set(frame["position"]) == {2}
    if spec == " is-The":
        first, second = setup.model.tokens(" is")[1], setup.model.tokens("The")[1]
        assert frame["id"][0].endswith(f"/logit/{first}-{second}")


def test_roots_are_combined_and_not_doubled(embedded_store, setup):
    summary, _, _ = ingest(embedded_store, setup, TEXTS[:1], ["logits", "features", "default"])
    assert summary.circuits == 11


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("9/mlp/1", "layers 0 to 2"),
        ("1/attn/99999", "features 0 to 31"),
        ("other/1/attn/3", "model 'other'"),
        ("default@0", "positions run from 1"),
        (" is@99", "positions run from 1"),
        (" Constantinople", "neither"),
        (" is- is", "a token less itself"),
        (" is- is@2", "a token less itself"),
        ("@-1", "after @ comes a position from 1 to"),
        ("@x", "neither"),
    ],
)
def test_unknown_roots(setup, spec, sentence):
    with pytest.raises(AtlasError, match=sentence):
        circuit_requests(setup, [spec], "relative", 0.1)


def test_a_feature_that_is_not_active_is_said_and_not_stored(embedded_store, setup):
    quiet = next(j for j in range(24) if not fires(setup, j))
    said: list[str] = []
    summary, _, _ = ingest(embedded_store, setup, TEXTS[:1], [f"2/mlp/{quiet}"], complain=said.append)
    assert (summary.prompts, summary.refused) == (0, 1)
    assert "none of the roots" in said[0]
    assert embedded_store.read("MATCH (p:Prompt) RETURN count(p) AS n")["n"][0] == 0


def fires(setup, feature):
    site = setup.replace(setup.model.tokens(TEXTS[0])).mlp[2]
    return bool(((site.index == feature) & (site.position > 0)).any())


def test_kill_and_resume_equals_an_undisturbed_run(tmp_path, directory, setup):
    """kill -9 while prompts are being written, then the same command again."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"{text} {word}" for text in TEXTS for word in ("old", "said", "is")))
    args = ["ingest", str(file), "--model", str(directory), "--roots", "logits"]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*ATLAS, *args, "--store", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    kill_after(process, 4)
    assert process.wait() == -signal.SIGKILL
    with connect(killed) as store:
        done = store.read("MATCH (p:Prompt) RETURN count(p) AS n, sum(CASE WHEN p.complete THEN 1 ELSE 0 END) AS whole")
        assert 0 < done["n"][0] < 12
        assert done["n"][0] == done["whole"][0]
        runs = summary(store).query("what == 'run'")["value"]
        assert len(runs) == 1
        assert ", interrupted, " in runs.iloc[0]
    for store in (killed, tmp_path / "undisturbed"):
        status, printed = atlas(*args, "--store", str(store))
        assert status == 0, printed
    ids = [task.id for task in prepare_tasks(setup, prompts(file.read_text().split("\n")), False, no_complaint)]
    assert len(ids) == 12
    graphs = []
    for folder, statuses in (("killed", ["interrupted", "finished"]), ("undisturbed", ["finished"])):
        with connect(tmp_path / folder) as store:
            runs = store.read("MATCH (r:Run) RETURN r.status AS status ORDER BY r.started_at")
            assert runs["status"].tolist() == statuses
            assert [check.name for check in verify(store) if check.violations] == []
            graphs.append([graph_in(store, id) for id in ids])
            assert store.read("MATCH (p:Prompt) RETURN count(p) AS n")["n"][0] == 12
    assert_same(graphs[0], graphs[1])


def assert_same(found, want):
    """Equal but for the last digits: matrix products round differently where memory lies differently."""
    assert type(found) is type(want)
    if isinstance(want, dict):
        assert found.keys() == want.keys()
        for key in want:
            assert_same(found[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(found) == len(want)
        for one, other in zip(found, want, strict=True):
            assert_same(one, other)
    else:
        assert found == (pytest.approx(want, rel=1e-4, abs=1e-5) if isinstance(want, float) else want)


def kill_after(process: subprocess.Popen[bytes], prompts: int) -> None:
    """kill -9 once the process says that `prompts` prompts are written; the next are being written."""
    wait_for(process, prompts)
    process.kill()


def wait_for(process: subprocess.Popen[bytes], prompts: int) -> None:
    """Read what the process says until that many prompts are written."""
    assert process.stderr
    for line in process.stderr:
        if line.startswith(b"progress ") and int(line.split()[1]) >= prompts:
            break


def test_ctrl_c_ends_cleanly(tmp_path, directory):
    file = tmp_path / "prompts.txt"
    words = ("old", "said", "is", "in", "the")  # so many prompts that it is never through before the signal comes
    file.write_text("\n".join(f"{text} {a} {b} {c}" for text in TEXTS for a in words for b in words for c in words))
    args = [*ATLAS, "ingest", str(file), "--model", str(directory), "--roots", "logits"]
    process = subprocess.Popen(
        [*args, "--store", str(tmp_path / "s")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & would ignore it
    )
    wait_for(process, 3)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert b"Stopped by Ctrl-C" in err
    assert b"Traceback" not in err
    with connect(tmp_path / "s") as store:
        assert store.read("MATCH (r:Run) RETURN r.status AS status")["status"].tolist() == ["interrupted"]
        assert [check.name for check in verify(store) if check.violations] == []


# Bad input, through the command line


def atlas(*args: str, stdin: str | bytes = b"") -> tuple[int, str]:
    """Exit status and everything printed by `atlas ARGS`."""
    data = io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin)
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", ["atlas", *args])
        patch.setattr(sys, "stdin", io.TextIOWrapper(data))
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, printed.getvalue()


def refused(tmp_path, directory, *args: str, stdin: str | bytes = b"") -> str:
    store = tmp_path / "store"
    status, printed = atlas("ingest", *args, "--model", str(directory), "--store", str(store), stdin=stdin)
    assert status == 2, printed
    assert "Traceback" not in printed
    assert not store.exists(), "nothing may be written"
    return printed


def test_empty_prompt(tmp_path, directory):
    assert "empty prompt" in refused(tmp_path, directory, "--text", "  ")


def test_long_prompt_offers_truncate(tmp_path, directory):
    text = "The house " * N_CTX
    assert "--truncate" in refused(tmp_path, directory, "--text", text)
    args = ("ingest", "--text", text, "--truncate", "--model", str(directory), "--store", str(tmp_path / "s"))
    status, printed = atlas(*args)
    assert status == 0, printed
    with connect(tmp_path / "s") as store:
        assert store.read("MATCH (p:Prompt) RETURN p.n_tokens AS n")["n"][0] == N_CTX


def test_not_utf8(tmp_path, directory):
    file = tmp_path / "latin.txt"
    file.write_bytes("fine\nnaïve".encode("latin-1"))
    assert "not UTF-8 text (line 2)" in refused(tmp_path, directory, str(file))


def test_a_bad_line_is_named_and_the_others_go_on(tmp_path, directory):
    rows = [{"prompt": TEXTS[0], "task": "a", "answer": 3}, "{oops", {"task": "b"}, {"prompt": TEXTS[1]}, [1]]
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    store = tmp_path / "s"
    status, printed = atlas("ingest", "-", "--model", str(directory), "--store", str(store), stdin=text)
    assert status == 2
    for number in (2, 3, 5):
        assert f"standard input:{number} " in printed
    assert "3 prompts were left out" in printed
    with connect(store) as opened:
        frame = opened.read("MATCH (p:Prompt) RETURN p.text AS text, p.fields AS fields, p.task AS task ORDER BY text")
    assert frame["text"].tolist() == sorted(TEXTS[:2])
    assert json.loads(frame["fields"][1]) == {"answer": 3}
    assert frame["task"].fillna("none").tolist() == ["none", "a"]


BAD = {
    '{"prompt": "\\ud800"}': "half a character",
    '{"prompt": "The", "task": "\\udfff"}': "half a character",
    '{"prompt": "The", "note": [{"\\ud800": 1}]}': "half a character",
    '{"prompt": "The", "note": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"prompt": "The", "note": ' + "9" * 5000 + "}": "a number that cannot be kept",
    '{"prompt": "The", "note": NaN}': "a number that cannot be kept",
    '{"prompt": "The", "note": [-Infinity]}': "a number that cannot be kept",
    '{"prompt": "The", "note": 1e999}': "a number that cannot be kept",
}


def test_a_prompt_ends_where_its_line_does(tmp_path):
    file, lines = tmp_path / "a.txt", ["one\f\u2028two\x85", "three\v\x1c", "", "four"]
    for end in ("\n", "\r\n", "\r"):
        file.write_bytes(end.join(lines).encode())
        found = [(prompt.text, prompt.where) for prompt in read_prompts(str(file), no_complaint)]
        assert found == [(lines[0], "a.txt:1"), (lines[1], "a.txt:2"), (lines[3], "a.txt:4")]


def test_what_cannot_be_stored_is_left_out(tmp_path):
    file, said = tmp_path / "a.jsonl", []
    file.write_text("\n".join(['{"prompt": "first"}', *BAD, '{"prompt": "last"}']))
    assert [prompt.text for prompt in read_prompts(str(file), said.append)] == ["first", "last"]
    assert len(said) == len(BAD)
    for number, (sentence, expected) in enumerate(zip(said, BAD.values(), strict=True), 2):
        assert sentence.startswith(f"a.jsonl:{number} ")
        assert expected in sentence


def test_a_text_that_is_not_utf8(tmp_path, directory):
    assert "'na\\udcefve' is not UTF-8 text" in refused(tmp_path, directory, "--text", os.fsdecode(b"na\xefve"))


def test_a_long_field_of_a_table(tmp_path, directory):
    file, limit = tmp_path / "long.csv", csv.field_size_limit()
    file.write_text(f"prompt,note\n{TEXTS[0]},{'x' * 200_000}\n{'is ' * 70_000},\n{TEXTS[1]},b\n")
    status, printed = atlas("ingest", str(file), "--model", str(directory), "--store", str(tmp_path / "s"))
    assert status == 2
    assert "Left out: long.csv:3 has " in printed
    assert "2 prompts with" in printed
    assert csv.field_size_limit() == limit


def test_a_task_that_says_nothing_is_none(tmp_path, directory):
    rows = [{"prompt": TEXTS[0], "task": ""}, {"prompt": TEXTS[1], "task": " ", "source": None}]
    store = tmp_path / "s"
    text = "\n".join(map(json.dumps, rows))
    status, printed = atlas("ingest", "-", "--model", str(directory), "--store", str(store), stdin=text)
    assert status == 0, printed
    with connect(store) as opened:
        found = opened.read("MATCH (p:Prompt) RETURN p.task AS task, p.source AS source")
        assert found.to_numpy().tolist() == [[None, "standard input"]] * 2
        assert [check.name for check in verify(opened) if check.violations] == []


def test_csv(tmp_path, directory):
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,task,note\n"The capital of Texas is",geo,"a, b"\n"",geo,\n')
    status, printed = atlas("ingest", str(file), "--model", str(directory), "--store", str(tmp_path / "s"))
    assert status == 2
    assert "prompts.csv:3 has no text" in printed
    file.write_text("text\nhello\n")
    assert "no column `prompt`" in refused(tmp_path / "again", directory, str(file))


def test_unknown_rule_threshold_file_and_model(tmp_path, directory):
    assert "no rule 'best'" in refused(tmp_path, directory, "--text", "x", "--rule", "best")
    assert "does not suit" in refused(tmp_path, directory, "--text", "x", "--threshold", "2")
    assert "cannot be read" in refused(tmp_path, directory, str(tmp_path / "none.txt"))
    assert "No model" in refused(tmp_path, "no/such/model", "--text", "x")
    assert "Nothing to ingest" in refused(tmp_path, directory)
    assert "There is no prompt in standard input." in refused(tmp_path, directory, "-", stdin="\n")
    layers = refused(tmp_path, directory, "--text", "x", "--layers", "9,7")
    assert "layers asked for (7, 9); there are some for layers 0, 1, 2." in layers


def test_damaged_weights_and_misfits(tmp_path, directory):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AtlasError, match="NaN or infinite"):
        set_up(str(copy))

    shutil.rmtree(copy)
    shutil.copytree(directory, copy)
    file = copy / "dictionaries" / "1.mlp" / "sae_weights.safetensors"
    dictionary = load_file(file)
    save_file({**dictionary, "b_enc": dictionary["b_enc"] + float("inf")}, file)
    with pytest.raises(AtlasError, match=r"1\.mlp has NaN"):
        set_up(str(copy))

    config = json.loads((copy / "dictionaries" / "1.mlp" / "cfg.json").read_text())
    config.update(d_in=8)
    (copy / "dictionaries" / "1.mlp" / "cfg.json").write_text(json.dumps(config))
    save_file({**dictionary, "W_enc": dictionary["W_enc"][:8].contiguous()}, file)
    with pytest.raises(AtlasError, match="is 16 wide"):
        set_up(str(copy))

    shutil.rmtree(copy / "dictionaries" / "1.mlp")
    missing = {(d.record.layer, d.record.site) for d in set_up(str(copy)).dictionaries if d.record.d_sae == 0}
    assert missing == {(1, "mlp")}, "what it writes is error altogether"


def test_help_is_quick_and_lists_the_command():
    result = CliRunner().invoke(group, ["--help"])
    assert result.exit_code == 0
    assert "ingest" in result.output
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, ingest.cli; print('torch' in sys.modules)"], capture_output=True, check=True
    )
    assert loaded.stdout.strip() == b"False"


def test_progress_is_silent_in_a_pipe(tmp_path, directory):
    args = ["ingest", "--text", TEXTS[0], "--model", str(directory), "--store", str(tmp_path / "s")]
    done = subprocess.run([Path(sys.executable).with_name("atlas"), *args], capture_output=True, text=True, check=True)
    printed = done.stdout + done.stderr
    assert len(printed.strip().splitlines()) == 1, printed
    assert "1 prompt" in printed
