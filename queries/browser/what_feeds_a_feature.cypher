// What feeds one feature
// Over all prompts: the 6 features that most often feed it, and the 6 that most often feed each of those.
// Put a feature's id between the quotes; without one, the one of the last layer that is fed in most prompts is taken.
WITH '' AS given
CALL (given) {
  MATCH (f:Feature {id: given})
  RETURN f
  UNION
  UNWIND CASE WHEN given = '' THEN [true] ELSE [] END AS any
  MATCH (:Feature)-[feeds:FEEDS]->(f:Feature)
  WITH f, feeds ORDER BY f.layer DESC, feeds.n_prompts DESC, f.id LIMIT 1
  RETURN f
}
CALL (f) {
  MATCH (near:Feature)-[feeds:FEEDS]->(f)
  WITH near, max(feeds.n_prompts) AS times
  RETURN near
  ORDER BY times DESC, near.id
  LIMIT 6
}
CALL (near) {
  OPTIONAL MATCH (far:Feature)-[feeds:FEEDS]->(near)
  WITH far, max(feeds.n_prompts) AS times
  RETURN far
  ORDER BY times DESC, far.id
  LIMIT 6
}
MATCH (near)-[first:FEEDS]->(f)
OPTIONAL MATCH (far)-[second:FEEDS]->(near)
RETURN f, first, near, second, far
