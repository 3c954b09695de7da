"""Every question about circuits of the model that comes with the package, against pandas over what is stored.

Prompts of the demo are ingested as `atlas ingest` does it, once for each engine, and the tables are read back by
plain Cypher. What is compared is what the test of the same question compares on a generated store.
"""

import json

import pytest

from ingest.faithfulness import ablation
from ingest.job import circuit_requests, prepare_tasks, run
from ingest.model import MINI
from ingest.prompts import Prompt
from ingest.setup import Setup, set_up
from queries.catalogue import questions
from tests.conftest import emptied
from tests.queries import test_across, test_answers
from tests.queries.conftest import Filled
from tests.queries.exported import exported

TASKS = ("counting", "names")
PROMPTS = ("One, two, three, four,", "January, February, March,", "Dr. Watson spoke first, and then Dr.")
ASKED = [("features", "support", 0.05), ("logits", "paper", 0.3)]  # the second of the first prompt only
LABELS = ['a "label" with `ticks`', "stones"]
COMPARED = vars(test_answers) | vars(test_across)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return set_up("mini")


@pytest.fixture(scope="module", params=["embedded", pytest.param("neo4j", marks=pytest.mark.neo4j)])
def demo(request: pytest.FixtureRequest, setup: Setup) -> Filled:
    store = emptied(request.getfixturevalue(f"_{request.param}_session"))
    lines = [json.loads(line) for line in (MINI.parent / "prompts.jsonl").read_text().splitlines()]
    known = {line["prompt"]: line["task"] for line in lines}
    prompts = [Prompt(text, "prompts.jsonl", known[text]) for text in PROMPTS]
    tasks = prepare_tasks(setup, prompts, False, pytest.fail)
    for roots, rule, threshold in ASKED:
        asked = circuit_requests(setup, [roots], rule, threshold)
        run(store, setup, tasks, asked, pytest.fail, lambda summary: None, by=ablation(setup, "mean"))
        tasks = tasks[:1]
    label = "MATCH (f:Feature)-[r:FIRES_ON]->() WITH f, count(r) AS n ORDER BY n DESC, f.id LIMIT $n RETURN f.id AS id"
    for id, text in zip(store.read(label, n=len(LABELS))["id"], LABELS, strict=True):
        store.change("MATCH (f:Feature {id: $id}) SET f.label = $text", id=id, text=text)
    return Filled(store, exported(store), TASKS, tuple(rule for _, rule, _ in ASKED), often=2)


@pytest.mark.parametrize("name", sorted(questions()))
def test_question(demo: Filled, name: str) -> None:
    COMPARED[f"test_{name}"](demo)
