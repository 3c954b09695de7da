// Which features feed which in many prompts: A -> B, or A -> B -> C in one and the same prompt?
//
// Parameters:
//   min_prompts: integer 1.. = 2; e.g. 5; the fewest prompts that show it
//   length: integer 2..3 = 2; e.g. 3; features of the motif: 2 for A -> B, 3 for A -> B -> C
//   feature: feature = null; e.g. "mini/2/mlp/812"; motifs with this feature only: as A or B, in length 3 as B
//   via: DIRECT|OV = null; e.g. "OV"; edges of this kind only
//   among: integer 1..10000 = 300; e.g. 1000; length 3 joins this many pairs, those that most prompts show
//   limit: integer 1.. = 50; e.g. 20; the most rows to return; length 3 counts this many chains
//
// Columns, those that most prompts show first:
//   a*: string; id of the first feature
//   a_label: string; its label, where it has one
//   ab*: string; how it feeds the second: DIRECT, or the head as L2.H3
//   b*: string; id of the second feature
//   b_label: string; its label, where it has one
//   bc*: string; how that feeds the third: DIRECT, or the head; length 3 only
//   c*: string; id of the third feature, length 3 only
//   c_label: string; its label, where it has one
//   n_prompts*: integer; prompts that show the motif
//   n_edges: integer; edges A -> B in all prompts, or for length 3 pairs of edges that meet in a node of B
//   mean_share*: float; mean share of the target's pre-activation; for length 3 of the product of both shares
//
// In Neo4j Browser, first:
//   :param {min_prompts: 5, length: 2, feature: null, via: null, among: 300, limit: 20}

// The most common pairs of the whole store, if no feature is given: in 16 prompts or more. At a query's beginning, with
// keys made by functions alone, both engines find them by an index; left() is null without a feature.
MATCH (a)-[r:FEEDS]->(b)
WHERE r.log2_prompts IN range(4, size(coalesce(left($feature, 0), '..............................')))
  AND r.n_prompts >= $min_prompts AND ($via IS NULL OR r.via = $via)
WITH a, r, b
ORDER BY r.n_prompts DESC, abs(r.mean_share) DESC, a.id, b.id, r.head
LIMIT toInteger(CASE WHEN $length = 2 THEN $limit ELSE $among END)
WITH collect(r) AS common
CALL (common) {
  UNWIND common AS r
  RETURN r, startNode(r).id AS a, endNode(r).id AS b
  UNION ALL
  // Where these are too few, all of them.
  UNWIND CASE WHEN $feature IS NULL AND size(common) < CASE WHEN $length = 2 THEN $limit ELSE $among END
              THEN [true] ELSE [] END AS more
  MATCH (a:Feature)-[r:FEEDS]->(b:Feature)
  WHERE r.n_prompts >= $min_prompts AND r.n_prompts < 16 AND ($via IS NULL OR r.via = $via)
  RETURN r, a.id AS a, b.id AS b
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (a:Feature {id: id})-[r:FEEDS]->(b:Feature)
  RETURN r, a.id AS a, b.id AS b
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (b:Feature {id: id})<-[r:FEEDS]-(a:Feature)
  RETURN r, a.id AS a, b.id AS b
}
WITH r, a, b
WHERE r.n_prompts >= $min_prompts AND ($via IS NULL OR r.via = $via)
WITH r, a, b
ORDER BY r.n_prompts DESC, abs(r.mean_share) DESC, a, b, r.head
LIMIT CASE WHEN $length = 2 THEN toInteger($limit) ELSE toInteger($among) END
WITH collect(r) AS pairs
CALL (pairs) {
  UNWIND CASE WHEN $length = 2 THEN pairs ELSE [] END AS r
  RETURN startNode(r) AS a, r, endNode(r) AS b, null AS q, null AS c,
         r.n_prompts AS n_prompts, r.n_edges AS n_edges, r.mean_share AS mean_share
  UNION ALL
  UNWIND CASE WHEN $length = 3 THEN pairs ELSE [] END AS pair
  UNWIND [{b: endNode(pair), r: pair}, {b: startNode(pair), q: pair}] AS at
  WITH at.b AS b, collect(at.r) AS before, collect(at.q) AS after
  UNWIND before AS r
  UNWIND after AS q
  // No more prompts can show both than show the rarer one.
  WITH r, q, startNode(r) AS a, b, endNode(q) AS c,
       CASE WHEN r.n_prompts < q.n_prompts THEN r.n_prompts ELSE q.n_prompts END AS most
  ORDER BY most DESC, a.id, b.id, c.id, r.head, q.head
  LIMIT toInteger($limit)
  // Once along the edges of every node of B, whatever the number of chains through B; by head and layer most of them
  // are told apart before the feature at their other end is looked at.
  WITH r, a, b, q, c, coalesce(r.head, -1) AS head_ab, coalesce(q.head, -1) AS head_bc
  WITH b, collect({a: a, r: r, via_ab: r.via, head_ab: head_ab, q: q, via_bc: q.via, head_bc: head_bc, c: c}) AS chains,
       collect(DISTINCT a) AS firsts, collect(DISTINCT a.layer) AS layers_a, collect(DISTINCT head_ab) AS heads_ab,
       collect(DISTINCT c) AS lasts, collect(DISTINCT c.layer) AS layers_c, collect(DISTINCT head_bc) AS heads_bc
  MATCH (b)<-[:OF]-(v:Activation)
  MATCH (v)<-[e:DIRECT|OV]-(u:Activation)
  WHERE coalesce(e.head, -1) IN heads_ab AND u.layer IN layers_a
  MATCH (u)-[:OF]->(x:Feature)
  WHERE x IN firsts
  MATCH (v)-[f:DIRECT|OV]->(w:Activation)
  WHERE coalesce(f.head, -1) IN heads_bc AND w.layer IN layers_c
  MATCH (w)-[:OF]->(y:Feature)
  WHERE y IN lasts
  WITH x AS a, b, y AS c, v, e, f, w,
       [chain IN chains WHERE chain.a = x AND chain.c = y
         AND chain.via_ab = type(e) AND chain.head_ab = coalesce(e.head, -1)
         AND chain.via_bc = type(f) AND chain.head_bc = coalesce(f.head, -1)] AS matching
  UNWIND matching AS chain
  WITH a, chain.r AS r, b, chain.q AS q, c, v.prompt AS prompt,
       CASE WHEN v.pre_activation <> 0 AND w.pre_activation <> 0
            THEN e.weight / v.pre_activation * f.weight / w.pre_activation ELSE 0.0 END AS share
  WITH a, r, b, q, c, count(DISTINCT prompt) AS n_prompts, count(*) AS n_edges, avg(share) AS mean_share
  WHERE n_prompts >= $min_prompts
  RETURN a, r, b, q, c, n_prompts, n_edges, mean_share
}
RETURN a.id AS a,
       a.label AS a_label,
       CASE WHEN r.via = 'OV' THEN 'L' + r.layer + '.H' + r.head ELSE r.via END AS ab,
       b.id AS b,
       b.label AS b_label,
       CASE WHEN q.via = 'OV' THEN 'L' + q.layer + '.H' + q.head ELSE q.via END AS bc,
       c.id AS c,
       c.label AS c_label,
       n_prompts,
       n_edges,
       mean_share
ORDER BY n_prompts DESC, abs(mean_share) DESC, a, b, c, ab, bc
