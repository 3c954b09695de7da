// In which prompts do two features make a head look: A where it looks at, B where it looks from?
//
// Parameters:
//   a: feature; e.g. "mini/0/mlp/95"; id of the feature at the key, whose token is looked at
//   b: feature; e.g. "mini/1/mlp/140"; id of the feature at the query, whose token looks
//   limit: integer 1.. = 200; e.g. 50; the most rows to return
//
// Columns, the strongest pairs first:
//   prompt*: string; id of the prompt
//   task: string; the prompt's task
//   key_node: string; id of A's node
//   key*: integer; where A stands
//   key_token*: string; the token there
//   query_node: string; id of B's node
//   query*: integer; where B stands
//   query_token*: string; the token there
//   layer*: integer; the head's layer
//   head*: integer; the head
//   pattern*: float; how much the head attends from query to key
//   score*: float; the score before the softmax
//   qk*: float; what A and B give to it; negative keeps the head from looking
//   lift*: float; what B gives to this key's score beyond what it gives to the others' on average
//
// In Neo4j Browser, first:
//   :param {a: "mini/0/mlp/95", b: "mini/1/mlp/140", limit: 50}

MATCH (a:Feature {id: $a})
MATCH (b:Feature {id: $b})
WITH a, b, coalesce(a.n_prompts, 0) < coalesce(b.n_prompts, 0) AS from_a
// Along the edges of the one that fires in fewer prompts, whose neighbours are first told by layer and site.
CALL (a, b, from_a) {
  WITH a, b
  WHERE from_a
  MATCH (a)<-[:OF]-(v:Activation)
  MATCH (v)-[e:QK]->(u:Activation)
  WHERE u.layer = b.layer AND u.site = b.site
  MATCH (u)-[:OF]->(x:Feature)
  WHERE x = b
  RETURN v, e, u
  UNION ALL
  WITH a, b
  WHERE NOT from_a
  MATCH (b)<-[:OF]-(u:Activation)
  MATCH (u)<-[e:QK]-(v:Activation)
  WHERE v.layer = a.layer AND v.site = a.site
  MATCH (v)-[:OF]->(x:Feature)
  WHERE x = a
  RETURN v, e, u
}
WITH v, e, u
ORDER BY abs(e.score) DESC, v.id, u.id, e.layer, e.head
LIMIT toInteger($limit)
WITH v, e, u, v.prompt + '/' + toString(e.layer) + '.' + toString(e.head) + '/' + toString(u.position) + '-'
     + toString(v.position) AS id
MATCH (a:AttentionScore {id: id})
MATCH (a)-[:QUERY]->(here:Token)
MATCH (a)-[:KEY]->(there:Token)
MATCH (p:Prompt {id: a.prompt})
RETURN p.id AS prompt,
       p.task AS task,
       v.id AS key_node,
       a.key AS key,
       there.text AS key_token,
       u.id AS query_node,
       a.query AS query,
       here.text AS query_token,
       a.layer AS layer,
       a.head AS head,
       a.pattern AS pattern,
       a.score AS score,
       e.score AS qk,
       e.lift AS lift
ORDER BY abs(qk) DESC, key_node, query_node, layer, head
