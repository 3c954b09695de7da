"""The code of docs/python.md runs, in its order, and prints what the page says it prints, but for the numbers."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from atlas.schema import prepare
from atlas.store import connect
from atlas.writer import register, write_prompt
from tests.synthetic import synthetic_model, synthetic_prompt, synthetic_run

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def shape(printed: str) -> list[str]:
    """The words of a table's first line, which names its columns; for any other text its words, without numbers."""
    first, *rest = printed.splitlines()
    table = bool(rest) and first.startswith(" ")
    return first.split() if table else re.findall(r"[^\W\d]+", first)


def test_the_page_is_all_examples() -> None:
    assert len(EXAMPLES) == PAGE.read_text(encoding="utf-8").count("```python") >= 10
    assert all(printed.strip() for _, printed in EXAMPLES)


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with connect("atlas-store") as store:
        prepare(store)
        run = synthetic_run()
        register(store, synthetic_model(), run)
        for number in range(3):
            write_prompt(store, replace(synthetic_prompt(number, 4, 3, 0.4), task="quotes"), run.id)
    names: dict[str, object] = {}
    for code, wanted in EXAMPLES:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(PAGE), "exec"), names)
        assert shape(out.getvalue()) == shape(wanted), code
