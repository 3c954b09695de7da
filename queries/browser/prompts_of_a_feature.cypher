// Where one feature fires: the 20 prompts in which it is strongest
// Put a feature's id between the quotes; without one, a feature that is the root of a circuit is taken.
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
