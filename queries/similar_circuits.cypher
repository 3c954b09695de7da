// Which circuits are made of the same features as a circuit, each feature weighted by what it gives to the root?
//
// Parameters:
//   circuit: circuit; e.g. "4f1c09d2a6b8e735/9/2/mlp/812/relative"; id of the circuit
//   among: integer 1.. = 200; e.g. 1000; how many circuits to compare, those that share most with it
//   limit: integer 0.. = 20; e.g. 50; the most rows to return
//
// Columns, the most similar first:
//   circuit*: string; id of the other circuit
//   prompt: string; id of its prompt
//   task*: string; the prompt's task
//   text*: string; the prompt
//   root_name*: string; name of the node that it explains
//   n_shared*: integer; features that both include
//   shared*: float; sum over those of the smaller of both weights: |attribution| over |the root's value|
//   similarity*: float; shared over the sum of the larger of both weights over all features; 1 for equal circuits
//
// In Neo4j Browser, first:
//   :param {circuit: "4f1c09d2a6b8e735/9/2/mlp/812/relative", among: 200, limit: 20}

MATCH (c:Circuit {id: $circuit})-[part:INCLUDES]->(:CircuitNode)-[:OF]->(f:Feature)
WHERE c.root_value <> 0
WITH c, f, sum(abs(part.attribution / c.root_value)) AS own
WITH c, collect({feature: f, own: own}) AS mine, sum(own) AS ours
UNWIND mine AS pair
WITH c, ours, pair.feature AS f, pair.own AS own
MATCH (f)<-[:OF]-(n:CircuitNode)<-[part:INCLUDES]-(d:Circuit)
WHERE d.id <> c.id AND d.root_value <> 0 AND NOT d:MultiToken
WITH ours, d, f, own, sum(abs(part.attribution / d.root_value)) AS other
WITH ours, d, count(f) AS n_shared, sum(CASE WHEN own < other THEN own ELSE other END) AS shared
ORDER BY shared DESC, d.id
LIMIT toInteger($among)
MATCH (d)-[part:INCLUDES]->(:CircuitNode)-[:OF]->(:Feature)
WITH ours, d, n_shared, shared, sum(abs(part.attribution / d.root_value)) AS theirs
WITH d, n_shared, shared, shared / (ours + theirs - shared) AS similarity
ORDER BY similarity DESC, d.id
LIMIT toInteger($limit)
MATCH (p:Prompt)-[:HAS_CIRCUIT]->(d)-[:ROOT]->(root:CircuitNode)
RETURN d.id AS circuit,
       p.id AS prompt,
       p.task AS task,
       p.text AS text,
       root.name AS root_name,
       n_shared,
       shared,
       similarity
ORDER BY similarity DESC, circuit
