// Which pairs of features does a head serve across all prompts: what it carries from A to B, and what makes it look?
//
// Parameters:
//   layer: integer 0..; e.g. 2; the head's layer
//   head: integer 0..; e.g. 3; the head
//   via: OV|QK = null; e.g. "OV"; OV for what it carries only, QK for what makes it look only
//   min_prompts: integer 1.. = 1; e.g. 3; the fewest prompts that show the pair
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, those that most prompts show first:
//   via*: string; OV where the head carries from source to target; QK where the two add to the score by which target looks at source, or take from it
//   source*: string; id of the feature at the key, whose token is looked at
//   source_label*: string; its label, where it has one
//   target*: string; id of the feature at the query
//   target_label*: string; its label, where it has one
//   n_prompts*: integer; prompts that show the pair
//   n_edges*: integer; edges in them
//   mean*: float; mean weight (OV), or mean part of the score (QK)
//   mean_share*: float; mean of the weight over the target's pre-activation, OV only
//
// In Neo4j Browser, first:
//   :param {layer: 2, head: 3, via: null, min_prompts: 1, limit: 20}

// At the query's beginning both engines find these by an index.
MATCH (a)-[r:FEEDS]->(b)
WHERE r.layer = $layer AND r.head = $head AND r.n_prompts >= $min_prompts AND coalesce($via, 'OV') = 'OV'
WITH a, r, b
ORDER BY r.n_prompts DESC, abs(r.mean_weight) DESC, a.id, b.id
LIMIT toInteger($limit)
WITH collect(r) AS carried
CALL (carried) {
  UNWIND carried AS r
  WITH startNode(r) AS a, r, endNode(r) AS b
  RETURN 'OV' AS via, a, b, r.n_prompts AS n_prompts, r.n_edges AS n_edges, r.mean_weight AS mean,
         r.mean_share AS mean_share
  UNION ALL
  UNWIND CASE WHEN coalesce($via, 'QK') = 'QK' THEN [$layer] ELSE [] END AS layer
  MATCH (score:AttentionScore {layer: layer, head: $head})
  MATCH (score)-[:KEY]->(there:Token)
  MATCH (there)<-[:AT]-(u:Activation)
  MATCH (u)-[e:QK]->(v:Activation)
  WHERE e.layer = score.layer AND e.head = score.head AND v.position = score.query
  MATCH (u)-[:OF]->(a:Feature)
  MATCH (v)-[:OF]->(b:Feature)
  WITH a, b, count(DISTINCT u.prompt) AS n_prompts, count(e) AS n_edges, avg(e.score) AS mean
  WHERE n_prompts >= $min_prompts
  RETURN 'QK' AS via, a, b, n_prompts, n_edges, mean, null AS mean_share
}
RETURN via,
       a.id AS source,
       a.label AS source_label,
       b.id AS target,
       b.label AS target_label,
       n_prompts,
       n_edges,
       mean,
       mean_share
ORDER BY n_prompts DESC, abs(mean) DESC, source, target, via
LIMIT toInteger($limit)
