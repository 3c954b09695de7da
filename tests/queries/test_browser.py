"""Neo4j Browser in a real Chromium against a real Neo4j, and what `atlas browser` says and refuses."""

import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, Locator, Page, expect

from atlas.cli import atlas as group
from atlas.errors import AtlasError
from queries import browser as neo4j_browser
from queries.browser import ARCHIVE, FOLDERS, STYLE, saved_queries, style, style_rules, write_files
from queries.catalogue import questions
from tests.neo4j_browser import MILLISECONDS, import_files, log_in, open_page, run_saved
from tests.neo4j_server import Neo4jServer
from tests.queries.conftest import Filled

KINDS = ["MLP", "Attn", "Embedding", "PositionEmbedding", "Error", "Bias", "Logit"]


SHARE_A_ROOT = """
MATCH (p:Prompt {task: 'stones'})-[:HAS_CIRCUIT]->(:Circuit)-[:ROOT]->(n:CircuitNode)
MATCH (f:Feature {id: 'toy/1/mlp/24'})
MERGE (n)-[:OF]->(f)
MERGE (f)-[:FIRES_ON {max: 1.0}]->(p)
"""


@pytest.fixture
def filled_shared(filled_neo4j: Filled) -> Filled:
    """One feature is the root of a circuit in several prompts, as in a real store."""
    filled_neo4j.store.write(lambda transaction: transaction.run(SHARE_A_ROOT).consume())
    return filled_neo4j


@pytest.fixture
def page(browser: Browser, neo4j_real: Neo4jServer) -> Iterator[Page]:
    opened = open_page(browser, f"{neo4j_real.http}/browser/")
    yield opened
    opened.context.close()


def colours(frame: Locator) -> set[str]:
    return set(frame.locator("svg g.node circle.b-outline").evaluate_all("all => all.map(e => e.getAttribute('fill'))"))


@pytest.mark.neo4j
@pytest.mark.browser
def test_a_person_imports_the_style_and_runs_saved_queries(
    filled_shared: Filled, neo4j_real: Neo4jServer, page: Page, tmp_path: Path
) -> None:
    log_in(page, neo4j_real.password)
    write_files(tmp_path)
    import_files(page, tmp_path)
    titles = page.locator("[data-testid^=scriptTitle-]")
    expect(titles).to_have_count(sum(name.startswith(FOLDERS[0] + "/") for name in saved_queries()))
    shades = {label: rule["color"] for label, rule in style_rules(style()).items() if "color" in rule}
    drawn = {"One circuit": KINDS, "Features of one task": ["Feature", "Prompt"], "Drivers of one node": KINDS}
    for title, labels in drawn.items():
        frame = run_saved(page, title)
        nodes = frame.locator("svg g.node")
        nodes.first.wait_for(timeout=MILLISECONDS)
        assert nodes.count() >= 3
        assert frame.locator("svg g.relationship").count() >= 2
        assert colours(frame) <= {shades[f"node.{label}"] for label in (*labels, "Feature")}
        assert frame.get_by_test_id("cypherFrameErrorMessage").count() == 0
        frame.screenshot(path=tmp_path / f"{title}.png")
    captions = {"".join(caption.split()) for caption in frame.locator("svg g.node").all_text_contents()}
    assert captions & {"".join(name.split()) for name in filled_shared.tables.nodes["name"]}


@pytest.mark.neo4j
def test_every_saved_query_runs(filled_shared: Filled) -> None:
    """On a filled store, each query of Browser's folder answers without any change to its text."""
    for name, cypher in saved_queries().items():
        if name.startswith(FOLDERS[0] + "/"):
            assert len(filled_shared.store.read(cypher)) > 0, name


@pytest.mark.neo4j
def test_the_command_prints_the_address_and_checks_the_queries(
    filled_neo4j: Filled, neo4j_real: Neo4jServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["browser", "--store", neo4j_real.bolt, "--out", str(tmp_path / "new")]
    printed = CliRunner().invoke(group, words)
    assert printed.exit_code == 0, printed.exception
    assert f"Neo4j Browser: {neo4j_real.http}/browser/\n" in printed.stdout
    assert style_rules((tmp_path / "new" / STYLE).read_text()) == style_rules(style())
    with zipfile.ZipFile(tmp_path / "new" / ARCHIVE) as archive:
        titles = {name: archive.read(name).decode().splitlines()[0] for name in archive.namelist()}
    assert all(title.startswith("// ") for title in titles.values())
    assert {f"{FOLDERS[1]}/{name}.cypher" for name in questions()} < set(titles)
    monkeypatch.setattr(neo4j_browser, "saved_queries", lambda: {"Mine/wrong.cypher": "// Wrong\nMATCH (n RETURN n"})
    refused = CliRunner().invoke(group, words[:3])
    assert str(refused.exception).startswith("The saved query Mine/wrong.cypher does not run there")


@pytest.mark.neo4j
def test_what_answers_must_be_browser(neo4j_store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server on that port, and none at all."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"something else")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        neo4j_browser, "_HTTP", f"RETURN '{neo4j_browser._HTTP_AT}' AS name, ':{server.server_port}' AS value"
    )
    with pytest.raises(AtlasError, match="is not Neo4j Browser"):
        neo4j_browser.browser_address(neo4j_store)  # type: ignore[arg-type]
    server.shutdown()
    server.server_close()
    with pytest.raises(AtlasError, match="No Browser answers at"):
        neo4j_browser.browser_address(neo4j_store)  # type: ignore[arg-type]


def test_the_embedded_engine_has_no_browser(embedded_store: object) -> None:
    with pytest.raises(AtlasError, match="which has no Browser"):
        neo4j_browser.browser_address(embedded_store)  # type: ignore[arg-type]


def test_every_kind_of_node_has_a_colour_of_its_own() -> None:
    rules = style_rules(style())
    shades = [rules[f"node.{label}"]["color"] for label in (*KINDS, "Feature", "Prompt", "Token", "Circuit")]
    assert len(set(shades)) == len(shades)
    assert rules["node.CircuitNode"]["caption"] == "'{name}'"


@pytest.mark.parametrize(
    ("grass", "sentence"),
    [
        ("node { color: red; }\n// a comment\n", "from '// a comment' on"),
        ("node { color: red; }\nnode.MLP { color: red", "from 'node.MLP { color: red' on"),
        ("node { color red; }", "from 'color red;' on"),
        ("node { caption: 'a: b'; }", "misread the style from"),
        ("node { shaft-width: 2px; }", "does not know: {'shaft-width'}"),
    ],
)
def test_a_style_that_browser_would_misread_is_refused(grass: str, sentence: str) -> None:
    with pytest.raises(AtlasError) as error:
        style_rules(grass)
    assert sentence in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AtlasError, match="cannot be written"):
        write_files(tmp_path / "file")
