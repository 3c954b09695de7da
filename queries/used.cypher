// Which features feed which in many stored prompts, and how strongly are they wired in the weights?
//
// Parameters:
//   show: all|weak = "weak"; e.g. "all"; only what is not among the strongest wires into its target, or all
//   feature: feature = null; e.g. "mini/2/mlp/812"; from or to this feature only
//   via: DIRECT|OV = null; e.g. "OV"; edges of this kind only
//   among: integer 1.. = 1000; e.g. 5000; how many pairs to look at, those that most prompts show
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, those that most prompts show first; only targets whose wiring was computed:
//   source*: string; id of the feature that writes
//   source_label*: string; its label, where it has one
//   target*: string; id of the feature that reads
//   target_label*: string; its label, where it has one
//   via*: string; DIRECT or OV
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   n_prompts*: integer; stored prompts in which the one feeds the other
//   mean_share*: float; mean share of the target's pre-activation in them
//   weight*: float; the virtual weight, where it is among the strongest into the target
//   rank*: integer; its place among those, from 1
//
// In Neo4j Browser, first:
//   :param {show: "weak", feature: null, via: null, among: 1000, limit: 20}

// The most common pairs of the whole store, if no feature is given: in 16 prompts or more. At a query's beginning, with
// keys made by functions alone, both engines find them by an index; left() is null without a feature.
MATCH (a)-[r:FEEDS]->(b)
WHERE r.log2_prompts IN range(4, size(coalesce(left($feature, 0), '..............................')))
  AND ($via IS NULL OR r.via = $via)
WITH a, r, b
ORDER BY r.n_prompts DESC, abs(r.mean_share) DESC, a.id, b.id, r.head
LIMIT toInteger($among)
WITH collect(r) AS common
CALL (common) {
  UNWIND common AS r
  RETURN startNode(r) AS a, r, endNode(r) AS b
  UNION ALL
  // Where these are too few, all of them.
  UNWIND CASE WHEN $feature IS NULL AND size(common) < $among THEN [true] ELSE [] END AS more
  MATCH (a:Feature)-[r:FEEDS]->(b:Feature)
  WHERE r.n_prompts < 16 AND ($via IS NULL OR r.via = $via)
  RETURN a, r, b
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (a:Feature {id: id})-[r:FEEDS]->(b:Feature)
  RETURN a, r, b
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (b:Feature {id: id})<-[r:FEEDS]-(a:Feature)
  RETURN a, r, b
}
WITH a, r, b, CASE WHEN r.via = 'DIRECT' THEN 'MLP' ELSE r.via END AS kind
WHERE $via IS NULL OR r.via = $via
WITH a, r, b, kind
ORDER BY r.n_prompts DESC, abs(r.mean_share) DESC, a.id, b.id, r.head
LIMIT toInteger($among)
WITH collect({a: a, r: r, b: b, kind: kind}) AS feeds
CALL (feeds) {
  UNWIND feeds AS feed
  RETURN feed.a AS a, feed.b AS b, feed.kind AS kind, feed.r.head AS head, feed.r AS r, null AS w
  UNION ALL
  // Once along the wires of every target, however many feed it, or along those of the feature.
  UNWIND CASE WHEN $feature IS NULL THEN feeds ELSE [] END AS feed
  WITH DISTINCT feed.b AS b
  MATCH (b)<-[w:VIRTUAL_WEIGHT]-(a)
  RETURN a, b, w.via AS kind, w.head AS head, null AS r, w
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (a:Feature {id: id})-[w:VIRTUAL_WEIGHT]->(b)
  RETURN a, b, w.via AS kind, w.head AS head, null AS r, w
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (b:Feature {id: id})<-[w:VIRTUAL_WEIGHT]-(a)
  RETURN a, b, w.via AS kind, w.head AS head, null AS r, w
}
WITH a, b, kind, coalesce(head, -1) AS head, collect(r)[0] AS r, collect(w) AS wires
WHERE r IS NOT NULL
WITH a, b, kind, r, reduce(best = wires[0], wire IN wires | CASE WHEN wire.rank < best.rank THEN wire ELSE best END) AS w
WITH b, kind, collect({a: a, r: r, w: w}) AS feeds, count(w) AS n_wired
CALL (b, kind, n_wired) {
  WITH b, kind
  WHERE n_wired = 0
  MATCH (b)<-[w:VIRTUAL_WEIGHT]-()
  WHERE w.via = kind
  RETURN 1 AS known
  LIMIT 1
  UNION ALL
  WITH n_wired
  WHERE n_wired > 0
  RETURN 1 AS known
}
UNWIND feeds AS feed
WITH feed.a AS a, feed.r AS r, b, feed.w AS w
WHERE $show = 'all' OR w IS NULL
RETURN a.id AS source,
       a.label AS source_label,
       b.id AS target,
       b.label AS target_label,
       r.via AS via,
       r.layer AS layer,
       r.head AS head,
       r.n_prompts AS n_prompts,
       r.mean_share AS mean_share,
       w.weight AS weight,
       w.rank AS rank
ORDER BY n_prompts DESC, abs(mean_share) DESC, source, target, head
LIMIT toInteger($limit)
