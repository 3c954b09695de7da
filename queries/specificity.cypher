// Is a motif, A -> B or A -> B -> C, more frequent in one task's prompts than in all others?
//
// Parameters:
//   a: feature; e.g. "mini/1/mlp/95"; id of the feature that writes
//   b: feature; e.g. "mini/2/attn/140"; id of the feature that reads
//   c: feature = null; e.g. "mini/2/mlp/812"; id of the feature that B writes to in turn
//   task: task = null; e.g. "capitals"; this task only, instead of every task with the motif
//   via: DIRECT|OV = null; e.g. "OV"; edges A -> B of this kind only
//   head: integer 0.. = null; e.g. 3; edges A -> B through this head of B's layer only
//
// Columns, the least likely by chance first:
//   task*: string; the task
//   n_with*: integer; its prompts with the motif
//   n_task*: integer; its prompts that have circuits
//   rate*: float; n_with over n_task
//   n_with_elsewhere*: integer; other prompts with the motif
//   n_elsewhere*: integer; other prompts
//   rate_elsewhere*: float; the same among those
//   p_value*: float; chance of n_with or more if tasks did not matter (Fisher's exact test, one-sided)
//
// In Neo4j Browser, first:
//   :param {a: "mini/1/mlp/95", b: "mini/2/attn/140", c: null, task: null, via: null, head: null}

CALL () {
  MATCH (a:Feature {id: $a})
  MATCH (b:Feature {id: $b})
  WITH a, b, coalesce(a.n_prompts, 0) < coalesce(b.n_prompts, 0) AS from_a
  // Along the edges of the one that fires in fewer prompts, whose neighbours are first told by layer and site.
  CALL (a, b, from_a) {
    WITH a, b
    WHERE from_a
    MATCH (a)<-[:OF]-(s:Activation)
    MATCH (s)-[e:DIRECT|OV]->(t:Activation)
    WHERE t.layer = b.layer AND t.site = b.site
    MATCH (t)-[:OF]->(x:Feature)
    WHERE x = b
    RETURN s, e, t
    UNION ALL
    WITH a, b
    WHERE NOT from_a
    MATCH (b)<-[:OF]-(t:Activation)
    MATCH (t)<-[e:DIRECT|OV]-(s:Activation)
    WHERE s.layer = a.layer AND s.site = a.site
    MATCH (s)-[:OF]->(x:Feature)
    WHERE x = a
    RETURN s, e, t
  }
  WITH e, t
  WHERE ($via IS NULL OR type(e) = $via) AND ($head IS NULL OR e.head = $head)
  WITH DISTINCT t
  CALL (t) {
    UNWIND CASE WHEN $c IS NULL THEN [t.prompt] ELSE [] END AS prompt
    RETURN prompt
    UNION
    MATCH (t)-[:DIRECT|OV]->(:Activation)-[:OF]->(:Feature {id: $c})
    RETURN t.prompt AS prompt
  }
  WITH DISTINCT prompt
  MATCH (p:Prompt {id: prompt})
  RETURN p.task AS task, count(p) AS n_with
}
WITH collect({task: task, n: n_with}) AS found, sum(n_with) AS n_motif
UNWIND CASE WHEN $task IS NULL THEN [x IN found WHERE x.task IS NOT NULL | x.task] ELSE [$task] END AS task
WITH task, n_motif, coalesce([x IN found WHERE x.task = task | x.n][0], 0) AS n_with
// How many prompts a task has is stored: see TaskPart in docs/SCHEMA.md.
MATCH (t:TaskPart {id: 'circuits in ' + task})
WITH task, n_with, t.n_prompts AS n_task, n_motif, COUNT { MATCH (p:Prompt) } AS n_all
WITH task, n_with, n_task, n_motif, n_all,
     CASE WHEN n_motif < n_task THEN n_motif ELSE n_task END AS n_most
// The logarithm of the chance of exactly n_with: C(n_task, n_with) C(n_all - n_task, n_motif - n_with) / C(n_all, n_motif)
WITH task, n_with, n_task, n_motif, n_all, n_most,
     reduce(sum = 0.0, i IN range(1, n_with) | sum + log(toFloat(n_task - n_with + i) / i))
     + reduce(sum = 0.0, i IN range(1, n_motif - n_with) |
         sum + log(toFloat(n_all - n_task - n_motif + n_with + i) / i))
     - reduce(sum = 0.0, i IN range(1, n_motif) | sum + log(toFloat(n_all - n_motif + i) / i)) AS log_chance
// From each count to the next the chance changes by a ratio of four factors.
WITH task, n_with, n_task, n_motif, n_all,
     reduce(state = [log_chance, exp(log_chance)], x IN range(n_with, n_most - 1) | [
       state[0] + log(toFloat(n_motif - x) * (n_task - x) / ((x + 1.0) * (n_all - n_motif - n_task + x + 1))),
       state[1] + exp(state[0] + log(
         toFloat(n_motif - x) * (n_task - x) / ((x + 1.0) * (n_all - n_motif - n_task + x + 1))))
     ])[1] AS tail
RETURN task,
       n_with,
       n_task,
       toFloat(n_with) / n_task AS rate,
       n_motif - n_with AS n_with_elsewhere,
       n_all - n_task AS n_elsewhere,
       CASE WHEN n_all > n_task THEN toFloat(n_motif - n_with) / (n_all - n_task) END AS rate_elsewhere,
       CASE WHEN tail < 1 THEN tail ELSE 1.0 END AS p_value
ORDER BY p_value, n_with DESC, task
