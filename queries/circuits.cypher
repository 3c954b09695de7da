// Which circuits are stored: all of them, or those of a prompt, a task or a rule, or those that a feature is part of?
//
// Parameters:
//   prompt: prompt = null; e.g. "4f1c09d2a6b8e735"; id of a prompt
//   feature: feature = null; e.g. "mini/2/mlp/812"; a feature that the circuits include
//   task: task = null; e.g. "capitals"; the prompts' task
//   rule: paper|relative|support|top_mass = null; e.g. "relative"; the rule that kept the nodes
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, those with completeness nearest to 1 first:
//   circuit*: string; id of the circuit
//   prompt: string; id of its prompt
//   task*: string; the prompt's task
//   text*: string; the prompt
//   root: string; id of the node that the circuit explains
//   root_name*: string; its name
//   root_kind: string; MLP, Attn or Logit
//   root_position: integer; its position in the prompt
//   root_token: string; the token at that position
//   rule: string; the rule that kept the nodes
//   threshold: float; the rule's threshold
//   n_nodes*: integer; nodes, the root among them
//   n_edges*: integer; edges between them
//   root_value: float; the root's value, or its logit
//   completeness*: float; share of the root that embeddings, biases and constants explain; above 1 where the rest works against it
//   error_share*: float; share that comes through reconstruction errors
//   pruned_share*: float; share that comes through nodes that were not kept
//
// In Neo4j Browser, first:
//   :param {prompt: null, feature: null, task: null, rule: "relative", limit: 20}

// One way in, by the narrowest thing that is given.
CALL () {
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (:Feature {id: id})<-[:OF]-(:CircuitNode)<-[:INCLUDES]-(c:Circuit)
  RETURN c
  UNION
  UNWIND CASE WHEN $feature IS NULL AND $prompt IS NOT NULL THEN [$prompt] ELSE [] END AS id
  MATCH (c:Circuit {prompt: id})
  RETURN c
  UNION
  UNWIND CASE WHEN coalesce($feature, $prompt) IS NULL AND $task IS NOT NULL THEN [$task] ELSE [] END AS task
  MATCH (:Prompt {task: task})-[:HAS_CIRCUIT]->(c:Circuit)
  RETURN c
  UNION
  UNWIND CASE WHEN coalesce($feature, $prompt, $task) IS NULL THEN [true] ELSE [] END AS everything
  MATCH (c:Circuit)
  RETURN c
}
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c)
WHERE NOT c:MultiToken
  AND ($rule IS NULL OR c.rule = $rule)
  AND ($prompt IS NULL OR p.id = $prompt)
  AND ($task IS NULL OR p.task = $task)
WITH p, c
ORDER BY abs(1 - c.completeness), c.id
LIMIT toInteger($limit)
MATCH (c)-[:ROOT]->(root:CircuitNode)-[:AT]->(token:Token)
RETURN c.id AS circuit,
       p.id AS prompt,
       p.task AS task,
       p.text AS text,
       root.id AS root,
       root.name AS root_name,
       [label IN labels(root) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS root_kind,
       root.position AS root_position,
       token.text AS root_token,
       c.rule AS rule,
       c.threshold AS threshold,
       c.n_nodes AS n_nodes,
       c.n_edges AS n_edges,
       c.root_value AS root_value,
       c.completeness AS completeness,
       c.error_share AS error_share,
       c.pruned_share AS pruned_share
ORDER BY abs(1 - completeness), circuit
