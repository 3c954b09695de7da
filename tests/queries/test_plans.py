"""How Neo4j would run each question: one thing is always found by an index, never by a scan of its label."""

from typing import Any

import neo4j
import pytest

from queries.catalogue import questions
from tests.neo4j_server import Neo4jServer
from tests.queries.conftest import Filled

SCANS = {"AllNodesScan", "NodeByLabelScan", "DirectedAllRelationshipsScan", "DirectedRelationshipTypeScan"}


def operators(plan: dict[str, Any]) -> list[str]:
    below = [name for child in plan.get("children", []) for name in operators(child)]
    return [plan["operatorType"].split("@")[0], *below]


@pytest.mark.neo4j
def test_no_question_about_one_thing_scans_a_label(filled_neo4j: Filled, neo4j_real: Neo4jServer) -> None:
    assert filled_neo4j.store.engine == "neo4j"
    with neo4j.GraphDatabase.driver(neo4j_real.bolt, auth=("neo4j", neo4j_real.password)) as driver:
        for name, asked in questions().items():
            parameters = {p.name: p.example for p in asked.parameters}
            summary = driver.execute_query("EXPLAIN " + asked.cypher, parameters).summary
            assert summary.plan is not None
            scans = [operator for operator in operators(summary.plan) if operator in SCANS]
            # circuits reads all of them where nothing is given, in a branch that has no row otherwise
            assert scans == (["NodeByLabelScan"] if name == "circuits" else []), name
