// Where is one feature active on several tokens in a row: everywhere, or of one feature, or in one prompt?
//
// Parameters:
//   feature: feature = null; e.g. "mini/2/mlp/812"; spans of this feature only
//   prompt: prompt = null; e.g. "4f1c09d2a6b8e735"; spans of this prompt only
//   min_length: integer 2.. = 2; e.g. 3; the fewest tokens
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, longest first and then the strongest:
//   span: string; id of the span
//   feature*: string; id of the feature
//   label*: string; its label, where it has one
//   prompt*: string; id of the prompt
//   task: string; the prompt's task
//   start*: integer; position of its first token
//   end*: integer; position of its last token
//   length*: integer; tokens in it
//   mean*: float; mean activation over them
//   text*: string; the tokens
//
// In Neo4j Browser, first:
//   :param {feature: "mini/2/mlp/812", prompt: null, min_length: 2, limit: 20}

// One way in, by the narrowest thing that is given.
CALL () {
  WITH $feature AS id
  WHERE id IS NOT NULL
  MATCH (:Feature {id: id})<-[:OF]-(s:Span)
  RETURN s
  UNION ALL
  UNWIND CASE WHEN $feature IS NULL AND $prompt IS NOT NULL THEN [$prompt] ELSE [] END AS id
  MATCH (s:Span {prompt: id})
  RETURN s
  UNION ALL
  UNWIND CASE WHEN coalesce($feature, $prompt) IS NULL THEN [true] ELSE [] END AS everything
  MATCH (s:Span)
  RETURN s
}
WITH s
WHERE s.length >= $min_length AND ($prompt IS NULL OR s.prompt = $prompt)
WITH s
ORDER BY s.length DESC, s.mean DESC, s.id
LIMIT toInteger($limit)
MATCH (s)-[:OF]->(f:Feature)
MATCH (p:Prompt {id: s.prompt})
RETURN s.id AS span,
       f.id AS feature,
       f.label AS label,
       p.id AS prompt,
       p.task AS task,
       s.start AS start,
       s.end AS end,
       s.length AS length,
       s.mean AS mean,
       s.text AS text
ORDER BY length DESC, mean DESC, span
