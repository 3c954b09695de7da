// What has one circuit, prompt or task in its circuits that another has not, and what changed its share?
//
// Parameters:
//   a: group; e.g. "capitals"; id of a circuit or of a prompt, or a task: that circuit, or all circuits of that
//   b: group; e.g. "states"; the same for the other side
//   limit: integer 1.. = 200; e.g. 50; the most rows to return
//
// Columns, the largest change first:
//   found*: string; in which side: only a, only b, or both
//   part*: string; node or edge
//   source*: string; the node, or the one that writes: a feature's id, or else what it is, as "embedding @ Texas"
//   source_label*: string; the feature's label, where it has one
//   target*: string; the node that reads, edges only
//   target_label*: string; the feature's label, where it has one
//   via*: string; DIRECT or OV, edges only
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   n_circuits_a: integer; circuits of a that have it
//   n_circuits_b: integer; circuits of b that have it
//   share_a*: float; mean over a's circuits of what it gives: a node to the root's value, an edge to its targets
//   share_b*: float; the same for b
//   change*: float; share_b minus share_a
//
// In Neo4j Browser, first:
//   :param {a: "capitals", b: "states", limit: 50}

OPTIONAL MATCH (x:TaskPart {id: 'circuits in ' + $a})
OPTIONAL MATCH (y:TaskPart {id: 'circuits in ' + $b})
WITH x.n_circuits AS n_a, y.n_circuits AS n_b
CALL (n_a, n_b) {
  // Two tasks: what the circuits of each have in common is stored, see TaskPart in docs/SCHEMA.md. The change of a part
  // is no larger than twice the larger of its two shares, so half of any `limit` changes bounds the shares to look at.
  UNWIND CASE WHEN n_a > 0 AND n_b > 0 THEN [true] ELSE [] END AS two_tasks
  CALL (n_a, n_b) {
    UNWIND [$a, $b] AS task
    CALL (task) {
      UNWIND range(40, -30, -1) AS k
      MATCH (t:TaskPart {task: task, log2_share: k})
      WHERE t.part <> 'circuit'
      RETURN left(t.id, size(t.id) - size(task)) AS key
      LIMIT toInteger($limit)
    }
    WITH DISTINCT n_a, n_b, key
    OPTIONAL MATCH (x:TaskPart {id: key + $a})
    OPTIONAL MATCH (y:TaskPart {id: key + $b})
    WITH abs(coalesce(y.total_share, 0.0) / n_b - coalesce(x.total_share, 0.0) / n_a) AS size
    ORDER BY size DESC
    LIMIT toInteger($limit)
    WITH collect(size) AS sizes
    RETURN 0.4999 * coalesce(sizes[toInteger($limit) - 1], 0.0) AS least
  }
  UNWIND [[$a, least * n_a], [$b, least * n_b]] AS pair
  WITH n_a, n_b, pair[0] AS task, pair[1] AS size
  CALL (task, size) {
    UNWIND range(40, CASE WHEN size < 1e-8 THEN -30 WHEN size > 1e12 THEN 40
                          ELSE toInteger(floor(log(size) / log(2) - 1e-9)) END, -1) AS k
    MATCH (t:TaskPart {task: task, log2_share: k})
    WHERE t.part <> 'circuit' AND abs(t.total_share) >= size
    RETURN left(t.id, size(t.id) - size(task)) AS key
  }
  WITH DISTINCT n_a, n_b, key
  OPTIONAL MATCH (x:TaskPart {id: key + $a})
  OPTIONAL MATCH (y:TaskPart {id: key + $b})
  WITH coalesce(x.part, y.part) AS part, coalesce(x.source, y.source) AS source,
       coalesce(x.target, y.target) AS target, coalesce(x.via, y.via) AS via, coalesce(x.layer, y.layer) AS layer,
       coalesce(x.head, y.head) AS head, coalesce(x.n_circuits, 0) AS n_circuits_a,
       coalesce(y.n_circuits, 0) AS n_circuits_b, coalesce(x.total_share, 0.0) / n_a AS share_a,
       coalesce(y.total_share, 0.0) / n_b AS share_b
  ORDER BY abs(share_b - share_a) DESC, part DESC, source, target, via, head
  LIMIT toInteger($limit)
  OPTIONAL MATCH (f:Feature {id: source})
  // Not null: the embedded engine would look for that among all features.
  OPTIONAL MATCH (g:Feature {id: coalesce(target, '')})
  RETURN part, source, f.label AS source_label, target, g.label AS target_label, via, layer, head,
         n_circuits_a, n_circuits_b, share_a, share_b
  UNION ALL
  UNWIND CASE WHEN n_a > 0 AND n_b > 0 THEN [] ELSE [true] END AS by_circuits
  CALL () {
    UNWIND [['a', $a], ['b', $b]] AS pair
    WITH pair[0] AS side, pair[1] AS name
    CALL (name) {
      MATCH (c:Circuit {id: name})
      RETURN c
      UNION
      MATCH (c:Circuit {prompt: name})
      WHERE NOT c:MultiToken
      RETURN c
      UNION
      MATCH (:Prompt {task: name})-[:HAS_CIRCUIT]->(c:Circuit)
      WHERE NOT c:MultiToken
      RETURN c
    }
    RETURN side, collect(c) AS circuits
  }
  WITH collect({side: side, circuits: circuits}) AS sides
  WITH sides
  WHERE size(sides) = 2
  UNWIND sides AS group
  WITH group.side AS side, group.circuits AS circuits, size(group.circuits) AS n_all
  UNWIND circuits AS c
  CALL (c) {
    MATCH (c)-[part:INCLUDES]->(s:CircuitNode)
    RETURN 'node' AS part, s, null AS t, null AS g, null AS via, null AS layer, null AS head,
           CASE WHEN c.root_value <> 0 THEN part.attribution / c.root_value ELSE 0.0 END AS share
    UNION ALL
    MATCH (c)-[:INCLUDES]->(n:CircuitNode)
    WITH collect(n) AS members
    UNWIND members AS t
    OPTIONAL MATCH (t)-[:OF]->(g:Feature)
    WITH members, t, g
    MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
    WHERE s IN members
    RETURN 'edge' AS part, s, t, g, type(e) AS via, e.layer AS layer, e.head AS head,
           CASE WHEN t.pre_activation <> 0 THEN e.weight / t.pre_activation ELSE 0.0 END AS share
  }
  OPTIONAL MATCH (s)-[:OF]->(f:Feature)
  WITH side, n_all, c, part, via, layer, head, share, f.label AS source_label, g.label AS target_label,
       CASE
         WHEN f IS NOT NULL THEN f.id
         WHEN s:Error THEN 'L' + s.layer + ' ' + s.site + ' error'
         WHEN s:Bias THEN 'L' + s.layer + ' ' + s.site + ' bias'
         ELSE s.name
       END AS source,
       CASE WHEN g IS NOT NULL THEN g.id ELSE t.name END AS target
  RETURN part, source, source_label, target, target_label, via, layer, head,
         count(DISTINCT CASE WHEN side = 'a' THEN c END) AS n_circuits_a,
         count(DISTINCT CASE WHEN side = 'b' THEN c END) AS n_circuits_b,
         sum(CASE WHEN side = 'a' THEN share / n_all ELSE 0.0 END) AS share_a,
         sum(CASE WHEN side = 'b' THEN share / n_all ELSE 0.0 END) AS share_b
}
RETURN CASE WHEN n_circuits_b = 0 THEN 'only a' WHEN n_circuits_a = 0 THEN 'only b' ELSE 'both' END AS found,
       part,
       source,
       source_label,
       target,
       target_label,
       via,
       layer,
       head,
       n_circuits_a,
       n_circuits_b,
       share_a,
       share_b,
       share_b - share_a AS change
ORDER BY abs(change) DESC, part DESC, source, target, via, head
LIMIT toInteger($limit)
