// What is stored (table)
// How many nodes of every kind.
MATCH (n)
RETURN labels(n) AS labels, count(n) AS nodes
ORDER BY nodes DESC
