// One circuit: its nodes, and the edges of at least a tenth of their target
// Put a circuit's id, or a part of it, between the quotes; without one, a circuit of about 20 nodes is drawn.
WITH '' AS part, 0.1 AS min_share
MATCH (c:Circuit)
WHERE c.id CONTAINS part
WITH c, min_share
ORDER BY abs(c.n_nodes - 20), c.id
LIMIT 1
MATCH (c)-[:INCLUDES]->(s:CircuitNode)-[e:DIRECT|OV]->(t:CircuitNode)<-[:INCLUDES]-(c)
WHERE abs(e.weight) >= min_share * abs(t.pre_activation)
RETURN s, e, t
