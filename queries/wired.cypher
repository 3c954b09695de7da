// Which features are strongly wired in the weights, and how often do the stored prompts use that?
//
// Parameters:
//   show: all|unused = "unused"; e.g. "all"; only wires that no stored prompt uses, or all
//   feature: feature = null; e.g. "mini/2/mlp/812"; wires from or to this feature only
//   via: MLP|OV = null; e.g. "OV"; wires of this kind only
//   among: integer 1.. = 1000; e.g. 5000; how many wires to look at, the strongest ones
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, strongest first:
//   source*: string; id of the feature that writes
//   source_label*: string; its label, where it has one
//   target*: string; id of the feature that reads
//   target_label*: string; its label, where it has one
//   via*: string; MLP or OV
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   weight*: float; the virtual weight
//   rank: integer; its place among those into the target, from 1
//   n_prompts*: integer; stored prompts in which the one feeds the other this way
//   mean_share*: float; mean share of the target's pre-activation in them
//
// In Neo4j Browser, first:
//   :param {show: "unused", feature: null, via: null, among: 1000, limit: 20}

// The strongest wires of the whole store run into the targets of the strongest of those of rank 1, if no feature is given.
// At a query's beginning, with keys made by functions alone, both engines find these by an index; left() is null without
// a feature.
MATCH (a)-[w:VIRTUAL_WEIGHT]->(b)
WHERE w.rank IN range(1, size(coalesce(left($feature, 0), '.'))) AND w.via <> 'QK' AND ($via IS NULL OR w.via = $via)
WITH a, w, b
ORDER BY abs(w.weight) DESC, a.id, b.id, w.head
LIMIT toInteger($among)
WITH collect(DISTINCT b) AS targets
CALL (targets) {
  UNWIND targets AS b
  MATCH (b)<-[w:VIRTUAL_WEIGHT]-(a:Feature)
  RETURN a, w, b
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (a:Feature {id: id})-[w:VIRTUAL_WEIGHT]->(b:Feature)
  RETURN a, w, b
  UNION ALL
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (b:Feature {id: id})<-[w:VIRTUAL_WEIGHT]-(a:Feature)
  RETURN a, w, b
}
WITH a, w, b
WHERE w.via <> 'QK' AND ($via IS NULL OR w.via = $via)
WITH a, w, b
ORDER BY abs(w.weight) DESC, a.id, b.id, w.head
LIMIT toInteger($among)
OPTIONAL MATCH (b)<-[r:FEEDS]-(a)
WHERE r.via = CASE WHEN w.via = 'MLP' THEN 'DIRECT' ELSE w.via END AND coalesce(r.head, -1) = coalesce(w.head, -1)
WITH a, w, b, r
WHERE $show = 'all' OR r IS NULL
RETURN a.id AS source,
       a.label AS source_label,
       b.id AS target,
       b.label AS target_label,
       w.via AS via,
       w.layer AS layer,
       w.head AS head,
       w.weight AS weight,
       w.rank AS rank,
       coalesce(r.n_prompts, 0) AS n_prompts,
       r.mean_share AS mean_share
ORDER BY abs(weight) DESC, source, target, head
LIMIT toInteger($limit)
