// In which prompts does a feature fire, where, and how strongly?
//
// Parameters:
//   feature: feature; e.g. "mini/2/mlp/812"; id of the feature
//   task: task = null; e.g. "capitals"; prompts of this task only
//   limit: integer 1.. = 50; e.g. 20; the most rows to return
//
// Columns, strongest first:
//   prompt*: string; id of the prompt
//   task*: string; the prompt's task
//   max*: float; the strongest activation in it
//   n_positions*: integer; at how many positions it fires
//   positions: list; those positions
//   values: list; the activations there
//   tokens: list; the tokens there
//   text*: string; the prompt, with those tokens between « and »
//
// In Neo4j Browser, first:
//   :param {feature: "mini/2/mlp/812", task: null, limit: 20}

MATCH (:Feature {id: $feature})-[fires:FIRES_ON]->(p:Prompt)
WHERE $task IS NULL OR p.task = $task
WITH fires, p
ORDER BY fires.max DESC, p.id
LIMIT toInteger($limit)
CALL (p) {
  MATCH (p)-[:HAS_TOKEN]->(t:Token)
  WITH p, t
  ORDER BY t.position
  RETURN collect(t) AS tokens
}
RETURN p.id AS prompt,
       p.task AS task,
       fires.max AS max,
       size(fires.positions) AS n_positions,
       fires.positions AS positions,
       fires.values AS values,
       [t IN tokens WHERE t.position IN fires.positions | t.text] AS tokens,
       reduce(text = '', t IN tokens |
         text + CASE
           WHEN t.position IN fires.positions THEN '«' + t.text + '»'
           // the token that was put before the prompt is not part of its text
           WHEN t.position = 0 AND NOT p.text STARTS WITH t.text THEN ''
           ELSE t.text
         END) AS text
ORDER BY max DESC, prompt
