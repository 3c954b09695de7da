// Which circuits does the real model agree with, by their measured faithfulness?
//
// Parameters:
//   task: task = null; e.g. "capitals"; the prompts' task
//   rule: paper|relative|support|top_mass = null; e.g. "relative"; circuits of this rule only
//   min_faithfulness: float 0.. = null; e.g. 0.8; the least faithfulness
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, the most faithful first:
//   circuit*: string; id of the circuit
//   prompt: string; id of its prompt
//   task*: string; the prompt's task
//   text*: string; the prompt
//   root_name*: string; name of the node that it explains
//   rule: string; the rule that kept the nodes
//   threshold: float; the rule's threshold
//   n_nodes*: integer; nodes, the root among them
//   ablation: string; what stood in for ablated features: mean, zero or resample
//   faithfulness*: float; share of the root's value that is left with all features outside the circuit ablated
//   random_faithfulness*: float; the same for random features, as many
//   top_faithfulness*: float; the same for the strongest of direct attribution, as many
//   necessity*: float; share of the root's value that goes with the circuit's features ablated
//   random_necessity: float; the same for random features
//   top_necessity: float; the same for the strongest of direct attribution
//
// In Neo4j Browser, first:
//   :param {task: null, rule: "relative", min_faithfulness: null, limit: 20}

CALL () {
  WITH $task AS task
  WHERE task IS NOT NULL
  MATCH (p:Prompt {task: task})-[:HAS_CIRCUIT]->(c:Circuit)
  RETURN p, c
  UNION ALL
  UNWIND CASE WHEN $task IS NULL THEN [true] ELSE [] END AS everything
  MATCH (p:Prompt)-[:HAS_CIRCUIT]->(c:Circuit)
  RETURN p, c
}
WITH p, c
WHERE c.faithfulness IS NOT NULL
  AND ($rule IS NULL OR c.rule = $rule)
  AND ($min_faithfulness IS NULL OR c.faithfulness >= $min_faithfulness)
WITH p, c
ORDER BY c.faithfulness DESC, c.id
LIMIT toInteger($limit)
MATCH (c)-[:ROOT]->(root:CircuitNode)
RETURN c.id AS circuit,
       p.id AS prompt,
       p.task AS task,
       p.text AS text,
       root.name AS root_name,
       c.rule AS rule,
       c.threshold AS threshold,
       c.n_nodes AS n_nodes,
       c.ablation AS ablation,
       c.faithfulness AS faithfulness,
       c.random_faithfulness AS random_faithfulness,
       c.top_faithfulness AS top_faithfulness,
       c.necessity AS necessity,
       c.random_necessity AS random_necessity,
       c.top_necessity AS top_necessity
ORDER BY faithfulness DESC, circuit
