// One circuit
// Its nodes, and the edges of at least a tenth of their target's pre-activation, of either sign.
// Put a circuit's id, or a part of it, between the quotes; without one, one of about 25 nodes over many tokens is drawn.
WITH '' AS part, 0.1 AS min_share
MATCH (c:Circuit)
WHERE c.id CONTAINS part
WITH c, min_share
ORDER BY abs(c.n_nodes - 25), c.id
LIMIT 30
MATCH (c)-[:INCLUDES]->(n:CircuitNode)
WITH c, min_share, count(DISTINCT n.position) AS n_positions
ORDER BY n_positions DESC, c.id
LIMIT 1
MATCH (c)-[:INCLUDES]->(s:CircuitNode)
OPTIONAL MATCH (s)-[e:DIRECT|OV]->(t:CircuitNode)<-[:INCLUDES]-(c)
WHERE abs(e.weight) >= min_share * abs(t.pre_activation)
RETURN s, e, t
