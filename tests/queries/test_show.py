"""The tree of a circuit that is drawn up by hand."""

import pandas as pd
import pytest
from rich.console import Console

from queries.show import Branch, Node, draw, tree

ROOT = Node("r", "L2 mlp 7 @ is", "MLP", "states", " is")


def edge(source: str, target: str, share: float, layer: int | None = None, head: int | None = None) -> dict:
    kinds = {"e": "Embedding", "x": "Error", "a": "Attn", "m": "MLP"}
    return {
        "source": source,
        "source_name": f"node {source}",
        "source_kind": kinds[source[0]],
        "source_label": None,
        "source_token": " Texas",
        "source_position": 3,
        "target_position": 5,
        "target": target,
        "via": "DIRECT" if head is None else "OV",
        "layer": layer,
        "head": head,
        "share": share,
    }


EDGES = pd.DataFrame(
    [
        edge("a1", "r", 0.5),
        edge("m1", "r", 0.3),
        edge("x1", "r", -0.2),
        edge("e1", "r", 0.01),
        edge("m1", "a1", 0.25, 1, 3),
        edge("m1", "a1", 0.35, 1, 0),
        edge("e1", "a1", 0.3, 1, 3),
        edge("e1", "m1", 0.9),
    ]
)


PAIRS = pd.DataFrame(
    [
        {
            "layer": 1,
            "head": 3,
            "query": 5,
            "key": 3,
            "query_name": q,
            "key_name": k,
            "qk": qk,
            "score": 2.04,
            "lift": lift,
        }
        for q, k, qk, lift in (
            ("embedding @ is", "L0 k bias @ Texas", 0.5, 0.1),
            ("L0 mlp 5 @ is", "embedding @ Texas", -9.26, 0.9),  # it keeps the head from looking anywhere
            ("L0 mlp 6 @ is", "embedding @ Texas", 9.26, -0.9),  # it makes it look at the others
            ("L0 mlp 4 @ is", "L0 k bias @ Texas", 1.0, 0.5),
            ("L0 mlp 4 @ is", "embedding @ Texas", 3.26, 0.5),
        )
    ]
    + [
        {
            "layer": 1,
            "head": 0,
            "query": 5,
            "key": 2,
            "query_name": "q",
            "key_name": "k",
            "qk": 9.0,
            "score": 9.0,
            "lift": 0.0,
        }
    ]
)


def grown(depth: int = 3, top: int = 5, min_share: float = 0.02) -> Branch:
    return tree(EDGES, PAIRS, ROOT, depth=depth, top=top, min_share=min_share)


def printed(branch: Branch) -> list[str]:
    console = Console(width=200, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(branch))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_whole_tree_as_printed() -> None:
    assert printed(grown()) == [
        'L2 mlp 7 @ is "states"',
        "├── 50.0% node a1",
        '│   ├── 60.0% node m1 via OV L1.H0 35.0%, L1.H3 25.0% from " Texas" ↕ opened elsewhere',
        "│   │   └── L1.H3 looks there: L0 mlp 4 @ is with embedding @ Texas, 3.3 of its score 2.0, lift +0.50",
        '│   ├── 30.0% node e1 via OV L1.H3 from " Texas"',
        "│   │   └── L1.H3 looks there: L0 mlp 4 @ is with embedding @ Texas",
        "│   └── 10.0% rest: the constant and what the circuit leaves out",
        "├── 30.0% node m1",
        "│   ├── 90.0% node e1",
        "│   └── 10.0% rest: the constant and what the circuit leaves out",
        "├── -20.0% node x1",
        "└── 40.0% rest: 1 weaker driver, the constant and what the circuit leaves out",
    ]


def test_a_score_is_told_once_and_named_after_that() -> None:
    """Both heads at one pair of nodes, behind two edges; the figures stand under the stronger edge only."""
    both = pd.concat([PAIRS, PAIRS[4:5].assign(head=0, qk=1.5, score=3.0)], ignore_index=True)
    edges = pd.concat([EDGES, pd.DataFrame([edge("e1", "a1", 0.1, 1, 0)])], ignore_index=True)
    lines = printed(tree(edges, both, ROOT, depth=2, top=2, min_share=0.02))
    pair = "L0 mlp 4 @ is with embedding @ Texas"
    assert lines[2:7] == [
        '│   ├── 60.0% node m1 via OV L1.H0 35.0%, L1.H3 25.0% from " Texas" ↕ opened elsewhere',
        f"│   │   ├── L1.H0 looks there: {pair}, 1.5 of its score 3.0, lift +0.50",
        f"│   │   └── L1.H3 looks there: {pair}, 3.3 of its score 2.0, lift +0.50",
        '│   ├── 40.0% node e1 via OV L1.H3 30.0%, L1.H0 10.0% from " Texas"',
        f"│   │   └── L1.H3, L1.H0 look there: {pair}",
    ]


def test_shares_below_a_node_and_the_rest_make_the_whole() -> None:
    def check(branch: Branch) -> None:
        if branch.rest is not None:
            shares = [below.driver.share for below in branch.branches if below.driver]
            assert sum(shares) + branch.rest == pytest.approx(1)
        for below in branch.branches:
            check(below)

    check(grown())
    check(grown(top=1))


def test_top_and_depth_cut_the_tree() -> None:
    cut = grown(depth=1, top=2)
    assert [below.node.id for below in cut.branches] == ["a1", "m1"]
    assert cut.hidden == 2
    assert all(not below.branches and not below.seen for below in cut.branches)


def test_a_node_is_opened_where_it_stands_highest() -> None:
    for depth in (2, 3):
        a1, m1, _ = grown(depth=depth).branches
        assert [(below.branches, below.seen) for below in a1.branches] == [((), True), ((), False)]
        assert [below.node.id for below in m1.branches] == ["e1"]
        assert not m1.seen


def test_a_circuit_without_edges_is_its_root() -> None:
    assert printed(tree(EDGES.head(0), PAIRS.head(0), ROOT, depth=3, top=5, min_share=0)) == ['L2 mlp 7 @ is "states"']


def test_names_cannot_act_on_the_terminal() -> None:
    hostile = Node("r", "a\x1b[31m\n[bold]b", "MLP", "\x07", " is")
    assert printed(tree(EDGES.head(0), PAIRS.head(0), hostile, depth=1, top=1, min_share=0)) == [
        'a\\x1b[31m\\n[bold]b "\\x07"'
    ]
