// What made each head of a circuit look where it looked: which pairs of nodes make up its score?
//
// Parameters:
//   circuit: circuit; e.g. "4f1c09d2a6b8e735/9/2/mlp/812/relative"; id of the circuit
//   limit: integer 1.. = 500; e.g. 50; the most rows to return
//
// Columns, what carries the largest share first, then the strongest pairs:
//   layer*: integer; the head's layer
//   head*: integer; the head
//   query: integer; the position that looks
//   query_token*: string; the token there
//   key: integer; the position that is looked at
//   key_token*: string; the token there
//   pattern*: float; how much the head attends from query to key
//   share*: float; the largest share of a node of the circuit that the head brings from key to query, without sign
//   score*: float; the score before the softmax
//   unstored: float; the part of the score that comes from pairs too weak to be stored
//   query_node: string; id of the node at the query
//   query_name*: string; its name
//   query_feature: string; id of its feature, where it is one
//   query_label: string; the feature's label, where it has one
//   key_node: string; id of the node at the key
//   key_name*: string; its name
//   key_feature: string; id of its feature, where it is one
//   key_label: string; the feature's label, where it has one
//   qk*: float; what the two give to the score
//   lift*: float; what the query node gives to this key's score beyond what it gives to the others' on average
//
// In Neo4j Browser, first:
//   :param {circuit: "4f1c09d2a6b8e735/9/2/mlp/812/relative", limit: 50}

MATCH (c:Circuit {id: $circuit})-[:INCLUDES]->(s:CircuitNode)-[e:OV]->(t:CircuitNode)<-[:INCLUDES]-(c)
WITH c.prompt AS prompt, t, e.layer AS layer, e.head AS head, s.position AS key, sum(e.weight) AS moved
WITH prompt, layer, head, t.position AS query, key,
     max(CASE WHEN t.pre_activation <> 0 THEN abs(moved / t.pre_activation) END) AS share
WITH share, prompt + '/' + toString(layer) + '.' + toString(head) + '/' + toString(query) + '-' + toString(key) AS id
MATCH (a:AttentionScore {id: id})
MATCH (a)-[:QUERY]->(here:Token)
MATCH (a)-[:KEY]->(there:Token)
MATCH (v:CircuitNode)-[:AT]->(there)
MATCH (v)-[e:QK]->(u:CircuitNode)
WHERE e.layer = a.layer AND e.head = a.head AND u.position = a.query
WITH share, a, here, there, v, u, e
ORDER BY share DESC, a.id, abs(e.score) DESC, v.id, u.id
LIMIT toInteger($limit)
OPTIONAL MATCH (u)-[:OF]->(f:Feature)
OPTIONAL MATCH (v)-[:OF]->(g:Feature)
RETURN a.layer AS layer,
       a.head AS head,
       a.query AS query,
       here.text AS query_token,
       a.key AS key,
       there.text AS key_token,
       a.pattern AS pattern,
       share,
       a.score AS score,
       a.unstored AS unstored,
       u.id AS query_node,
       u.name AS query_name,
       f.id AS query_feature,
       f.label AS query_label,
       v.id AS key_node,
       v.name AS key_name,
       g.id AS key_feature,
       g.label AS key_label,
       e.score AS qk,
       e.lift AS lift
ORDER BY share DESC, a.id, abs(qk) DESC, key_node, query_node
