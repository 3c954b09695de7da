// Which paths carry most from the tokens, or from one feature, to a circuit's root, and through which heads?
//
// Parameters:
//   circuit: circuit; e.g. "4f1c09d2a6b8e735/9/2/mlp/812/relative"; id of the circuit
//   source: feature = null; e.g. "mini/0/mlp/95"; paths that begin at this feature, instead of at a token's embedding
//   hops: integer 1..8 = 6; e.g. 4; the most edges of a path
//   min_product: float 0.. = 0.005; e.g. 0.01; the least product of shares, of the path and of each of its ends
//   limit: integer 1.. = 10; e.g. 20; how many paths
//
// Columns, strongest first:
//   product*: float; product of the shares that each edge has of its target's pre-activation, with its sign
//   n_hops*: integer; edges of the path
//   path*: string; the nodes from source to root, and the head of each OV edge
//   nodes: list; ids of the nodes
//   heads: list; "L2.H3" of each OV edge, "" of each DIRECT one
//   shares: list; the share of each edge
//
// In Neo4j Browser, first:
//   :param {circuit: "4f1c09d2a6b8e735/9/2/mlp/812/relative", source: null, hops: 6, min_product: 0.005, limit: 10}

MATCH (c:Circuit {id: $circuit})-[:ROOT]->(root:CircuitNode)
WITH c, [{product: 1.0, edges: [], node: root}] AS paths0
CALL (c, paths0) {
  UNWIND CASE WHEN $hops >= 1 THEN paths0 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths1
}
CALL (c, paths1) {
  UNWIND CASE WHEN $hops >= 2 THEN paths1 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths2
}
CALL (c, paths2) {
  UNWIND CASE WHEN $hops >= 3 THEN paths2 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths3
}
CALL (c, paths3) {
  UNWIND CASE WHEN $hops >= 4 THEN paths3 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths4
}
CALL (c, paths4) {
  UNWIND CASE WHEN $hops >= 5 THEN paths4 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths5
}
CALL (c, paths5) {
  UNWIND CASE WHEN $hops >= 6 THEN paths5 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths6
}
CALL (c, paths6) {
  UNWIND CASE WHEN $hops >= 7 THEN paths6 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths7
}
CALL (c, paths7) {
  UNWIND CASE WHEN $hops >= 8 THEN paths7 ELSE [] END AS path
  WITH c, path, path.node AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)<-[:INCLUDES]-(c)
  WHERE abs(path.product * e.weight) >= $min_product * abs(t.pre_activation) AND t.pre_activation <> 0
  RETURN collect({product: path.product * e.weight / t.pre_activation, edges: [e] + path.edges, node: s}) AS paths8
}
WITH paths1 + paths2 + paths3 + paths4 + paths5 + paths6 + paths7 + paths8 AS paths
UNWIND paths AS path
WITH path.product AS product, path.edges AS edges, path.node AS node
OPTIONAL MATCH (node)-[:OF]->(f:Feature)
WITH product, edges, node, f
WHERE f.id = $source OR ($source IS NULL AND node:Embedding)
WITH product, edges, [node.id] + [e IN edges | endNode(e).id] AS nodes, node.name AS first,
     [e IN edges | CASE WHEN e.head IS NULL THEN '' ELSE 'L' + e.layer + '.H' + e.head END] AS heads
ORDER BY abs(product) DESC, nodes, heads
LIMIT toInteger($limit)
RETURN product,
       size(edges) AS n_hops,
       first + reduce(text = '', i IN range(0, size(edges) - 1) |
         text + CASE WHEN heads[i] = '' THEN ' → ' ELSE ' →' + heads[i] + '→ ' END + endNode(edges[i]).name) AS path,
       nodes,
       heads,
       [e IN edges | e.weight / endNode(e).pre_activation] AS shares
ORDER BY abs(product) DESC, nodes, heads
