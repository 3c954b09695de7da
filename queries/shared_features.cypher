// Which features are part of the circuits of many of a task's prompts (multi-token circuits aside)?
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

// What the task's circuits have in common is stored: see TaskPart in docs/SCHEMA.md.
MATCH (t:TaskPart {id: 'circuits in ' + $task})
WITH t.log2_circuits AS most, CASE WHEN $rule IS NULL THEN t.n_prompts ELSE
       reduce(n = 0, i IN range(0, size(t.rules) - 1) |
         n + CASE WHEN t.rules[i] = $rule THEN t.n_prompts_by_rule[i] ELSE 0 END) END AS n_task_prompts
WITH n_task_prompts, most, $min_share_of_prompts * n_task_prompts AS least
// Each of these prompts has a circuit that includes the feature.
UNWIND range(CASE WHEN least >= 1 THEN toInteger(floor(log(least) / log(2) - 1e-9)) ELSE 0 END, most) AS k
MATCH (t:TaskPart {task: $task, log2_circuits: k})
WHERE t.part = 'node'
WITH n_task_prompts, least, t, CASE WHEN $rule IS NULL THEN [
       t.n_circuits, t.n_prompts, t.n_prompts_as_root, t.n_shares, t.total_share
     ] ELSE [i IN range(0, size(t.rules) - 1) WHERE t.rules[i] = $rule | [
       t.n_circuits_by_rule[i], t.n_prompts_by_rule[i], t.n_prompts_as_root_by_rule[i], t.n_shares_by_rule[i],
       t.total_share_by_rule[i]
     ]][0] END AS sums
WITH n_task_prompts, least, t, sums[0] AS n_circuits, sums[1] AS n_prompts, sums[2] AS n_prompts_as_root,
     CASE WHEN sums[3] > 0 THEN sums[4] / sums[3] END AS mean_share
WHERE n_prompts >= least
MATCH (f:Feature {id: t.source})
WHERE ($layer IS NULL OR f.layer = $layer) AND ($site IS NULL OR f.site = $site)
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
