// Which edges make up one circuit: every edge between two of its nodes, and what each node gives to the root?
//
// Parameters:
//   circuit: circuit; e.g. "4f1c09d2a6b8e735/9/2/mlp/812/relative"; id of the circuit
//
// Columns, from the root's layer down and the strongest first:
//   source: string; id of the node that writes
//   source_name*: string; its name
//   source_kind: string; MLP, Attn, Embedding, PositionEmbedding, Error or Bias
//   source_feature: string; id of its feature, where it is one
//   source_label: string; the feature's label, where it has one
//   source_layer: integer; its layer, -1 for embeddings
//   source_position: integer; its position
//   source_token: string; the token at that position
//   source_attribution*: float; what the source gives to the root
//   target: string; id of the node that reads
//   target_name*: string; its name
//   target_kind: string; MLP, Attn or Logit
//   target_feature: string; id of its feature, where it is one
//   target_label: string; the feature's label, where it has one
//   target_layer: integer; its layer, the number of layers for logits
//   target_position: integer; its position
//   target_token: string; the token at that position
//   target_attribution: float; what the target gives to the root
//   via*: string; DIRECT or OV
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   pattern*: float; how much the head attends from target to source, OV only
//   weight*: float; what the source adds to the target's pre-activation
//   share*: float; weight over the target's pre-activation; negative works against it
//
// In Neo4j Browser, first:
//   :param {circuit: "4f1c09d2a6b8e735/9/2/mlp/812/relative"}

MATCH (c:Circuit {id: $circuit})-[given:INCLUDES]->(s:CircuitNode)-[e:DIRECT|OV]->(t:CircuitNode)<-[taken:INCLUDES]-(c)
MATCH (s)-[:AT]->(there:Token)
MATCH (t)-[:AT]->(here:Token)
OPTIONAL MATCH (s)-[:OF]->(f:Feature)
OPTIONAL MATCH (t)-[:OF]->(g:Feature)
RETURN s.id AS source,
       s.name AS source_name,
       [label IN labels(s) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS source_kind,
       f.id AS source_feature,
       f.label AS source_label,
       s.layer AS source_layer,
       s.position AS source_position,
       there.text AS source_token,
       given.attribution AS source_attribution,
       t.id AS target,
       t.name AS target_name,
       [label IN labels(t) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS target_kind,
       g.id AS target_feature,
       g.label AS target_label,
       t.layer AS target_layer,
       t.position AS target_position,
       here.text AS target_token,
       taken.attribution AS target_attribution,
       type(e) AS via,
       e.layer AS layer,
       e.head AS head,
       e.pattern AS pattern,
       e.weight AS weight,
       CASE WHEN t.pre_activation <> 0 THEN e.weight / t.pre_activation END AS share
ORDER BY target_layer DESC, target_position DESC, target, abs(weight) DESC, source, head
