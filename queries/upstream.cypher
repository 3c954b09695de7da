// What drives a feature, over every prompt it is a node in, or one node of one prompt, up to six steps back?
//
// Parameters:
//   feature: feature = null; e.g. "mini/2/mlp/812"; the feature to start from; this or node
//   node: node = null; e.g. "4f1c09d2a6b8e735/9/2/mlp/812"; the node to start from; this or feature
//   hops: integer 1..6 = 2; e.g. 3; how many steps to go back
//   min_share: float 0.. = 0.05; e.g. 0.1; follow edges of at least this share of their target, of either sign
//   via: DIRECT|OV = null; e.g. "OV"; follow edges of this kind only
//   limit: integer 1.. = 200; e.g. 50; the most rows to return
//
// Columns, nearest first and then by how many prompts show it:
//   hop*: integer; steps from the start: 1 drives it, 2 drives what drives it
//   source*: string; id of the driving feature, or what it is otherwise: a token's embedding, a layer's error
//   source_kind: string; MLP, Attn, Embedding, PositionEmbedding, Error or Bias
//   source_label*: string; the feature's label, where it has one
//   target*: string; id of the driven feature, or the logit's name
//   target_kind: string; MLP, Attn or Logit
//   target_label: string; the feature's label, where it has one
//   via*: string; DIRECT or OV
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   n_prompts*: integer; prompts in which this edge was followed
//   n_edges: integer; edges in them
//   mean_weight: float; mean of what the source adds to the target's pre-activation
//   mean_share*: float; mean of that over the target's pre-activation; negative works against it
//
// In Neo4j Browser, first:
//   :param {feature: "mini/2/mlp/812", node: null, hops: 3, min_share: 0.1, via: null, limit: 50}

CALL () {
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (:Feature {id: id})<-[:OF]-(n:CircuitNode)
  RETURN n
  UNION
  WITH $node AS id
  WHERE id IS NOT NULL
  MATCH (n:CircuitNode {id: id})
  RETURN n
}
WITH collect(n) AS start
CALL (start) {
  UNWIND start AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE ($via IS NULL OR type(e) = $via) AND abs(e.weight) >= $min_share * abs(t.pre_activation)
  RETURN collect(e) AS edges1, collect(DISTINCT s) AS near1
}
CALL (edges1) {
  // The rows of one step come first: where they are `limit` already, no further step is taken.
  UNWIND edges1 AS e
  WITH e, startNode(e) AS s
  MATCH (s)-[:OF]->(f:Feature)
  WITH DISTINCT f, type(e) AS via, e.layer AS layer, e.head AS head
  LIMIT toInteger($limit)
  RETURN count(*) AS n_rows1
}
CALL (near1, n_rows1) {
  UNWIND CASE WHEN $hops >= 2 AND n_rows1 < $limit THEN near1 ELSE [] END AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE ($via IS NULL OR type(e) = $via) AND abs(e.weight) >= $min_share * abs(t.pre_activation)
  RETURN collect(e) AS edges2, collect(DISTINCT s) AS near2
}
CALL (near2) {
  UNWIND CASE WHEN $hops >= 3 THEN near2 ELSE [] END AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE ($via IS NULL OR type(e) = $via) AND abs(e.weight) >= $min_share * abs(t.pre_activation)
  RETURN collect(e) AS edges3, collect(DISTINCT s) AS near3
}
CALL (near3) {
  UNWIND CASE WHEN $hops >= 4 THEN near3 ELSE [] END AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE ($via IS NULL OR type(e) = $via) AND abs(e.weight) >= $min_share * abs(t.pre_activation)
  RETURN collect(e) AS edges4, collect(DISTINCT s) AS near4
}
CALL (near4) {
  UNWIND CASE WHEN $hops >= 5 THEN near4 ELSE [] END AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE ($via IS NULL OR type(e) = $via) AND abs(e.weight) >= $min_share * abs(t.pre_activation)
  RETURN collect(e) AS edges5, collect(DISTINCT s) AS near5
}
CALL (near5) {
  UNWIND CASE WHEN $hops >= 6 THEN near5 ELSE [] END AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE ($via IS NULL OR type(e) = $via) AND abs(e.weight) >= $min_share * abs(t.pre_activation)
  RETURN collect(e) AS edges6
}
UNWIND [[1, edges1], [2, edges2], [3, edges3], [4, edges4], [5, edges5], [6, edges6]] AS step
UNWIND step[1] AS e
WITH e, min(step[0]) AS hop
// Once for each target, however many edges it has.
WITH endNode(e) AS t, collect([e, hop]) AS edges
OPTIONAL MATCH (t)-[:OF]->(g:Feature)
UNWIND edges AS edge
WITH edge[0] AS e, edge[1] AS hop, startNode(edge[0]) AS s, t, g
OPTIONAL MATCH (s:Embedding)-[:AT]->(token:Token)
OPTIONAL MATCH (s)-[:OF]->(f:Feature)
WITH e, hop, s, t, f, g, token,
     [label IN labels(s) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS source_kind,
     [label IN labels(t) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS target_kind
WITH hop,
     CASE
       WHEN f IS NOT NULL THEN f.id
       WHEN source_kind = 'Embedding' THEN 'embedding of "' + token.text + '"'
       WHEN source_kind = 'PositionEmbedding' THEN 'position ' + s.position
       ELSE 'L' + s.layer + ' ' + s.site + ' ' + toLower(source_kind)
     END AS source,
     source_kind,
     f.label AS source_label,
     CASE WHEN g IS NOT NULL THEN g.id ELSE t.name END AS target,
     target_kind,
     g.label AS target_label,
     type(e) AS via,
     e.layer AS layer,
     e.head AS head,
     e.weight AS weight,
     CASE WHEN t.pre_activation <> 0 THEN e.weight / t.pre_activation END AS share,
     s.prompt AS prompt
WITH hop, source, source_kind, source_label, target, target_kind, target_label, via, layer, head,
     count(DISTINCT prompt) AS n_prompts,
     count(*) AS n_edges,
     avg(weight) AS mean_weight,
     avg(share) AS mean_share
RETURN hop, source, source_kind, source_label, target, target_kind, target_label, via, layer, head,
       n_prompts, n_edges, mean_weight, mean_share
ORDER BY hop, n_prompts DESC, abs(mean_share) DESC, source, target, via, head
LIMIT toInteger($limit)
