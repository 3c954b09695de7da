// Where does reconstruction error take the share of circuits: at which layer and site, and in which task?
//
// Parameters:
//   task: task = null; e.g. "capitals"; this task only
//   rule: paper|relative|support|top_mass = null; e.g. "relative"; circuits of this rule only
//
// Columns, the largest first:
//   task*: string; the prompts' task
//   layer*: integer; the layer
//   site*: string; attn or mlp
//   n_circuits*: integer; circuits of the task
//   n_with*: integer; those of them in which an error of this layer and site has a part
//   mean_share*: float; mean over all circuits of the errors' attribution over the root's value
//   mean_size*: float; the same with every attribution taken positive: how much goes through errors at all
//
// In Neo4j Browser, first:
//   :param {task: null, rule: "relative"}

CALL () {
  WITH $task AS task
  WHERE task IS NOT NULL
  MATCH (p:Prompt {task: task})-[:HAS_CIRCUIT]->(c:Circuit)
  RETURN p.task AS task, c
  UNION ALL
  UNWIND CASE WHEN $task IS NULL THEN [true] ELSE [] END AS everything
  MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit)
  RETURN p.task AS task, c
}
WITH task, c
WHERE NOT c:MultiToken AND ($rule IS NULL OR c.rule = $rule)
WITH task, collect(c) AS circuits, count(c) AS n_circuits
UNWIND circuits AS c
MATCH (c)-[part:INCLUDES]->(e:Error)
WHERE c.root_value <> 0
WITH task, n_circuits, e.layer AS layer, e.site AS site, c, part.attribution / c.root_value AS share
WITH task, n_circuits, layer, site, count(DISTINCT c) AS n_with, sum(share) AS share, sum(abs(share)) AS size
RETURN task,
       layer,
       site,
       n_circuits,
       n_with,
       share / n_circuits AS mean_share,
       size / n_circuits AS mean_size
ORDER BY mean_size DESC, task, layer, site
