// Which features and which edges between them are part of most circuits of a task?
//
// Parameters:
//   task: task; e.g. "capitals"; the prompts' task
//   min_share: float 0..1 = 0.5; e.g. 0.8; the least share of the task's circuits
//   rule: paper|relative|support|top_mass = null; e.g. "relative"; circuits of this rule only
//   limit: integer 1.. = 200; e.g. 50; the most rows to return
//
// Columns, features first, the most common first:
//   part*: string; node or edge
//   source*: string; id of the feature, or of the one that writes
//   source_label*: string; its label, where it has one
//   target*: string; id of the feature that reads, edges only
//   target_label*: string; its label, where it has one
//   via*: string; DIRECT or OV, edges only
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   n_circuits*: integer; circuits that have it
//   share_of_circuits*: float; those over all circuits of the task
//   mean_share*: float; mean over those of what it gives: a node to the root's value, an edge to its targets
//
// In Neo4j Browser, first:
//   :param {task: "capitals", min_share: 0.5, rule: "relative", limit: 50}

// What the task's circuits have in common is stored: see TaskPart in docs/SCHEMA.md.
MATCH (t:TaskPart {id: 'circuits in ' + $task})
WITH t.log2_circuits AS most, reduce(n = 0, i IN range(0, size(t.rules) - 1) |
       n + CASE WHEN $rule IS NULL OR t.rules[i] = $rule THEN t.n_circuits_by_rule[i] ELSE 0 END) AS n_all
WITH n_all, most, $min_share * n_all AS least
UNWIND range(CASE WHEN least >= 1 THEN toInteger(floor(log(least) / log(2) - 1e-9)) ELSE 0 END, most) AS k
MATCH (t:TaskPart {task: $task, log2_circuits: k})
WHERE t.part <> 'circuit'
WITH n_all, least, t,
     reduce(n = 0, i IN range(0, size(t.rules) - 1) |
       n + CASE WHEN $rule IS NULL OR t.rules[i] = $rule THEN t.n_circuits_by_rule[i] ELSE 0 END) AS n_circuits,
     reduce(sum = 0.0, i IN range(0, size(t.rules) - 1) |
       sum + CASE WHEN $rule IS NULL OR t.rules[i] = $rule THEN t.total_share_by_rule[i] ELSE 0.0 END) AS share
WHERE n_circuits > 0 AND n_circuits >= least
MATCH (f:Feature {id: t.source})
// Not null: the embedded engine would look for that among all features.
OPTIONAL MATCH (g:Feature {id: coalesce(t.target, '')})
WITH n_all, t, n_circuits, share, f, g
WHERE t.part = 'node' OR g IS NOT NULL
RETURN t.part AS part,
       f.id AS source,
       f.label AS source_label,
       g.id AS target,
       g.label AS target_label,
       t.via AS via,
       t.layer AS layer,
       t.head AS head,
       n_circuits,
       toFloat(n_circuits) / n_all AS share_of_circuits,
       share / n_circuits AS mean_share
ORDER BY part DESC, n_circuits DESC, abs(mean_share) DESC, source, target, via, head
LIMIT toInteger($limit)
