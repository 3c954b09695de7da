"""`atlas verify`: everything that must always hold in a store, checked in Cypher over all of it.

Each check looks at one kind of thing and says whether it is as it must be; a value that is missing or not
a number counts as a violation. Three of them measure:

- The identity of METHOD 3, pre_activation = constant + sum of incoming DIRECT and OV weights + unstored.
  Its residual is relative to |pre_activation|, but at least to a hundredth of the sum of all terms' sizes:
  a value that is a small difference of large terms cannot be more exact than single precision makes these.
- The identity of METHOD 5, score = sum of its QK scores + unstored; its residual is relative in the same way.
- completeness + error_share + pruned_share = 1; its residual is the plain difference.

All may reach what TOLERANCES says of the dtype that the prompt's model computed in; what is summed over prompts of
all dtypes may reach TOLERANCE. Checks about prompts run over batches of prompts, so that neither engine ever
holds the whole store in one query; the parts of a task's circuits are counted here, a task at a time.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, LiteralString

import click

from atlas import taskparts
from atlas.cli import store_option
from atlas.store import Store, connect

# What a bfloat16 model computed is attributed in single precision.
TOLERANCES = {"bfloat16": 1e-4, "float32": 1e-4, "float64": 1e-9}
TOLERANCE = TOLERANCES["float32"]
THINGS_PER_QUERY = 20


@dataclass(frozen=True)
class Check:
    """What one check found: `checked` things, `violations` among them, one of these by its id.

    `worst` is the largest residual of a check that measures, and None for the others.
    """

    name: str
    sentence: str
    checked: int
    violations: int
    worst: float | None = None
    example: str | None = None


@dataclass(frozen=True)
class _Question:
    """A check as Cypher that ends with `id`, `ok` and `residual` of each thing in scope.

    It is asked of $prompts, a list of ids whose identities hold to $tolerance, with `per_feature` of $features, and
    without both once of the whole store.
    """

    name: str
    sentence: str
    cypher: str
    per_prompt: bool = True
    per_feature: bool = False


_SUMMARY = """
RETURN count(*) AS checked, sum(CASE WHEN ok THEN 0 ELSE 1 END) AS violations, max(residual) AS worst,
       head(collect(CASE WHEN ok THEN null ELSE id END)) AS example
