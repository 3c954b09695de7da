// Which features are part of the circuits of many of a task's prompts?
//
// Parameters:
//   task: task; e.g. "capitals"; the prompts' task
//   min_share_of_prompts: float 0..1 = 0.5; e.g. 0.8; the least share of the task's prompts with circuits
//   layer: integer 0.. = null; e.g. 2; features of this layer only
//   site: attn|mlp = null; e.g. "mlp"; features of this site only
//   rule: paper|relative|support|top_mass = null; e.g. "relative"; circuits of this rule only
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, the most widely shared first:
//   feature*: string; id of the feature
//   label*: string; its label, where it has one
//   layer: integer; its layer
//   site: string; attn or mlp
//   index: integer; its place in its dictionary
//   n_prompts*: integer; prompts of which a circuit includes it
//   share_of_prompts*: float; n_prompts over the task's prompts that have circuits
//   n_prompts_as_root*: integer; those of them in which it is a circuit's root
//   n_circuits*: integer; circuits that include it
//   mean_share*: float; mean of what its nodes give to a root, over the root's value
//
// In Neo4j Browser, first:
//   :param {task: "capitals", min_share_of_prompts: 0.5, layer: null, site: null, rule: "relative", limit: 20}

MATCH (p:Prompt {task: $task})-[:HAS_CIRCUIT]->(c:Circuit)
WHERE $rule IS NULL OR c.rule = $rule
WITH collect(c) AS circuits, count(DISTINCT p) AS n_task_prompts
UNWIND circuits AS c
CALL (c) {
  MATCH (c)-[:ROOT]->(root:CircuitNode)
  RETURN collect(root) AS roots
}
MATCH (c)-[part:INCLUDES]->(n:CircuitNode)-[:OF]->(f:Feature)
WHERE ($layer IS NULL OR f.layer = $layer) AND ($site IS NULL OR f.site = $site)
WITH n_task_prompts, f, c,
     CASE WHEN n IN roots THEN c.prompt END AS root_prompt,
     CASE WHEN c.root_value <> 0 THEN part.attribution / c.root_value END AS share
WITH n_task_prompts, f,
     count(DISTINCT c.prompt) AS n_prompts,
     count(DISTINCT root_prompt) AS n_prompts_as_root,
     count(DISTINCT c) AS n_circuits,
     avg(share) AS mean_share
WHERE n_prompts >= $min_share_of_prompts * n_task_prompts
RETURN f.id AS feature,
       f.label AS label,
       f.layer AS layer,
       f.site AS site,
       f.index AS index,
       n_prompts,
       toFloat(n_prompts) / n_task_prompts AS share_of_prompts,
       n_prompts_as_root,
       n_circuits,
       mean_share
ORDER BY n_prompts DESC, abs(mean_share) DESC, feature
LIMIT toInteger($limit)
