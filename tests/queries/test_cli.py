"""The commands on a filled folder: what is printed for people and for machines, and what is refused."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

import queries
from atlas.cli import atlas as group
from atlas.errors import AtlasError
from atlas.multitoken import write_multitoken
from atlas.schema import prepare
from atlas.store import connect
from queries.catalogue import questions
from queries.render import aligned, to_csv, to_json
from tests.queries.conftest import Filled, fill
from tests.synthetic import synthetic_multitoken, synthetic_prompt

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Filled, pd.DataFrame]:
    """A folder filled and closed again, what was put into it, and its circuits."""
    path = tmp_path_factory.mktemp("cli") / "store"
    with connect(path) as store:
        prepare(store)
        filled = fill(store)
        circuits = queries.circuits(store)
    return path, filled, circuits


@pytest.fixture
def run(folder: tuple[Path, Filled, pd.DataFrame]) -> Run:
    def invoke(*words: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(group, list(words), input=stdin, env={"ATLAS_STORE": str(folder[0])})

    return invoke


def test_a_question_as_table_csv_and_json(run: Run, folder: tuple[Path, Filled, pd.DataFrame]) -> None:
    circuits = folder[2]
    csv = run("query", "circuits", "--format", "csv")
    assert csv.exit_code == 0
    read = pd.read_csv(io.StringIO(csv.stdout), dtype={"prompt": "string"})
    assert list(read.columns) == list(circuits.columns)
    assert read["completeness"].tolist() == circuits["completeness"].tolist()
    rows = json.loads(run("query", "circuits", "--task", "rivers", "--format", "json").stdout)
    assert [row["circuit"] for row in rows] == circuits.loc[circuits["task"] == "rivers", "circuit"].tolist()
    table = run("query", "circuits", "--limit", "2")
    header, *lines = table.stdout.splitlines()
    assert header.split() == [c.name for c in questions()["circuits"].columns if c.star]
    assert len(lines) == 2
    assert table.stderr == "These are the first 2; --limit asks for more.\n"


def test_wiring_that_was_never_computed_is_said_to_be_missing(run: Run) -> None:
    for name in ("wired", "used"):
        asked = run("query", name)
        assert asked.exit_code == 0
        assert asked.stderr == "This store has no virtual weights yet; `atlas wiring` computes them.\n"
    assert run("query", "motifs").stderr == ""


def test_a_limit_of_nothing_is_refused(run: Run) -> None:
    asked = run("query", "circuits", "--limit", "0")
    assert isinstance(asked.exception, AtlasError)
    assert str(asked.exception) == "limit takes an integer, 1 or more, not 0."


def test_status_counts_what_was_written(run: Run, folder: tuple[Path, Filled, pd.DataFrame]) -> None:
    path, filled, _ = folder
    rows = {row["what"]: row["value"] for row in json.loads(run("status", "--format", "json").stdout)}
    t = filled.tables
    assert rows["store"] == str(path)
    assert rows["engine"] == "embedded"
    assert rows["models"] == "toy"
    assert rows["prompts"] == t.nodes["prompt"].nunique()
    assert rows["circuits"] == len(t.circuits)
    assert rows["nodes"] == len(t.nodes)
    assert rows["activations"] == t.nodes["feature"].notna().sum()
    assert rows["DIRECT edges"] == (t.edges["via"] == "DIRECT").sum()
    assert rows["OV edges"] == (t.edges["via"] == "OV").sum()
    assert rows["features that fire"] == t.firings["feature"].nunique()
    assert "5 prompts" in rows["run"]


def test_cypher_from_the_argument_and_from_standard_input(run: Run) -> None:
    count = "MATCH (p:Prompt) RETURN count(p) AS n"
    assert json.loads(run("cypher", count, "--format", "json").stdout) == [{"n": 5}]
    assert run("cypher", "-", stdin=count).stdout.split() == ["n", "5"]
    with pytest.raises(AtlasError, match="There is no query"):
        raise run("cypher", "-", stdin=" ").exception  # type: ignore[misc]


def test_cypher_cannot_write(run: Run) -> None:
    assert isinstance(run("cypher", "CREATE (n:Prompt {id: 'x'}) RETURN n.id AS id").exception, AtlasError)
    assert run("cypher", "MATCH (p:Prompt) RETURN count(p) AS n").stdout.split() == ["n", "5"]


def test_cypher_writes_when_it_is_told_to(run: Run) -> None:
    made = run("cypher", "CREATE (n:Note {text: 'x'}) RETURN n.text AS text", "--write", "--format", "json")
    assert json.loads(made.stdout) == [{"text": "x"}]
    assert run("cypher", "MATCH (n:Note) RETURN count(n) AS n").stdout.split() == ["n", "1"]
    assert run("cypher", "MATCH (n:Note) DELETE n", "--write").exit_code == 0
    assert run("cypher", "MATCH (n:Note) RETURN count(n) AS n").stdout.split() == ["n", "0"]
    with pytest.raises(AtlasError, match="The database at"):
        raise run("cypher", "CREATE (n:Prompt {id: 'x'}) CREATE (m:Prompt {id: 'x'})", "--write").exception  # type: ignore[misc]
    assert run("cypher", "MATCH (p:Prompt) RETURN count(p) AS n").stdout.split() == ["n", "5"]


def test_explain_shows_the_plan_and_asks_nothing(run: Run) -> None:
    plan = run("query", "prompts_of", "--feature", "no such feature", "--explain")
    assert plan.exit_code == 0
    assert "FIRES_ON" in plan.stdout
    assert "Execution Plan" in plan.stdout


def test_show_prints_the_tree(run: Run, folder: tuple[Path, Filled, pd.DataFrame]) -> None:
    circuits = folder[2]
    circuit = circuits.loc[circuits["root_kind"] == "MLP"].iloc[0]
    shown = run("show", circuit["circuit"])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == circuit["circuit"]
    assert f"«{circuit['root_token']}»" in lines[1]
    assert f"{100 * circuit['completeness']:.1f}%" in lines[2]
    assert f"{circuit['n_nodes']} nodes, {circuit['n_edges']} edges" in lines[3]
    assert circuit["root_name"] in lines[lines.index("") + 1]
    part = circuit["circuit"].removesuffix("/relative")
    assert run("show", part).stdout == shown.stdout
    assert "part of more than one circuit's id" in str(run("show", "relative").exception)
    assert "No circuit's id contains 'nowhere'" in str(run("show", "nowhere").exception)


def test_show_prints_a_tree_for_each_root(tmp_path: Path) -> None:
    record = synthetic_multitoken(synthetic_prompt(0, 4, 3, 0.4))
    with connect(tmp_path / "store") as store:
        prepare(store)
        fill(store)
        write_multitoken(store, [record])
        roots = store.read(
            "MATCH (:Circuit {id: $id})-[:ROOT]->(n)-[:AT]->(t) RETURN n.name AS name, t.text AS token "
            "ORDER BY t.position",
            id=record.id,
        )
    lines = CliRunner().invoke(group, ["show", record.id, "--store", str(tmp_path / "store")]).stdout.splitlines()
    assert len(roots) == 2
    assert "".join(f"«{token}»" for token in roots["token"]) in lines[1]
    assert " of 2 roots together: explained" in lines[2]
    assert [line.split(' "')[0] for line in lines[lines.index("") + 1 :] if line[0] not in "│├└"] == roots[
        "name"
    ].tolist()


def test_the_help_of_every_question_needs_no_store(tmp_path: Path) -> None:
    for name, asked in questions().items():
        told = CliRunner().invoke(group, ["query", name, "--help"], env={"ATLAS_STORE": str(tmp_path / "none")})
        assert told.exit_code == 0
        for parameter in asked.parameters:
            assert "--" + parameter.name.replace("_", "-") in told.stdout
        for column in asked.columns:
            assert f"{column.name}{column.star}: " in told.stdout


def test_the_list_of_questions() -> None:
    printed = CliRunner().invoke(group, ["queries"]).stdout
    listed = json.loads(CliRunner().invoke(group, ["queries", "--format", "json"]).stdout)
    assert [row["name"] for row in listed] == sorted(questions())
    assert all(asked.sentence in printed for asked in questions().values())


def test_what_is_wrong_is_said_before_the_store_is_opened(tmp_path: Path) -> None:
    def said(*words: str) -> str:
        result = CliRunner().invoke(group, ["query", *words], env={"ATLAS_STORE": str(tmp_path / "none")})
        assert result.exit_code != 0
        return str(result.exception) + result.stderr

    assert "nearest: upstream" in said("upstrem")
    assert "--hops" in said("upstream", "--hop", "3")
    assert "not a valid integer" in said("upstream", "--hops", "three")
    assert "There is no store" in said("circuits")


def test_a_question_in_a_process_of_its_own_never_loads_torch(folder: tuple[Path, Filled, pd.DataFrame]) -> None:
    code = (
        "import sys\n"
        "from atlas.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules, 'ingest' in sys.modules, file=sys.stderr)\n"
    )
    words = ["query", "circuits", "--limit", "1", "--format", "json", "--store", str(folder[0])]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["circuit"] == folder[2]["circuit"][0]
    assert done.stderr.splitlines()[-1] == "False False"


def test_machine_formats_keep_every_digit_and_hostile_text() -> None:
    text = 'a "b", `c`\n\x1b[31m[bold]'
    frame = pd.DataFrame(
        {
            "t": pd.Series([text, None], dtype="string"),
            "i": pd.Series([3, None], dtype="Int64"),
            "x": [0.1 + 0.2, float("nan")],
            "l": pd.Series([[1, 2.5], None], dtype="object"),
        }
    )
    rows = json.loads(to_json(frame))
    assert rows[0] == {"t": text, "i": 3, "x": 0.1 + 0.2, "l": [1, 2.5]}
    assert rows[1] == dict.fromkeys("tixl")
    read = pd.read_csv(io.StringIO(to_csv(frame)))
    assert read["t"][0] == text
    assert read["i"][0] == 3
    assert read["x"][0] == 0.1 + 0.2
    assert json.loads(read["l"][0]) == [1, 2.5]
    assert to_csv(frame).splitlines()[-1] == ",,,"
    printed = aligned(frame)
    assert "\x1b" not in printed
    assert printed.count("\n") == 2
    assert json.loads(to_json(frame.head(0))) == []
    assert to_csv(frame.head(0)) == "t,i,x,l\n"
    assert aligned(frame.head(0)).split() == ["t", "i", "x", "l"]
