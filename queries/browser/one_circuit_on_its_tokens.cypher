// One circuit on its tokens
// Its 25 largest nodes at the tokens of the prompt.
// Put a circuit's id, or a part of it, between the quotes; without one, one of about 25 nodes over many tokens is drawn.
WITH '' AS part
MATCH (c:Circuit)
WHERE c.id CONTAINS part
WITH c
ORDER BY abs(c.n_nodes - 25), c.id
LIMIT 30
MATCH (c)-[:INCLUDES]->(n:CircuitNode)
WITH c, count(DISTINCT n.position) AS n_positions
ORDER BY n_positions DESC, c.id
LIMIT 1
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c)
MATCH (c)-[part:INCLUDES]->(n:CircuitNode)
WITH p, n
ORDER BY abs(part.attribution) DESC, n.id
LIMIT 25
MATCH (n)-[at:AT]->(t:Token)
MATCH (p)-[:HAS_TOKEN]->(x:Token)-[next:NEXT]->(y:Token)
RETURN n, at, t, x, next, y
