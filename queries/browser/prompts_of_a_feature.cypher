// Prompts of one feature
// The 20 prompts in which it fires most.
// Put a feature's id between the quotes; without one, the one that most circuits explain is taken.
WITH '' AS given
CALL (given) {
  MATCH (f:Feature {id: given})
  RETURN f
  UNION
  UNWIND CASE WHEN given = '' THEN [true] ELSE [] END AS any
  MATCH (:Circuit)-[:ROOT]->(:CircuitNode)-[:OF]->(f:Feature)
  WITH f, count(*) AS times ORDER BY times DESC, f.id LIMIT 1
  RETURN f
}
MATCH (f)-[fires:FIRES_ON]->(p:Prompt)
RETURN f, fires, p
ORDER BY fires.max DESC, p.id
LIMIT 20
