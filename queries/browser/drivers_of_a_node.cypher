// Drivers of one node
// Its 15 strongest edges, by head, and what each driver is a feature of.
// Put a node's id between the quotes; without one, the root of a circuit is taken whose completeness is nearest to 1.
WITH '' AS given
CALL (given) {
  MATCH (n:CircuitNode {id: given})
  RETURN n
  UNION
  UNWIND CASE WHEN given = '' THEN [true] ELSE [] END AS any
  MATCH (c:Circuit)
  WITH c ORDER BY abs(1 - c.completeness), c.id LIMIT 1
  MATCH (c)-[:ROOT]->(n:CircuitNode)
  RETURN n
}
MATCH (s:CircuitNode)-[e:DIRECT|OV]->(n)
WITH s, e, n
ORDER BY abs(e.weight) DESC, s.id
LIMIT 15
OPTIONAL MATCH (s)-[of:OF]->(f:Feature)
RETURN s, e, n, of, f
