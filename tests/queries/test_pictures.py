"""The drawing commands and a notebook's picture: files that are whole, and sentences where there is none."""

import json
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from playwright.sync_api import Browser, expect

import queries
from atlas.cli import atlas as group
from atlas.errors import AtlasError
from atlas.schema import prepare
from atlas.store import connect
from queries.notebook import render
from tests.queries.conftest import fill

Run = Callable[..., Result]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, queries.Circuit]:
    """A filled folder, its circuits, and the largest of them."""
    path = tmp_path_factory.mktemp("pictures") / "store"
    with connect(path) as store:
        prepare(store)
        fill(store)
        circuits = queries.circuits(store)
        largest = str(circuits.sort_values("n_nodes")["circuit"].iloc[-1])
        return path, circuits, queries.circuit(store, largest)


@pytest.fixture
def run(drawn: tuple[Path, pd.DataFrame, queries.Circuit]) -> Run:
    def invoke(*words: str | Path) -> Result:
        return CliRunner().invoke(group, [str(word) for word in words], env={"ATLAS_STORE": str(drawn[0])})

    return invoke


@pytest.mark.browser
def test_a_circuit_as_page_svg_and_png(
    run: Run, drawn: tuple[Path, pd.DataFrame, queries.Circuit], tmp_path: Path, browser: Browser
) -> None:
    nodes = drawn[2].nodes
    circuit = next(str(c) for c, n in zip(drawn[1]["circuit"], drawn[1]["n_nodes"], strict=True) if n == len(nodes))
    html, svg, png = (tmp_path / f"circuit.{ending}" for ending in ("html", "svg", "png"))
    done = run("show", circuit, "--html", html, "--svg", svg, "--png", png)
    assert (done.exit_code, done.output) == (0, f"Written: {html}, {svg}, {png}\n")
    figure = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    titles = [title.text or "" for title in figure.iter(f"{SVG}title")]
    names = nodes["name"].tolist()
    assert all(any(title.startswith(name) for title in titles) for name in names)
    assert [element for element in figure.iter() if element.get("class") or element.get("style")] == []
    assert "var(" not in svg.read_text(encoding="utf-8")
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert (width, height) == (2 * int(figure.get("width", 0)), 2 * int(figure.get("height", 0)))
    page = browser.new_page()
    page.goto(html.as_uri())
    expect(page.locator("svg g.nodes > g")).to_have_count(len(nodes))
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the figure as SVG").click()
    assert ElementTree.parse(saved.value.path()).getroot().tag == f"{SVG}svg"
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the figure as PNG").click()
    assert Path(saved.value.path()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page.close()


def test_compare_and_map_write_pages(
    run: Run, drawn: tuple[Path, pd.DataFrame, queries.Circuit], tmp_path: Path
) -> None:
    a, b = drawn[1]["circuit"].head(2)
    compared = run("compare", a, b, "--html", tmp_path / "compared.html")
    assert compared.exit_code == 0, compared.output
    assert compared.output.startswith(f"Written: {tmp_path / 'compared.html'}\nNodes: only A (")
    mapped = run("map", "--edges", "7", "--html", tmp_path / "map.html")
    assert mapped.exit_code == 0, mapped.output
    assert "\n7 of " in mapped.output
    for name in ("compared.html", "map.html"):
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compared.html", "map.html"]


def test_what_cannot_be_drawn_is_told_in_a_sentence(
    run: Run, drawn: tuple[Path, pd.DataFrame, queries.Circuit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = drawn[1]["circuit"].head(2)
    monkeypatch.setenv("PATH", str(tmp_path))
    for words, sentence in (
        (("compare", a, b), "Say where the picture goes: --html FILE, --svg FILE or --png FILE."),
        (("compare", a, "no such", "--html", tmp_path / "x.html"), "No circuit's id contains 'no such'"),
        (("show", a, "--html", tmp_path / "no" / "x.html"), "x.html cannot be written: No such file or directory."),
        (("map", "--png", tmp_path / "x.png"), "SVG and PNG files are drawn by Chromium, and there is none here"),
    ):
        done = run(*words)
        assert isinstance(done.exception, AtlasError), done.output
        assert sentence in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.browser
def test_a_notebook_draws_a_circuit_without_the_network(
    drawn: tuple[Path, pd.DataFrame, queries.Circuit], tmp_path: Path, browser: Browser
) -> None:
    circuit = drawn[2]
    circuit.nodes.loc[:, "label"] = "</script><script>window.hacked = 1</script>"
    file = tmp_path / "cell.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{circuit.render().data}', encoding="utf-8")
    wrong: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    expect(page.locator("canvas").first).to_be_visible()
    assert page.evaluate("window.hacked") is None
    page.close()
    assert wrong == []


def test_a_notebook_draws_layers_upward_and_tokens_across() -> None:
    nodes = pd.DataFrame(
        {
            "node": ["e", "a", "m", "l"],
            "name": ["embedding @ x", "L0 attn 1 @ x", "L0 mlp 2 @ y", "logit z"],
            "kind": ["Embedding", "Attn", "MLP", "Logit"],
            "feature": [None, "t/0/attn/1", "t/0/mlp/2", None],
            "label": [None, "ones", None, None],
            "layer": [-1, 0, 0, 1],
            "position": [0, 0, 1, 1],
            "token": ["x", "x", "y", "y"],
            "attribution": [0.1, -0.5, 0.2, 1.0],
        }
    )
    edges = pd.DataFrame({"source": ["e", "e", "m"], "target": ["a", "a", "l"], "share": [0.2, -0.5, 0.4]})
    html = render(nodes, edges, "300px").data
    data = html.partition('type="application/json" id="neo4j-viz-data">')[2].partition("</script>")[0]
    found = json.loads(data)
    at = {node["id"]: node for node in found["nodes"]}
    assert at["e"]["y"] > at["a"]["y"] > at["m"]["y"] > at["l"]["y"]
    assert at["e"]["x"] == at["a"]["x"] < at["m"]["x"] == at["l"]["x"]
    assert at["l"]["size"] > at["a"]["size"] > at["m"]["size"] > at["e"]["size"]
    assert at["a"]["caption"] == "ones"
    captions = [edge["caption"] for edge in found["relationships"]]
    assert sorted(captions) == ["-30%", "40%"]