"""
_RANK_U = "2 * u.layer + CASE WHEN u.site = 'mlp' THEN 1 ELSE 0 END"
_RANK_V = "2 * v.layer + CASE WHEN v.site = 'mlp' THEN 1 ELSE 0 END"

QUESTIONS = (
    _Question(
        "prompts",
        "every prompt is complete, was traced by one replacement model, written by one run, and has its tokens",
        """
        UNWIND $prompts AS prompt
        MATCH (p:Prompt {id: prompt})
        WITH p, COUNT { (p)-[:TRACED_BY]->(:ReplacementModel) } AS models, COUNT { (:Run)-[:WROTE]->(p) } AS runs,
             COUNT { (p)-[:HAS_TOKEN]->(:Token {prompt: p.id}) } AS tokens
        WITH p.id AS id, null AS residual, p.complete AND models = 1 AND runs = 1 AND tokens = p.n_tokens AS ok
        """,
    ),
    _Question(
        "tokens",
        "tokens stand in order: id, position, and one NEXT to the token after",
        """
        UNWIND $prompts AS prompt
        MATCH (p:Prompt {id: prompt})-[:HAS_TOKEN]->(t)
        OPTIONAL MATCH (t)-[:NEXT]->(after)
        WITH p, t, count(after) AS n, max(after.position) AS next
        WITH t.id AS id, null AS residual, t.id = p.id + '/' + toString(t.position) AND t.prompt = p.id
             AND CASE WHEN t.position = p.n_tokens - 1 THEN n = 0 ELSE n = 1 AND next = t.position + 1 END AS ok
        """,
    ),
    _Question(
        "nodes",
        "every circuit node is AT its one token, and its id says its prompt, position, layer and site",
        """
        UNWIND $prompts AS prompt
        MATCH (v:CircuitNode {prompt: prompt})
        OPTIONAL MATCH (v)-[:AT]->(t:Token)
        WITH v, count(t) AS n, max(t.id) AS token, v.prompt + '/' + toString(v.position) AS place
        WITH v.id AS id, null AS residual, n = 1 AND token = place AND CASE
             WHEN v:Embedding THEN v.id = place + '/embedding' AND v.layer = -1
             WHEN v:PositionEmbedding THEN v.id = place + '/position' AND v.layer = -1
             WHEN v:Logit THEN v.id STARTS WITH place + '/logit/'
             WHEN v:Error THEN v.id = place + '/' + toString(v.layer) + '/' + v.site + '/error'
             WHEN v:Bias THEN v.id = place + '/' + toString(v.layer) + '/' + v.site + '/bias'
             WHEN v:MLP THEN v.site = 'mlp' AND v.id STARTS WITH place + '/' + toString(v.layer) + '/mlp/'
             WHEN v:Attn THEN v.site = 'attn' AND v.id STARTS WITH place + '/' + toString(v.layer) + '/attn/'
             ELSE false END AS ok
        """,
    ),
    _Question(
        "activations",
        "every activation is OF one feature of its layer and site",
        """
        UNWIND $prompts AS prompt
        MATCH (v:Activation {prompt: prompt})
        OPTIONAL MATCH (v)-[:OF]->(f:Feature)
        WITH v, count(f) AS n, max(f.layer) AS layer, max(f.site) AS site, max(f.index) AS index
        WITH v.id AS id, null AS residual, n = 1 AND layer = v.layer AND site = v.site
             AND v.id ENDS WITH '/' + site + '/' + toString(index) AS ok
        """,
    ),
    _Question(
        "firings",
        "positions and values of FIRES_ON belong together, and no feature fires twice on a prompt",
        """
        UNWIND $prompts AS prompt
        MATCH (f:Feature)-[e:FIRES_ON]->(p:Prompt {id: prompt})
        WITH f, p, count(e) AS n, head(collect(e)) AS e
        WITH p, f, n, e.positions AS positions, e.values AS values, e.max AS most
        WITH p.id + ' ' + f.id AS id, null AS residual, n = 1 AND size(positions) > 0 AND size(positions) = size(values)
             AND positions[0] >= 0 AND positions[size(positions) - 1] < p.n_tokens
             AND all(i IN range(1, size(positions) - 1) WHERE positions[i - 1] < positions[i])
             AND all(x IN values WHERE x <= most) AND any(x IN values WHERE x = most) AS ok
        """,
    ),
    _Question(
        "inverted index",
        "every activation after the first token is among what its feature fires on",
        """
        UNWIND $prompts AS prompt
        MATCH (v:Activation {prompt: prompt})-[:OF]->(f:Feature) WHERE v.position > 0
        OPTIONAL MATCH (f)-[e:FIRES_ON]->(p:Prompt {id: v.prompt})
        WITH v, count(e) AS n, head(collect(e.positions)) AS positions
        WITH v.id AS id, null AS residual, n > 0 AND v.position IN positions AS ok
        """,
    ),
    _Question(
        "spans",
        "every span is OF one feature that fires on each of its tokens, two or more, and not on those beside it",
        """
        UNWIND $prompts AS prompt
        MATCH (p:Prompt {id: prompt})-[:HAS_SPAN]->(s:Span)
        OPTIONAL MATCH (s)-[:OF]->(f:Feature)-[e:FIRES_ON]->(p)
        WITH p, s, count(e) AS n, max(f.id) AS feature, head(collect(e.positions)) AS positions
        WITH s.id AS id, null AS residual, n = 1 AND s.prompt = p.id AND s.length = s.end + 1 - s.start
             AND s.length >= 2 AND s.mean > 0
             AND s.id = p.id + '/' + feature + '/' + toString(s.start) + '-' + toString(s.end)
             AND all(i IN range(s.start, s.end) WHERE i IN positions)
             AND NOT (s.start - 1) IN positions AND NOT (s.end + 1) IN positions AS ok
        """,
    ),
    _Question(
        "edges",
        "every edge stays in its prompt and runs forward: DIRECT at its position or by open attention, OV from before",
        f"""
        UNWIND $prompts AS prompt
        OPTIONAL MATCH (:Prompt {{id: prompt}})-[:TRACED_BY]->(r:ReplacementModel)
        WITH prompt, coalesce(head(collect(r.open_attention)), []) AS open
        MATCH (u:CircuitNode {{prompt: prompt}})-[e:DIRECT|OV]->(v)
        WITH u.id + ' -> ' + v.id AS id, null AS residual, v.prompt = u.prompt AND {_RANK_U} < {_RANK_V} AND CASE
             WHEN e.weight IS NULL THEN false
             WHEN type(e) = 'DIRECT' THEN (v:MLP OR v:Logit) AND (u.position = v.position OR u.position < v.position
               AND any(l IN open WHERE {_RANK_U} < 2 * l AND 2 * l < {_RANK_V}))
             ELSE u.position <= v.position AND v:Attn AND e.layer = v.layer AND e.head >= 0 END AS ok
        """,
    ),
    _Question(
        "single edges",
        "no DIRECT edge stands twice between two nodes, and no OV edge twice for a head",
        """
        UNWIND $prompts AS prompt
        MATCH (u:CircuitNode {prompt: prompt})-[e:DIRECT|OV]->(v)
        WITH u.id + ' -> ' + v.id AS id, type(e) AS kind, e.head AS head, count(*) AS n
        WITH id, null AS residual, n = 1 AS ok
        """,
    ),
    _Question(
        "conservation",
        "pre_activation = constant + incoming DIRECT and OV weights + unstored",
        """
        UNWIND $prompts AS prompt
        MATCH (v:CircuitNode {prompt: prompt}) WHERE v:Activation OR v:Logit
        OPTIONAL MATCH (v)<-[e:DIRECT|OV]-()
        WITH v, sum(e.weight) AS total, sum(abs(e.weight)) AS size
        WITH v.id AS id, abs(v.constant + total + v.unstored - v.pre_activation) AS difference,
             abs(v.pre_activation) AS own, (size + abs(v.constant) + abs(v.unstored)) / 100 + 1e-12 AS floor
        WITH id, difference / CASE WHEN own > floor THEN own ELSE floor END AS residual
        WITH id, residual, residual <= $tolerance AS ok
        """,
    ),
    _Question(
        "QK edges",
        "every QK edge stands once, in its prompt, from no later position, between nodes below its layer or its biases",
        """
        UNWIND $prompts AS prompt
        MATCH (v:CircuitNode {prompt: prompt})-[e:QK]->(u)
        WITH v, u, e.layer AS layer, e.head AS head, count(*) AS n, count(e.score) AS scores, count(e.lift) AS lifts
        WITH v.id + ' -> ' + u.id AS id, null AS residual, n = 1 AND scores = 1 AND lifts = 1 AND head >= 0
             AND u.prompt = v.prompt AND v.position <= u.position
             AND CASE v.site WHEN 'k' THEN v.layer = layer WHEN 'q' THEN false ELSE v.layer < layer END
             AND CASE u.site WHEN 'q' THEN u.layer = layer WHEN 'k' THEN false ELSE u.layer < layer END AS ok
        """,
    ),
    _Question(
        "attention",
        "every attention score has the tokens that its id says, its key not after its query, and a pattern in [0, 1]",
        """
        UNWIND $prompts AS prompt
        MATCH (a:AttentionScore {prompt: prompt})
        OPTIONAL MATCH (a)-[e:QUERY|KEY]->(t:Token)
        WITH a, a.prompt + '/' AS begin, count(e) AS n, max(CASE type(e) WHEN 'QUERY' THEN t.id END) AS query,
             max(CASE type(e) WHEN 'KEY' THEN t.id END) AS key
        WITH a.id AS id, null AS residual, n = 2 AND query = begin + toString(a.query) AND key = begin + toString(a.key)
             AND a.key <= a.query AND a.pattern >= 0 AND a.pattern <= 1 AND a.id = begin + toString(a.layer) + '.'
             + toString(a.head) + '/' + toString(a.query) + '-' + toString(a.key) AS ok
        """,
    ),
    _Question(
        "scores",
        "score = QK scores between its tokens + unstored, and every QK edge belongs to a score",
        """
        CALL () {
          UNWIND $prompts AS prompt
          MATCH (a:AttentionScore {prompt: prompt})
          RETURN a.id AS id, CASE WHEN a.score + a.unstored IS NULL THEN 2 ELSE 1 END AS owner, a.score AS score,
                 a.unstored AS part
          UNION ALL
          UNWIND $prompts AS prompt
          MATCH (v:CircuitNode {prompt: prompt})-[e:QK]->(u)
          RETURN prompt + '/' + toString(e.layer) + '.' + toString(e.head) + '/' + toString(u.position) + '-'
                 + toString(v.position) AS id, 0 AS owner, 0.0 AS score, e.score AS part
        }
        WITH id, sum(owner) AS owners, sum(score) AS score, sum(part) AS total, sum(abs(part)) AS size
        WITH id, owners, abs(total - score) AS difference, abs(score) AS own, size / 100 + 1e-12 AS floor
        WITH id, owners, difference / CASE WHEN own > floor THEN own ELSE floor END AS residual
        WITH id, residual, owners = 1 AND residual <= $tolerance AS ok
        """,
    ),
    _Question(
        "circuits",
        "every circuit has its prompt, one ROOT among its nodes, and n_nodes of these, each once and of its prompt",
        """
        UNWIND $prompts AS prompt
        MATCH (c:Circuit {prompt: prompt}) WHERE NOT c:MultiToken
        OPTIONAL MATCH (c)-[:INCLUDES]->(v:CircuitNode)
        WITH c, count(v) AS n, count(DISTINCT v) AS different, collect(DISTINCT v.prompt) AS prompts
        WITH c, n, different, prompts, COUNT { (:Prompt {id: c.prompt})-[:HAS_CIRCUIT]->(c) } AS owners,
             COUNT { (c)-[:ROOT]->(:CircuitNode) } AS roots, COUNT { (c)-[:ROOT]->()<-[:INCLUDES]-(c) } AS included
        WITH c.id AS id, null AS residual, owners = 1 AND roots = 1 AND included = 1 AND n = c.n_nodes AND different = n
             AND prompts = [c.prompt] AND c.id STARTS WITH c.prompt + '/' AND c.id ENDS WITH '/' + c.rule AS ok
        """,
    ),
    _Question(
        "multi-token",
        "every multi-token circuit joins a circuit of each token of its span, has its root, and is their union",
        """
        UNWIND $prompts AS prompt
        MATCH (:Prompt {id: prompt})-[:HAS_CIRCUIT]->(m:MultiToken)
        OPTIONAL MATCH (m)-[j:JOINS]->(c:Circuit)-[:ROOT]->(root)<-[r:ROOT]-(m)
        WHERE r.order = j.order AND root.position = m.start + j.order - 1
        WITH m, count(c) AS joined, count(DISTINCT root.position) AS tokens
        OPTIONAL MATCH (m)-[:JOINS]->(:Circuit)-[:INCLUDES]->(n:CircuitNode)
        WITH m, joined, tokens, n, count(*) AS times
        WITH m, joined, tokens, count(n) AS n_nodes, sum(CASE WHEN times > 1 THEN 1 ELSE 0 END) AS n_shared
        WITH m.id AS id, null AS residual, m.end + 1 - m.start >= 2 AND joined = m.end + 1 - m.start AND tokens = joined
             AND COUNT { (m)-[:ROOT]->() } = joined AND COUNT { (m)-[:JOINS]->() } = joined
             AND n_nodes = m.n_nodes AND n_shared = m.n_shared AND COUNT { (m)-[:INCLUDES]->(:CircuitNode) } = n_nodes
             AND abs(m.crossing_weight) < 1e9 AND m.p_value > 0 AND m.p_value <= m.q_value AND m.q_value <= 1 AS ok
        """,
    ),
    _Question(
        "circuit edges",
        "n_edges of a circuit is the number of stored edges between its nodes",
        """
        UNWIND $prompts AS prompt
        MATCH (c:Circuit {prompt: prompt})
        OPTIONAL MATCH (c)-[:INCLUDES]->(u)-[e:DIRECT|OV]->(v)<-[:INCLUDES]-(c)
        WITH c, count(e) AS n
        WITH c.id AS id, null AS residual, n = c.n_edges AS ok
        """,
    ),
    _Question(
        "shares",
        "completeness + error_share + pruned_share = 1",
        """
        UNWIND $prompts AS prompt
        MATCH (c:Circuit {prompt: prompt})
        WITH c.id AS id, abs(c.completeness + c.error_share + c.pruned_share - 1) AS residual
        WITH id, residual, residual <= $tolerance AS ok
        """,
    ),
    _Question(
        "faithfulness",
        "a circuit whose faithfulness was measured has all six shares as finite numbers, and the ablation's name",
        """
        UNWIND $prompts AS prompt
        MATCH (c:Circuit {prompt: prompt}) WHERE c.faithfulness IS NOT NULL OR c.ablation IS NOT NULL
        WITH c, [c.faithfulness, c.necessity, c.random_faithfulness, c.random_necessity, c.top_faithfulness,
                 c.top_necessity] AS shares
        WITH c.id AS id, null AS residual, coalesce(c.ablation IN ['mean', 'zero', 'resample'], false)
             AND all(x IN shares WHERE coalesce(abs(x) < 1e30, false)) AS ok
        """,
    ),
    _Question(
        "features",
        "every feature is IN one dictionary, of its layer and site, and its id and its number of prompts are right",
        """
        UNWIND $features AS feature
        MATCH (f:Feature {id: feature})
        OPTIONAL MATCH (f)-[:FIRES_ON]->(p:Prompt)
        WITH f, count(p) AS n_prompts
        OPTIONAL MATCH (f)-[:IN]->(d:Dictionary)
        WITH f, n_prompts, count(d) AS n, max(d.id) AS dictionary, max(d.layer) AS layer, max(d.site) AS site
        WITH f.id AS id, null AS residual, n = 1 AND f.id = dictionary + '/' + toString(f.index)
             AND f.layer = layer AND f.site = site AND coalesce(f.n_prompts, 0) = n_prompts AS ok
        """,
        per_prompt=False,
        per_feature=True,
    ),
    _Question(
        "feeds",
        "FEEDS between two features are what a scan of the edges between their activations gives",
        f"""
        UNWIND $features AS feature
        MATCH (b:Feature {{id: feature}})
        CALL (b) {{
          MATCH (b)<-[:OF]-(v:CircuitNode)<-[e:DIRECT|OV]-(u:CircuitNode)-[:OF]->(a:Feature)
          WITH a, v, e, CASE WHEN v.pre_activation <> 0 THEN e.weight / v.pre_activation ELSE 0.0 END AS share
          RETURN a.id AS source, type(e) AS via, e.layer AS layer, e.head AS head,
                 count(DISTINCT v.prompt) AS n_prompts, count(e) AS n_edges, sum(e.weight) AS weight,
                 sum(share) AS share, sum(abs(e.weight)) AS weights, sum(abs(share)) AS shares, 0 AS wrong
          UNION ALL
          MATCH (b)<-[r:FEEDS]-(a:Feature)
          RETURN a.id AS source, r.via AS via, r.layer AS layer, r.head AS head, -r.n_prompts AS n_prompts,
                 -r.n_edges AS n_edges, -r.mean_weight * r.n_edges AS weight, -r.mean_share * r.n_edges AS share,
                 0.0 AS weights, 0.0 AS shares,
                 CASE WHEN 2.0 ^ r.log2_prompts <= r.n_prompts AND r.n_prompts < 2.0 ^ (r.log2_prompts + 1)
                      THEN 0 ELSE 1 END AS wrong
        }}
        WITH b, source, via, layer, head, count(*) AS sides, sum(n_prompts) AS prompts_off, sum(n_edges) AS edges_off,
             abs(sum(weight)) / (sum(weights) + 1e-12) AS weight_off,
             abs(sum(share)) / (sum(shares) + 1e-12) AS share_off, sum(wrong) AS wrong
        WITH source + ' -> ' + b.id + coalesce(' L' + toString(layer) + '.H' + toString(head), '') AS id, sides,
             wrong + abs(prompts_off) + abs(edges_off) AS wrong,
             CASE WHEN weight_off > share_off THEN weight_off ELSE share_off END AS residual
        WITH id, residual, sides = 2 AND wrong = 0 AND residual <= {TOLERANCE} AS ok
        """,
        per_prompt=False,
        per_feature=True,
    ),
    _Question(
        "leftovers",
        "no token, circuit node, attention score or circuit is left of a prompt that is not there",
        """
        MATCH (n) WHERE n:Token OR n:CircuitNode OR n:AttentionScore OR n:Circuit
        WITH n.prompt AS prompt, head(collect(n.id)) AS id
        OPTIONAL MATCH (p:Prompt {id: prompt})
        WITH id, null AS residual, p IS NOT NULL AS ok
        """,
        per_prompt=False,
    ),
)


def verify(store: Store) -> list[Check]:
    """Ask every question of the whole store; the findings are in the order of QUESTIONS."""
    traced = store.read(
        "MATCH (p:Prompt) OPTIONAL MATCH (p)-[:TRACED_BY]->(m) RETURN p.id AS id, max(m.dtype) AS dtype ORDER BY id"
    )
    prompts: dict[float, list[str]] = {}
    for id, dtype in zip(traced["id"], traced["dtype"], strict=True):
        prompts.setdefault(TOLERANCES.get(dtype, TOLERANCE), []).append(str(id))
    features = [str(id) for id in store.read("MATCH (f:Feature) RETURN f.id AS id ORDER BY id")["id"]]
    found = [
        _ask(store, question, {TOLERANCE: features} if question.per_feature else prompts) for question in QUESTIONS
    ]
    return [*found, _task_parts(store)]


def _ask(store: Store, question: _Question, ids: Mapping[float, Sequence[str]]) -> Check:
    """One question of all that it is about, by the tolerance to which that must hold."""
    checked = violations = 0
    worst: list[float] = []
    examples: list[str] = []
    whole = not (question.per_prompt or question.per_feature)
    for tolerance, batch in [(TOLERANCE, [])] if whole else _batches(ids):
        parameters = {"prompts": batch, "features": batch, "tolerance": tolerance}
        row = store.read(question.cypher + _SUMMARY, **parameters).astype(object).iloc[0]
        checked += int(row["checked"])
        violations += int(row["violations"] or 0)
        worst += [float(row["worst"])] if row["worst"] is not None else []
        examples += [str(row["example"])] if row["example"] is not None else []
    return Check(
        question.name,
        question.sentence,
        checked,
        violations,
        max(worst, default=None),
        examples[0] if examples else None,
    )


def _task_parts(store: Store) -> Check:
    """Count the parts of each task's circuits anew, and compare with what is stored of that task."""
    prompts = store.read("MATCH (p:Prompt) WHERE p.task IS NOT NULL RETURN p.task AS task, p.id AS id ORDER BY id")
    of_none = store.read("MATCH (t:TaskPart) WHERE t.task IS NULL RETURN t.id AS id")["id"].astype(str).tolist()
    named = store.read("MATCH (t:TaskPart) WHERE t.task IS NOT NULL RETURN DISTINCT t.task AS task")["task"]
    tasks = {*prompts["task"], *named}
    checked = len(of_none)
    residuals: list[float] = []
    wrong: list[str] = of_none
    for task in sorted(tasks):
        counted = _counted(store, prompts.loc[prompts["task"] == task, "id"].astype(str).tolist())
        stored: LiteralString = "MATCH (t:TaskPart {task: $task}) RETURN t.id AS id, properties(t) AS properties"
        for rows in store.read_batches(stored, task=task):
            for id, properties in zip(rows["id"], rows["properties"], strict=True):
                residual = _off(taskparts.row(*counted.pop(id)), properties) if id in counted else math.inf
                checked += 1
                residuals += [residual] if math.isfinite(residual) else []
                wrong += [] if residual <= TOLERANCE else [id]
        checked += len(counted)
        wrong += counted
    sentence = "what the circuits of a task have in common is what a scan of the circuits gives"
    worst = max(residuals, default=None)
    return Check("task parts", sentence, checked, len(wrong), worst, min(wrong, default=None))


