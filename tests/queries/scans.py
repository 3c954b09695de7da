"""The questions about tasks as a scan of all their circuits answers them: what the stored parts must agree with.

Each is the Cypher of the question of its name, with the same parameters and columns, but reads nothing that is summed
up beforehand.
"""

from typing import LiteralString

SHARED_FEATURES: LiteralString = """
MATCH (p:Prompt {task: $task})-[:HAS_CIRCUIT]->(c:Circuit)
WHERE NOT c:MultiToken AND ($rule IS NULL OR c.rule = $rule)
WITH collect(c) AS circuits, count(DISTINCT p) AS n_task_prompts
UNWIND circuits AS c
CALL (c) {
  MATCH (c)-[:ROOT]->(root:CircuitNode)
  RETURN collect(root) AS roots
}
MATCH (c)-[part:INCLUDES]->(n:CircuitNode)-[:OF]->(f:Feature)
WHERE ($layer IS NULL OR f.layer = $layer) AND ($site IS NULL OR f.site = $site)
WITH n_task_prompts, f, c,
     CASE WHEN n IN roots THEN c.prompt END AS root_prompt,
     CASE WHEN c.root_value <> 0 THEN part.attribution / c.root_value END AS share
WITH n_task_prompts, f,
     count(DISTINCT c.prompt) AS n_prompts,
     count(DISTINCT root_prompt) AS n_prompts_as_root,
     count(DISTINCT c) AS n_circuits,
     avg(share) AS mean_share
WHERE n_prompts >= $min_share_of_prompts * n_task_prompts
RETURN f.id AS feature,
       f.label AS label,
       f.layer AS layer,
       f.site AS site,
       f.index AS index,
       n_prompts,
       toFloat(n_prompts) / n_task_prompts AS share_of_prompts,
       n_prompts_as_root,
       n_circuits,
       mean_share
ORDER BY n_prompts DESC, abs(mean_share) DESC, feature
LIMIT toInteger($limit)
"""
CONSENSUS: LiteralString = """
MATCH (:Prompt {task: $task})-[:HAS_CIRCUIT]->(c:Circuit)
WHERE NOT c:MultiToken AND ($rule IS NULL OR c.rule = $rule)
WITH collect(c) AS circuits, count(c) AS n_all
CALL (circuits) {
  UNWIND circuits AS c
  MATCH (c)-[part:INCLUDES]->(:CircuitNode)-[:OF]->(f:Feature)
  WITH f, c, CASE WHEN c.root_value <> 0 THEN part.attribution / c.root_value ELSE 0.0 END AS share
  RETURN 'node' AS part, f, null AS g, null AS via, null AS layer, null AS head,
         count(DISTINCT c) AS n_circuits, sum(share) AS share
  UNION ALL
  UNWIND circuits AS c
  MATCH (c)-[:INCLUDES]->(n:CircuitNode)
  WITH c, collect(n) AS members
  UNWIND members AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE s IN members
  MATCH (s)-[:OF]->(f:Feature)
  MATCH (t)-[:OF]->(g:Feature)
  WITH f, g, c, e, CASE WHEN t.pre_activation <> 0 THEN e.weight / t.pre_activation ELSE 0.0 END AS share
  RETURN 'edge' AS part, f, g, type(e) AS via, e.layer AS layer, e.head AS head,
         count(DISTINCT c) AS n_circuits, sum(share) AS share
}
WITH n_all, part, f, g, via, layer, head, n_circuits, share
WHERE n_circuits >= $min_share * n_all
RETURN part,
       f.id AS source,
       f.label AS source_label,
       g.id AS target,
       g.label AS target_label,
       via,
       layer,
       head,
       n_circuits,
       toFloat(n_circuits) / n_all AS share_of_circuits,
       share / n_circuits AS mean_share
ORDER BY part DESC, n_circuits DESC, abs(mean_share) DESC, source, target, via, head
LIMIT toInteger($limit)
"""
DIFF: LiteralString = """
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
  RETURN 'node' AS part, s, null AS t, null AS via, null AS layer, null AS head,
         CASE WHEN c.root_value <> 0 THEN part.attribution / c.root_value ELSE 0.0 END AS share
  UNION ALL
  MATCH (c)-[:INCLUDES]->(n:CircuitNode)
  WITH collect(n) AS members
  UNWIND members AS t
  MATCH (t)<-[e:DIRECT|OV]-(s:CircuitNode)
  WHERE s IN members
  RETURN 'edge' AS part, s, t, type(e) AS via, e.layer AS layer, e.head AS head,
         CASE WHEN t.pre_activation <> 0 THEN e.weight / t.pre_activation ELSE 0.0 END AS share
}
OPTIONAL MATCH (s)-[:OF]->(f:Feature)
OPTIONAL MATCH (t)-[:OF]->(g:Feature)
WITH side, n_all, c, part, via, layer, head, share, f.label AS source_label, g.label AS target_label,
     CASE
       WHEN f IS NOT NULL THEN f.id
       WHEN s:Error THEN 'L' + s.layer + ' ' + s.site + ' error'
       WHEN s:Bias THEN 'L' + s.layer + ' ' + s.site + ' bias'
       ELSE s.name
     END AS source,
     CASE WHEN g IS NOT NULL THEN g.id ELSE t.name END AS target
WITH part, source, source_label, target, target_label, via, layer, head,
     count(DISTINCT CASE WHEN side = 'a' THEN c END) AS n_circuits_a,
     count(DISTINCT CASE WHEN side = 'b' THEN c END) AS n_circuits_b,
     sum(CASE WHEN side = 'a' THEN share / n_all ELSE 0.0 END) AS share_a,
     sum(CASE WHEN side = 'b' THEN share / n_all ELSE 0.0 END) AS share_b
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
"""
SCANS = {"shared_features": SHARED_FEATURES, "consensus": CONSENSUS, "diff": DIFF}
