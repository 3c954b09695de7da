// In which prompts does feature A feed feature B, from which token to which, through which head, and how strongly?
//
// Parameters:
//   a: feature; e.g. "mini/1/mlp/95"; id of the feature that writes
//   b: feature; e.g. "mini/2/attn/140"; id of the feature that reads
//   via: DIRECT|OV = null; e.g. "OV"; edges of this kind only
//   head: integer 0.. = null; e.g. 3; edges through this head of B's layer only
//   limit: integer 1.. = 200; e.g. 50; the most rows to return
//
// Columns, largest share first:
//   prompt*: string; id of the prompt
//   task: string; the prompt's task
//   source: string; id of A's node
//   source_position*: integer; where A writes
//   source_token*: string; the token there
//   target: string; id of B's node
//   target_position*: integer; where B reads
//   target_token*: string; the token there
//   via*: string; DIRECT or OV
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   pattern*: float; how much the head attends from target to source, OV only
//   weight*: float; what A adds to B's pre-activation
//   share*: float; weight over B's pre-activation; negative works against it
//
// In Neo4j Browser, first:
//   :param {a: "mini/1/mlp/95", b: "mini/2/attn/140", via: null, head: null, limit: 50}

MATCH (a:Feature {id: $a})
MATCH (b:Feature {id: $b})
WITH a, b, coalesce(a.n_prompts, 0) < coalesce(b.n_prompts, 0) AS from_a
// Along the edges of the one that fires in fewer prompts, whose neighbours are first told by layer and site.
CALL (a, b, from_a) {
  WITH a, b
  WHERE from_a
  MATCH (a)<-[:OF]-(s:Activation)
  MATCH (s)-[e:DIRECT|OV]->(t:Activation)
  WHERE t.layer = b.layer AND t.site = b.site
  MATCH (t)-[:OF]->(x:Feature)
  WHERE x = b
  RETURN s, e, t
  UNION ALL
  WITH a, b
  WHERE NOT from_a
  MATCH (b)<-[:OF]-(t:Activation)
  MATCH (t)<-[e:DIRECT|OV]-(s:Activation)
  WHERE s.layer = a.layer AND s.site = a.site
  MATCH (s)-[:OF]->(x:Feature)
  WHERE x = a
  RETURN s, e, t
}
WITH s, e, t
WHERE ($via IS NULL OR type(e) = $via) AND ($head IS NULL OR e.head = $head)
WITH s, e, t, CASE WHEN t.pre_activation <> 0 THEN e.weight / t.pre_activation END AS share
ORDER BY abs(share) DESC, s.id, t.id, e.head
LIMIT toInteger($limit)
MATCH (s)-[:AT]->(there:Token)
MATCH (t)-[:AT]->(here:Token)
MATCH (p:Prompt {id: s.prompt})
RETURN p.id AS prompt,
       p.task AS task,
       s.id AS source,
       s.position AS source_position,
       there.text AS source_token,
       t.id AS target,
       t.position AS target_position,
       here.text AS target_token,
       type(e) AS via,
       e.layer AS layer,
       e.head AS head,
       e.pattern AS pattern,
       e.weight AS weight,
       share
ORDER BY abs(share) DESC, source, target, head
