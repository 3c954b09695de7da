// Why a head looks there
// A head's score between two tokens, and the 20 strongest pairs of nodes behind it.
// Put the id of a score between the quotes; without one, the one of the largest pattern to an earlier token is taken.
WITH '' AS given
MATCH (a:AttentionScore)
WHERE a.id = given OR given = ''
WITH a
ORDER BY a.query > a.key AND a.key > 0 DESC, a.pattern DESC, a.id
LIMIT 1
MATCH (a)-[query:QUERY]->(q:Token)
MATCH (a)-[key:KEY]->(k:Token)
OPTIONAL MATCH (k)<-[:AT]-(v:CircuitNode)-[e:QK {layer: a.layer, head: a.head}]->(u:CircuitNode)
WHERE u.position = a.query
RETURN a, query, q, key, k, v, e, u
ORDER BY abs(e.score) DESC, v.id, u.id
LIMIT 20
