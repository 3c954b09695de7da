// The circuits of one task: its prompts, and the features that their circuits explain
// Put a task between the quotes; without one, the first by name is taken.
WITH '' AS given
MATCH (p:Prompt)
WHERE p.task = given OR given = ''
WITH p.task AS task, collect(p) AS prompts
ORDER BY task
LIMIT 1
UNWIND prompts AS p
MATCH (p)-[has:HAS_CIRCUIT]->(c:Circuit)-[root:ROOT]->(n:CircuitNode)-[of:OF]->(f:Feature)
WITH p, has, c, root, n, of, f
ORDER BY p.id, c.completeness DESC, c.id
LIMIT 60
RETURN p, has, c, root, n, of, f
