// Which circuits are made of the same features as a circuit, each feature weighted by what it gives to the root?
//
// Parameters:
//   circuit: circuit; e.g. "4f1c09d2a6b8e735/9/2/mlp/812/relative"; id of the circuit
//   among: integer 1.. = 100; e.g. 300; look for others by its rarest features, which fire in this many prompts in all; with more the nearest is missed less often
//   limit: integer 1.. = 20; e.g. 50; the most rows to return
//
// Columns, the most similar first:
//   circuit*: string; id of the other circuit
//   prompt: string; id of its prompt
//   task*: string; the prompt's task
//   text*: string; the prompt
//   root_name*: string; name of the node that it explains
//   n_shared*: integer; features that both include
//   shared*: float; sum over those of the smaller of both weights: |attribution| over |the root's value|
//   similarity*: float; shared over the sum of the larger of both weights over all features; 1 for equal circuits
//
// In Neo4j Browser, first:
//   :param {circuit: "4f1c09d2a6b8e735/9/2/mlp/812/relative", among: 100, limit: 20}

MATCH (c:Circuit {id: $circuit})-[part:INCLUDES]->(:Activation)-[:OF]->(f:Feature)
WHERE c.root_value <> 0
WITH c, f, sum(abs(part.attribution / c.root_value)) AS own
WITH c, f, own, coalesce(f.n_prompts, 0) AS n_prompts
ORDER BY n_prompts, f.id
WITH c, sum(own) AS ours, collect(f) AS features, collect(own) AS weights, collect(n_prompts) AS counts
CALL (c, features, counts) {
  UNWIND range(0, size(features) - 1) AS i
  WITH c, features[i] AS f, i, reduce(n = 0, k IN counts[0..i + 1] | n + k) AS n_prompts
  WHERE i = 0 OR n_prompts <= $among
  MATCH (f)<-[:OF]-(n:Activation)
  MATCH (n)<-[:INCLUDES]-(d:Circuit)
  WHERE d.id <> c.id AND d.root_value <> 0 AND NOT d:MultiToken
  RETURN collect(DISTINCT d) AS others
}
UNWIND others AS d
CALL (d, features, weights) {
  WITH d, features, weights, d.root_value AS root_value
  MATCH (d)-[part:INCLUDES]->(n:Activation)
  MATCH (n)-[:OF]->(g:Feature)
  WITH features, weights, g, sum(abs(part.attribution / root_value)) AS other
  WITH other, CASE WHEN g IN features THEN [i IN range(0, size(features) - 1) WHERE features[i] = g | weights[i]][0] END AS own
  RETURN sum(other) AS theirs, count(own) AS n_shared,
         sum(CASE WHEN own < other THEN own WHEN own IS NOT NULL THEN other ELSE 0.0 END) AS shared
}
WITH d, n_shared, shared, shared / (ours + theirs - shared) AS similarity
ORDER BY similarity DESC, d.id
LIMIT toInteger($limit)
MATCH (d)<-[:HAS_CIRCUIT]-(p:Prompt)
MATCH (d)-[:ROOT]->(root:CircuitNode)
RETURN d.id AS circuit,
       p.id AS prompt,
       p.task AS task,
       p.text AS text,
       root.name AS root_name,
       n_shared,
       shared,
       similarity
ORDER BY similarity DESC, circuit
