"""How Neo4j would run each question: one thing is always found by an index, never by a scan of its label."""

from typing import Any

import neo4j
import pytest

from queries.catalogue import questions
from tests.neo4j_server import Neo4jServer
from tests.queries.conftest import Filled

SCANS = {"AllNodesScan", "NodeByLabelScan", "UnionNodeByLabelsScan", "IntersectionNodeByLabelsScan"}
SCANS |= {"DirectedAllRelationshipsScan", "DirectedRelationshipTypeScan", "UndirectedRelationshipTypeScan"}
WHOLE_STORE = {"find_features", "drivers_of_head"}  # questions that are about no one thing, whatever is given


def scans(plan: dict[str, Any]) -> int:
    """What the operators that scan a whole label or type have touched, over the plan and all below it."""
    own = plan["dbHits"] if plan["operatorType"].split("@")[0] in SCANS else 0
    return own + sum(scans(child) for child in plan.get("children", []))


@pytest.mark.neo4j
def test_no_question_about_one_thing_scans_a_label(filled_neo4j: Filled, neo4j_real: Neo4jServer) -> None:
    assert filled_neo4j.store.engine == "neo4j"
    with neo4j.GraphDatabase.driver(neo4j_real.bolt, auth=("neo4j", neo4j_real.password)) as driver:
        for name, asked in questions().items():
            if name in WHOLE_STORE:
                continue
            # Branches for the whole store stand in the plan, but get no row when one thing is given.
            parameters = {p.name: p.example for p in asked.parameters}
            profile = driver.execute_query("PROFILE " + asked.cypher, parameters).summary.profile
            assert profile is not None
            assert scans(profile) == 0, name
        whole = driver.execute_query("PROFILE MATCH (f:Feature) RETURN max(f.layer) AS n").summary.profile
        assert whole is not None
        assert scans(whole) > 0
