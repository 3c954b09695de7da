// What is one feature: its label, the prompts it fires on most, what drives it, what it drives, and in how many circuits?
//
// Parameters:
//   feature: feature; e.g. "mini/2/mlp/812"; id of the feature
//   top: integer 0.. = 5; e.g. 10; how many prompts, drivers and driven features
//
// Columns, the feature itself first, then its prompts, its drivers and what it drives:
//   part*: string; feature, prompt, driver or driven
//   rank: integer; 0 for the feature, from 1 within each of the others
//   id*: string; id of the feature or of the prompt
//   text*: string; the feature's label, or the prompt with the tokens it fires on between « and »
//   via*: string; DIRECT or OV
//   layer*: integer; the head's layer, OV only
//   head*: integer; the head, OV only
//   n_prompts*: integer; prompts in which the feature fires, or in which the one drives the other
//   n_circuits*: integer; circuits that include the feature
//   mean_share*: float; mean of what the driver adds, over the driven one's pre-activation
//   max*: float; the strongest activation: in the prompt, or the feature's in all stored prompts
//
// In Neo4j Browser, first:
//   :param {feature: "mini/2/mlp/812", top: 5}

MATCH (f:Feature {id: $feature})
CALL (f) {
  OPTIONAL MATCH (f)-[e:FIRES_ON]->()
  WITH f, count(e) AS n_prompts, max(e.max) AS most
  OPTIONAL MATCH (f)<-[:OF]-(:CircuitNode)<-[:INCLUDES]-(c:Circuit)
  WITH f, n_prompts, most, count(DISTINCT c) AS n_circuits
  RETURN 'feature' AS part, 0 AS place, [f.id] AS ids, [f.label] AS texts, [null] AS vias, [null] AS layers,
         [null] AS heads, [n_prompts] AS prompts, [n_circuits] AS circuits, [null] AS shares, [most] AS maxima
  UNION ALL
  MATCH (f)-[e:FIRES_ON]->(p:Prompt)
  WITH e, p
  ORDER BY e.max DESC, p.id
  LIMIT toInteger($top)
  CALL (p) {
    MATCH (p)-[:HAS_TOKEN]->(t:Token)
    WITH p, t
    ORDER BY t.position
    RETURN collect(t) AS tokens
  }
  WITH e, p,
       reduce(text = '', t IN tokens |
         text + CASE
           WHEN t.position IN e.positions THEN '«' + t.text + '»'
           // the token that was put before the prompt is not part of its text
           WHEN t.position = 0 AND NOT p.text STARTS WITH t.text THEN ''
           ELSE t.text
         END) AS text
  ORDER BY e.max DESC, p.id
  RETURN 'prompt' AS part, 1 AS place, collect(p.id) AS ids, collect(text) AS texts, [] AS vias, [] AS layers,
         [] AS heads, [] AS prompts, [] AS circuits, [] AS shares, collect(e.max) AS maxima
  UNION ALL
  MATCH (f)<-[r:FEEDS]-(g:Feature)
  WITH r, g
  ORDER BY abs(r.total_share) DESC, g.id, r.head
  LIMIT toInteger($top)
  RETURN 'driver' AS part, 2 AS place, collect(g.id) AS ids, collect(coalesce(g.label, '')) AS texts,
         collect(r.via) AS vias, collect(coalesce(r.layer, -1)) AS layers, collect(coalesce(r.head, -1)) AS heads,
         collect(r.n_prompts) AS prompts, [] AS circuits, collect(r.mean_share) AS shares, [] AS maxima
  UNION ALL
  MATCH (f)-[r:FEEDS]->(g:Feature)
  WITH r, g
  ORDER BY abs(r.total_share) DESC, g.id, r.head
  LIMIT toInteger($top)
  RETURN 'driven' AS part, 3 AS place, collect(g.id) AS ids, collect(coalesce(g.label, '')) AS texts,
         collect(r.via) AS vias, collect(coalesce(r.layer, -1)) AS layers, collect(coalesce(r.head, -1)) AS heads,
         collect(r.n_prompts) AS prompts, [] AS circuits, collect(r.mean_share) AS shares, [] AS maxima
}
UNWIND range(0, size(ids) - 1) AS i
RETURN part,
       CASE WHEN place = 0 THEN 0 ELSE i + 1 END AS rank,
       ids[i] AS id,
       CASE WHEN texts[i] <> '' THEN texts[i] END AS text,
       vias[i] AS via,
       CASE WHEN layers[i] >= 0 THEN layers[i] END AS layer,
       CASE WHEN heads[i] >= 0 THEN heads[i] END AS head,
       prompts[i] AS n_prompts,
       circuits[i] AS n_circuits,
       shares[i] AS mean_share,
       maxima[i] AS max
ORDER BY place, rank
