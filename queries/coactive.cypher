// Which features fire on the same tokens as a feature, in the prompts on which it fires most strongly?
//
// Parameters:
//   feature: feature; e.g. "mini/2/mlp/812"; id of the feature
//   task: task = null; e.g. "capitals"; prompts of this task only
//   prompts: integer 1.. = 20; e.g. 50; how many prompts to look at, the strongest ones
//   limit: integer 1.. = 50; e.g. 20; the most rows to return
//
// Columns, the most similar first:
//   feature*: string; id of the other feature
//   label*: string; its label, where it has one
//   layer: integer; its layer
//   site: string; attn or mlp
//   n_prompts*: integer; of the prompts looked at, those in which the other fires on a token of the first
//   n_tokens*: integer; tokens in them on which both fire
//   overlap*: float; those over the tokens on which either of the two fires
//
// In Neo4j Browser, first:
//   :param {feature: "mini/2/mlp/812", task: null, prompts: 20, limit: 20}

MATCH (:Feature {id: $feature})-[e:FIRES_ON]->(p:Prompt)
WHERE $task IS NULL OR p.task = $task
WITH e, p
ORDER BY e.max DESC, p.id
LIMIT toInteger($prompts)
WITH collect({prompt: p, positions: e.positions}) AS fires, sum(size(e.positions)) AS n_own
UNWIND fires AS fire
WITH n_own, fire.prompt AS p, fire.positions AS positions
MATCH (p)<-[other:FIRES_ON]-(g:Feature)
WHERE g.id <> $feature
WITH n_own, g, size(other.positions) AS n_other, size([x IN other.positions WHERE x IN positions]) AS n_both
WITH n_own, g, sum(n_other) AS n_other, sum(n_both) AS n_both, sum(CASE WHEN n_both > 0 THEN 1 ELSE 0 END) AS n_prompts
WHERE n_both > 0
RETURN g.id AS feature,
       g.label AS label,
       g.layer AS layer,
       g.site AS site,
       n_prompts,
       n_both AS n_tokens,
       toFloat(n_both) / (n_own + n_other - n_both) AS overlap
ORDER BY overlap DESC, n_tokens DESC, feature
LIMIT toInteger($limit)
