// One circuit on the tokens of its prompt: its 25 largest nodes
// Put a circuit's id, or a part of it, between the quotes; without one, a circuit of about 20 nodes is drawn.
WITH '' AS part
MATCH (c:Circuit)
WHERE c.id CONTAINS part
WITH c
ORDER BY abs(c.n_nodes - 20), c.id
LIMIT 1
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c)
MATCH (c)-[part:INCLUDES]->(n:CircuitNode)
WITH p, n
ORDER BY abs(part.attribution) DESC, n.id
LIMIT 25
MATCH (n)-[at:AT]->(t:Token)
OPTIONAL MATCH (t)-[next:NEXT]->(after:Token)
RETURN n, at, t, next, after
