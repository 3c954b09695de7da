// Errors that matter (table)
// The circuits that reconstruction error takes most of.
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit)-[:ROOT]->(n:CircuitNode)
RETURN c.id AS circuit, n.name AS root, p.task AS task, p.text AS text,
       c.error_share AS error_share, c.completeness AS completeness, c.pruned_share AS pruned_share
ORDER BY abs(c.error_share) DESC, circuit
LIMIT 50
