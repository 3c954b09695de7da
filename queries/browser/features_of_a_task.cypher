// Features of one task
// The features that circuits of at least two of its prompts explain, and these prompts.
// Put a task between the quotes; without one, the one of most prompts is taken.
WITH '' AS given
MATCH (p:Prompt)
WHERE p.task = given OR given = ''
WITH p.task AS task, collect(p) AS prompts
ORDER BY size(prompts) DESC, task
LIMIT 1
UNWIND prompts AS p
MATCH (p)-[:HAS_CIRCUIT]->(:Circuit)-[:ROOT]->(:CircuitNode)-[:OF]->(f:Feature)
WITH f, collect(DISTINCT p) AS prompts
WHERE size(prompts) >= 2
UNWIND prompts AS p
MATCH (f)-[fires:FIRES_ON]->(p)
RETURN f, fires, p
