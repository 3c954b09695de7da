"""Column names from a query's text, as Neo4j gives them."""

import pytest

from atlas.columns import returned_columns


@pytest.mark.parametrize(
    ("cypher", "columns"),
    [
        ("MATCH (n) RETURN n", ["n"]),
        ("MATCH (n) RETURN DISTINCT n.id AS id, count(*)", ["id", "count(*)"]),
        ("RETURN [1, 2] AS a, {b: 'RETURN x, y'} AS c // , d", ["a", "c"]),
        ("RETURN 1 /* AS z, */ AS `q, ``r`", ["q, `r"]),
        ("MATCH (n) WITH n RETURN n.a AS a ORDER BY n.b, n.c SKIP 1 LIMIT 2", ["a"]),
        ("MATCH (n) CALL (n) { MATCH (n)--(m) RETURN m.id AS inner } RETURN inner AS outer;", ["outer"]),
        ("RETURN 1 AS a UNION RETURN 2 AS a", ["a"]),
        (
            "return x.as as `as`, case when x then 'a, b' else \"c\" end",
            ["as", "case when x then 'a, b' else \"c\" end"],
        ),
        ("RETURN COUNT { (a)-[:B]->(c) } AS n, $limit AS l", ["n", "l"]),
        ("MATCH (n) RETURN *", []),
        ("CREATE (n)", []),
    ],
)
def test_columns(cypher: str, columns: list[str]) -> None:
    assert returned_columns(cypher) == columns
