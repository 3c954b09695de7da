// Which nodes make up one circuit, and what does each give to its root?
//
// Parameters:
//   circuit: circuit; e.g. "4f1c09d2a6b8e735/9/2/mlp/812/relative"; id of the circuit
//
// Columns, what gives most, of either sign, first:
//   node: string; id of the node
//   name*: string; its name
//   kind*: string; MLP, Attn, Embedding, PositionEmbedding, Error, Bias or Logit
//   feature: string; id of its feature, where it is one
//   label*: string; the feature's label, where it has one
//   layer: integer; its layer, -1 for embeddings, the number of layers for logits
//   position: integer; its position
//   token*: string; the token at that position
//   value*: float; its activation, where it is one
//   pre_activation: float; what it read, activations and logits only
//   attribution*: float; what it gives to the root
//   root: boolean; whether the circuit explains it
//
// In Neo4j Browser, first:
//   :param {circuit: "4f1c09d2a6b8e735/9/2/mlp/812/relative"}

MATCH (c:Circuit {id: $circuit})-[part:INCLUDES]->(n:CircuitNode)-[:AT]->(token:Token)
OPTIONAL MATCH (c)-[root:ROOT]->(n)
OPTIONAL MATCH (n)-[:OF]->(f:Feature)
RETURN n.id AS node,
       n.name AS name,
       [label IN labels(n) WHERE NOT label IN ['CircuitNode', 'Activation']][0] AS kind,
       f.id AS feature,
       f.label AS label,
       n.layer AS layer,
       n.position AS position,
       token.text AS token,
       n.value AS value,
       n.pre_activation AS pre_activation,
       part.attribution AS attribution,
       root IS NOT NULL AS root
ORDER BY abs(attribution) DESC, node