def _counted(store: Store, prompts: Sequence[str]) -> dict[str, tuple[taskparts.Part, taskparts.Counts]]:
    """The parts of the circuits of some prompts of one task, by their ids."""
    counted: dict[str, tuple[taskparts.Part, taskparts.Counts]] = {}
    for _, batch in _batches({TOLERANCE: prompts}):
        for totals in taskparts.of_prompts(store, batch):
            for part, counts in totals.items():
                counted[part.id] = part, taskparts.add(counted.get(part.id, (part, {}))[1], counts)
    return counted


def _off(counted: Mapping[str, Any], stored: Mapping[str, Any]) -> float:
    """How far the stored sums of shares are from those counted, relative to these, but at least to a hundredth of
    their number; infinite where anything else differs."""
    sums = ("total_share", "total_share_by_rule", "log2_share")
    if stored.keys() != counted.keys() or any(stored[name] != counted[name] for name in counted if name not in sums):
        return math.inf
    near = {taskparts.log2_share(stored["total_share"] * x) for x in (1 - TOLERANCE, 1 + TOLERANCE)}
    if stored["log2_share"] not in near or len(stored["rules"]) != len(stored["total_share_by_rule"]):
        return math.inf
    a, b = ([row["total_share"], *row["total_share_by_rule"]] for row in (stored, counted))
    n = [counted["n_shares"], *counted["n_shares_by_rule"]]
    return max(abs(x - y) / max(abs(y), m / 100, 1e-12) for x, y, m in zip(a, b, n, strict=True))


