// What feeds one feature
// Over all prompts: the 8 features that most often feed it, and the 8 that most often feed each of those.
// Put a feature's id between the quotes; without one, the one that is fed in most prompts is taken.
WITH '' AS given
CALL (given) {
  MATCH (f:Feature {id: given})
  RETURN f
  UNION
  UNWIND CASE WHEN given = '' THEN [true] ELSE [] END AS any
  MATCH (:Feature)-[feeds:FEEDS]->(f:Feature)
  WITH f, feeds ORDER BY feeds.n_prompts DESC, f.id LIMIT 1
  RETURN f
}
CALL (f) {
  MATCH (near:Feature)-[first:FEEDS]->(f)
  RETURN near, first
  ORDER BY first.n_prompts DESC, abs(first.mean_share) DESC, near.id
  LIMIT 8
}
CALL (near) {
  OPTIONAL MATCH (far:Feature)-[second:FEEDS]->(near)
  RETURN far, second
  ORDER BY second.n_prompts DESC, abs(second.mean_share) DESC, far.id
  LIMIT 8
}
RETURN f, first, near, second, far
