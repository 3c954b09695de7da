// What is in the store: how many of every kind of node (a table)
MATCH (n)
RETURN labels(n) AS labels, count(n) AS nodes
ORDER BY nodes DESC
