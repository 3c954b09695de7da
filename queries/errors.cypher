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
//   n_with*: integer; those of them that keep an error of this layer and site
//   mean_share*: float; mean over all circuits of the kept errors' attribution over the root's value
//   mean_size*: float; the same with every attribution taken positive; errors that no circuit keeps are in error_share only
//
// In Neo4j Browser, first:
//   :param {task: null, rule: "relative"}

CALL () {
  WITH $task AS task
  WHERE task IS NOT NULL
  MATCH (p:Prompt {task: task})-[:HAS_CIRCUIT]->(c:Circuit)
  MATCH (c)-[part:INCLUDES]->(e:Error)
  RETURN p, c, part, e
  UNION ALL
  UNWIND CASE WHEN $task IS NULL THEN [true] ELSE [] END AS everything
  MATCH (e:Error)
  MATCH (e)<-[part:INCLUDES]-(c:Circuit)
  MATCH (c)<-[:HAS_CIRCUIT]-(p:Prompt)
  RETURN p, c, part, e
}
WITH p, c, part, e
WHERE NOT c:MultiToken AND ($rule IS NULL OR c.rule = $rule) AND c.root_value <> 0
WITH p.task AS task, e.layer AS layer, e.site AS site, c, part.attribution / c.root_value AS share
WITH task, layer, site, count(DISTINCT c) AS n_with, sum(share) AS share, sum(abs(share)) AS size
WITH task, collect({layer: layer, site: site, n_with: n_with, share: share, size: size}) AS places
CALL (task) {
  WITH task
  WHERE task IS NOT NULL
  MATCH (p:Prompt {task: task})
  RETURN p
  UNION ALL
  UNWIND CASE WHEN task IS NULL THEN [true] ELSE [] END AS without
  MATCH (p:Prompt)
  WHERE p.task IS NULL
  RETURN p
}
MATCH (p)-[:HAS_CIRCUIT]->(c:Circuit)
WHERE NOT c:MultiToken AND ($rule IS NULL OR c.rule = $rule)
WITH task, places, count(c) AS n_circuits
UNWIND places AS place
RETURN task,
       place.layer AS layer,
       place.site AS site,
       n_circuits,
       place.n_with AS n_with,
       place.share / n_circuits AS mean_share,
       place.size / n_circuits AS mean_size
ORDER BY mean_size DESC, task, layer, site
