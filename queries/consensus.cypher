// Which features and which edges between them are part of most circuits of a task?
//
// Parameters:
//   task: task; e.g. "capitals"; the prompts' task
//   min_share: float 0..1 = 0.5; e.g. 0.8; the least share of the task's circuits
//   rule: paper|relative|support|top_mass = null; e.g. "relative"; circuits of this rule only
//   limit: integer 1.. = 200; e.g. 50; the most rows to return
//
// Columns, features first, the most common first:
//   part*: string; node or edge
//   source*: string; id of the feature, or of the one that writes
//   source_label*: string; its label, where it has one
//   target*: string; id of the feature that reads, edges only
//   target_label*: string; its label, where it has one
//   via*: string; DIRECT or OV, edges only
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   n_circuits*: integer; circuits that have it
//   share_of_circuits*: float; those over all circuits of the task
//   mean_share*: float; mean over those of what it gives: a node to the root's value, an edge to its targets
//
// In Neo4j Browser, first:
//   :param {task: "capitals", min_share: 0.5, rule: "relative", limit: 50}

MATCH (:Prompt {task: $task})-[:HAS_CIRCUIT]->(c:Circuit)
WHERE NOT c:MultiToken AND ($rule IS NULL OR c.rule = $rule)
WITH collect(c) AS circuits, count(c) AS n_all
CALL (circuits) {
  UNWIND circuits AS c
  MATCH (c)-[part:INCLUDES]->(:CircuitNode)-[:OF]->(f:Feature)
  WITH f, c, CASE WHEN c.root_value <> 0 THEN part.attribution / c.root_value ELSE 0.0 END AS share
  RETURN 'node' AS part, f, null AS g, null AS via, null AS layer, null AS head,
         count(DISTINCT c) AS n_circuits, sum(share) AS share
  UNION ALL
  UNWIND circuits AS c
  MATCH (c)-[:INCLUDES]->(n:CircuitNode)
  WITH c, collect(n) AS members
  UNWIND members AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE s IN members
  MATCH (s)-[:OF]->(f:Feature)
  MATCH (t)-[:OF]->(g:Feature)
  WITH f, g, c, e, CASE WHEN t.pre_activation <> 0 THEN e.weight / t.pre_activation ELSE 0.0 END AS share
  RETURN 'edge' AS part, f, g, type(e) AS via, e.layer AS layer, e.head AS head,
         count(DISTINCT c) AS n_circuits, sum(share) AS share
}
WITH n_all, part, f, g, via, layer, head, n_circuits, share
WHERE n_circuits >= $min_share * n_all
RETURN part,
       f.id AS source,
       f.label AS source_label,
       g.id AS target,
       g.label AS target_label,
       via,
       layer,
       head,
       n_circuits,
       toFloat(n_circuits) / n_all AS share_of_circuits,
       share / n_circuits AS mean_share
ORDER BY part DESC, n_circuits DESC, abs(mean_share) DESC, source, target, via, head
LIMIT toInteger($limit)