def _batches(ids: Mapping[float, Sequence[str]]) -> Iterator[tuple[float, list[str]]]:
    for tolerance, alike in ids.items():
        rest = iter(alike)
        while batch := list(islice(rest, THINGS_PER_QUERY)):
            yield tolerance, batch


@click.command("verify")
@store_option
def verify_command(store: str | None) -> None:
    """Check everything that must hold in a store; the exit status is 1 if something does not."""
    with connect(store, create=False) as opened:
        checks = verify(opened)
    _print_table(checks) if sys.stdout.isatty() else _print_lines(checks)
    violations = sum(check.violations for check in checks)
    click.echo(f"{violations} violations." if violations else "No violations.")
    sys.exit(1 if violations else 0)


def _cells(check: Check) -> tuple[str, ...]:
    worst = "" if check.worst is None else f"{check.worst:.1e}"
    return check.name, f"{check.checked:,}", worst, f"{check.violations:,}"


def _print_lines(checks: Sequence[Check]) -> None:
    click.echo(f"{'check':<16}{'checked':>12}{'residual':>10}{'violations':>12}  what")
    for check in checks:
        name, checked, worst, violations = _cells(check)
        example = f"; first: {check.example}" if check.example else ""
        click.echo(f"{name:<16}{checked:>12}{worst:>10}{violations:>12}  {check.sentence}{example}")


def _print_table(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "checked", "residual", "violations", "what")
    for check in checks:
        example = f"; first: {check.example}" if check.example else ""
        style = "red" if check.violations else None
        table.add_row(*_cells(check), escape(check.sentence + example), style=style)
    Console().print(table)
