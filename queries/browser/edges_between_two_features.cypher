// Edges between two features
// Where A feeds B, in every prompt, with the tokens: the 25 strongest edges.
// Put two features' ids between the quotes; without them, the pair with an edge in most prompts is taken.
WITH '' AS a, '' AS b
CALL (a, b) {
  MATCH (f:Feature {id: a}), (g:Feature {id: b})
  RETURN f, g
  UNION
  UNWIND CASE WHEN a = '' OR b = '' THEN [true] ELSE [] END AS any
  MATCH (f:Feature)-[feeds:FEEDS]->(g:Feature)
  WITH f, g, feeds ORDER BY feeds.n_prompts DESC, f.id, g.id LIMIT 1
  RETURN f, g
}
MATCH (f)<-[:OF]-(s:CircuitNode)-[e:DIRECT|OV]->(t:CircuitNode)-[:OF]->(g)
WITH s, e, t
ORDER BY abs(e.weight) DESC, s.id, t.id
LIMIT 25
MATCH (s)-[there:AT]->(x:Token)
MATCH (t)-[here:AT]->(y:Token)
RETURN s, e, t, there, x, here, y
