"""`atlas multitoken`: multi-token circuits among what is stored (METHOD 8).

Candidates are

    spans    one feature above layer 0 on 2 to LONGEST tokens; those whose tokens were all asked for as roots
             first, then by log2(1 + prompts that show feature and text) * -log2(the feature's frequency), so
             that what fires everywhere comes last however many spans it has; at most PER_FEATURE a feature
    chains   from each stored root r_n, and from the spans' roots, back: r_(k-1) is the feature at the token before
             that the circuit of r_k keeps with the largest share of its value, SIGMA or more; by smallest share times
             mean -log2 frequency

Each is measured: crossing_weight beside its nulls (ingest/crossing.py), p = (1 + draws that cross as much) /
(1 + draws), and q over the candidates of the run by Benjamini and Hochberg; what the real model loses without
its first token's features (ingest/ablation.py). All are stored, whatever comes out, and every root's circuit with
them: as an ordinary request, so that a later run keeps it. Layer 0 reads embeddings alone, so that nothing can
reach it through an activation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from atlas.cli import store_option
from atlas.errors import AtlasError
from atlas.multitoken import StoredPrompt, frequencies, read_prompts, root_table, span_table, write_multitoken
from atlas.records import MultiTokenRecord
from atlas.store import Store
from ingest.ablation import FirstToken, ablate_first_token
from ingest.attribution import RULES, attribute
from ingest.cli import THRESHOLDS
from ingest.crossing import Crossing, measure
from ingest.job import Task, circuit_requests, run
from ingest.progress import progress_bar
from ingest.prompts import Prompt
from ingest.replacement import ReplacementModel
from ingest.roots import Root, from_the_top
from ingest.roots import root_table as sweep_table
from ingest.setup import Setup

LONGEST = 8  # tokens
PER_FEATURE = 3
SIGMA = 0.1
RULE, THRESHOLD = "relative", THRESHOLDS["relative"]

Started = Callable[[str, int], Callable[[], None]]  # told a stage and its steps; what it gives is called at each


@dataclass(frozen=True)
class Candidate:
    """Roots on consecutive tokens of a prompt, in order: one feature (a span), or each driven by the one before."""

    prompt: str
    form: str
    roots: tuple[Root, ...]


@dataclass(frozen=True)
class Found:
    """A candidate with what was measured of it; `q` is its false discovery rate among those of the run."""

    candidate: Candidate
    text: str
    crossing: Crossing
    ablation: FirstToken
    q: float


def find(store: Store, setup: Setup, length: int, limit: int, started: Started) -> list[Found]:
    """Measure the `limit` best spans and the `limit` best chains of `length` tokens and more, and store them.

    The result is in the order of p, then of crossing_weight. Raises AtlasError for a length that cannot be.
    """
    check_length(length, setup)
    frequency = frequencies(store)
    rooted = roots_by_prompt(store, setup)
    candidates = best_spans(span_table(store, setup.record.id, length), rooted, frequency, limit)
    prompts = {prompt.id: prompt for prompt in read_prompts(store, sorted({*rooted, *(c.prompt for c in candidates)}))}
    ends = {id: rooted.get(id, set()).union(*(c.roots for c in candidates if c.prompt == id)) for id in prompts}
    candidates += _best_chains(setup, prompts, ends, frequency, length, limit, started)
    measured: list[tuple[Candidate, str, Crossing, FirstToken]] = []
    step = started("Measuring", len(candidates))
    for id in dict.fromkeys(c.prompt for c in candidates if c.prompt in prompts):
        replacement = setup.replace(prompts[id].token_ids)
        for candidate in (c for c in candidates if c.prompt == id and _fires(replacement, c.roots)):
            crossing = measure(setup, replacement, candidate.roots, frequency)
            ablation = ablate_first_token(setup, replacement, candidate.roots, RULE, THRESHOLD)
            span = replacement.trace.tokens[candidate.roots[0].position : candidate.roots[-1].position + 1]
            measured.append((candidate, setup.model.text(span.tolist()), crossing, ablation))
            step()
    q = false_discovery_rates(np.array([crossing.p_value for _, _, crossing, _ in measured]))
    found = [Found(*parts, q=float(rate)) for parts, rate in zip(measured, q, strict=True)]
    _store(store, setup, prompts, rooted, found, started)
    return sorted(found, key=lambda f: (f.crossing.p_value, -f.crossing.weight))


def check_length(length: int, setup: Setup) -> None:
    """Raise AtlasError where no span of `length` tokens can be."""
    longest = min(LONGEST, setup.model.record.n_ctx - 1)
    if not 2 <= length <= longest:
        raise AtlasError(
            f"A span of {length} tokens cannot be looked for: a span has at least 2 tokens, and with "
            f"{setup.model.record.id}, which reads {setup.model.record.n_ctx}, at most {longest} are looked at."
        )


def roots_by_prompt(store: Store, setup: Setup) -> dict[str, set[Root]]:
    """The features at which circuits under RULE are rooted, by prompt."""
    table = root_table(store, setup.record.id, RULE)
    rooted: dict[str, set[Root]] = {}
    for prompt, position, layer, site, index in table.itertuples(index=False, name=None):
        rooted.setdefault(prompt, set()).add(Root(site, layer, position, index))
    return rooted


def best_spans(
    spans: pd.DataFrame, rooted: dict[str, set[Root]], frequency: dict[str, float], limit: int
) -> list[Candidate]:
    """The `limit` best spans as candidates; columns of `spans` as of atlas.multitoken.span_table."""
    spans = spans[spans["end"] - spans["start"] < LONGEST].copy()
    if spans.empty:
        return []
    n_prompts = spans.groupby(["feature", "text"])["prompt"].transform("nunique")
    spans["score"] = rarity_score(n_prompts.to_numpy(float), spans["feature"].map(frequency).to_numpy(float))
    columns = [spans[name].tolist() for name in ("prompt", "layer", "site", "index", "start", "end")]
    candidates = [
        Candidate(prompt, "span", tuple(Root(site, layer, t, index) for t in range(start, end + 1)))
        for prompt, layer, site, index, start, end in zip(*columns, strict=True)
    ]
    spans["asked"] = [rooted.get(c.prompt, set()) >= set(c.roots) for c in candidates]
    spans["place"] = range(len(spans))
    ordered = spans.sort_values(["asked", "score", "prompt", "start"], ascending=[False, False, True, True])
    chosen = ordered[ordered["asked"] | (ordered.groupby("feature").cumcount() < PER_FEATURE)].head(limit)
    return [candidates[place] for place in chosen["place"].tolist()]


def rarity_score(n_prompts: Float[np.ndarray, " n"], frequency: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """log2(1 + prompts that show it) * -log2(frequency): 0 for a feature that fires everywhere."""
    return np.log2(1 + n_prompts) * -np.log2(np.clip(frequency, 1e-12, 1))


def chains(replacement: ReplacementModel, roots: Sequence[Root]) -> list[tuple[tuple[Root, ...], float]]:
    """The chains that end at `roots`, two tokens and more, with the smallest share of their steps."""
    before: dict[Root, tuple[Root, float]] = {}
    known: set[Root] = set()
    waiting = [root for root in roots if root.position > 1]
    while waiting:
        known |= set(waiting)
        found = _drivers(replacement, waiting)
        before |= found
        waiting = list(dict.fromkeys(r for r, _ in found.values() if r not in known and r.position > 1))
    made: list[tuple[tuple[Root, ...], float]] = []
    for root in roots:
        chain: list[Root] = [root]
        shares: list[float] = []
        while chain[0] in before and len(chain) < LONGEST:
            root, share = before[chain[0]]
            chain, shares = [root, *chain], [share, *shares]
        if len(chain) > 1:
            made.append((tuple(chain), min(shares)))
    return [(c, s) for c, s in made if not any(c != other and other[: len(c)] == c for other, _ in made)]


def _drivers(replacement: ReplacementModel, roots: Sequence[Root]) -> dict[Root, tuple[Root, float]]:
    """For each root the feature at the token before that its circuit keeps with the largest share, if SIGMA or more."""
    ordered = from_the_top(roots)
    table = sweep_table(ordered, replacement)
    found = attribute(replacement, table, RULES[RULE](THRESHOLD))
    best: dict[Root, tuple[Root, float]] = {}
    for layer in range(replacement.n_layers):
        for name in ("attn", "mlp"):
            site, at = replacement.site(layer, name), found.site(layer, name)
            here = site.position == (table.position - 1)[:, None]
            share = at.feature / table.value[:, None] * (at.kept & here)
            if not share.shape[1]:
                continue
            for root, (value, i) in zip(ordered, zip(*(x.tolist() for x in share.max(1)), strict=True), strict=True):
                if value >= max(SIGMA, best[root][1] if root in best else 0.0):
                    best[root] = (Root(name, layer, int(site.position[i]), int(site.index[i])), value)
    return best


def _best_chains(
    setup: Setup,
    prompts: dict[str, StoredPrompt],
    ends: dict[str, set[Root]],
    frequency: dict[str, float],
    length: int,
    limit: int,
    started: Started,
) -> list[Candidate]:
    scored: list[tuple[float, Candidate]] = []
    step = started("Looking for chains", len(ends))
    for id, roots in sorted(ends.items()):
        replacement = setup.replace(prompts[id].token_ids)
        alive = sorted((r for r in roots if _fires(replacement, [r])), key=_order)
        for chain, share in chains(replacement, alive):
            features = [f"{setup.model.record.id}/{r.layer}/{r.site}/{r.index}" for r in chain]
            bits = rarity_score(np.ones(len(chain)), np.array([frequency.get(f, 1.0) for f in features])).mean()
            if len(chain) >= length:
                scored.append((share * float(bits), Candidate(id, "chain", chain)))
        step()
    scored.sort(key=lambda pair: (-pair[0], pair[1].prompt, _order(pair[1].roots[-1])))
    return [candidate for _, candidate in scored[:limit]]


def _order(root: Root) -> tuple[int, int, str, int]:
    return root.position, root.layer, root.site, root.index


def _fires(replacement: ReplacementModel, roots: Sequence[Root]) -> bool:
    return all(replacement.site(r.layer, r.site).find(r.position, r.index) is not None for r in roots)


def false_discovery_rates(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Benjamini and Hochberg's q of each p: the smallest rate at which it is among the discoveries."""
    order = p.argsort()
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return q


def _store(
    store: Store,
    setup: Setup,
    prompts: dict[str, StoredPrompt],
    rooted: dict[str, set[Root]],
    found: Sequence[Found],
    started: Started,
) -> None:
    """First every root's circuit that is not there, then the multi-token circuits that join them."""
    tasks: list[Task] = []
    for id in dict.fromkeys(f.candidate.prompt for f in found):
        wanted = {root for f in found if f.candidate.prompt == id for root in f.candidate.roots}
        specs = [
            f"{r.layer}/{r.site}/{r.index}@{r.position}" for r in sorted(wanted - rooted.get(id, set()), key=_order)
        ]
        if specs:
            prompt = prompts[id]
            task = Prompt(prompt.text, f"prompt {id}", prompt.task, prompt.source, prompt.fields)
            tasks.append(Task(task, id, prompt.token_ids, circuit_requests(setup, specs, RULE, THRESHOLD)))
    if tasks:
        step = started("Storing circuits", len(tasks))
        run(store, setup, tasks, [], _unexpected, lambda summary: step())
    for id in dict.fromkeys(f.candidate.prompt for f in found):
        write_multitoken(store, [_record(f) for f in found if f.candidate.prompt == id])


def _unexpected(sentence: str) -> None:
    raise AtlasError(f"A circuit could not be stored: {sentence}.")


def _record(found: Found) -> MultiTokenRecord:
    roots, crossing, ablation = found.candidate.roots, found.crossing, found.ablation
    prompt, start, end = found.candidate.prompt, roots[0].position, roots[-1].position
    last = f"{roots[-1].layer}/{roots[-1].site}/{roots[-1].index}"
    measured = ablation.n > 0
    return MultiTokenRecord(
        id=f"{prompt}/{start}-{end}/{last}/{found.candidate.form}/{RULE}",
        prompt=prompt,
        form=found.candidate.form,
        start=start,
        end=end,
        text=found.text,
        joins=tuple(f"{prompt}/{r.position}/{r.layer}/{r.site}/{r.index}/{RULE}" for r in roots),
        crossing_weight=crossing.weight,
        crossing_leaves=crossing.leaves,
        null_n=len(crossing.null),
        shuffled_n=len(crossing.shuffled),
        p_value=crossing.p_value,
        q_value=found.q,
        null_mean=float(crossing.null.mean()) if len(crossing.null) else None,
        null_sd=float(crossing.null.std()) if len(crossing.null) else None,
        shuffled_mean=float(crossing.shuffled.mean()) if len(crossing.shuffled) else None,
        ablated_to=ablation.kind if measured else None,
        n_ablated=ablation.n if measured else None,
        lost=ablation.lost if measured else None,
        lost_random=ablation.lost_random if measured else None,
    )


@click.command()
@click.option("--model", default="mini", show_default=True, help="The model that the prompts were traced with.")
@store_option
@click.option("--length", default=2, show_default=True, help="Tokens that a span or chain has at least.")
@click.option(
    "--limit",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="How many spans, and how many chains, are measured.",
)
def multitoken(model: str, store: str | None, length: int, limit: int) -> None:
    """Find circuits over several tokens among the stored spans and roots, test them, and store them.

    All that are measured are stored, with their nulls and their false discovery rate among those of this run.
    """
    import atlas
    from ingest.setup import set_up

    torch.set_grad_enabled(False)
    with progress_bar() as bar, atlas.connect(store, create=False) as opened:

        def started(stage: str, steps: int) -> Callable[[], None]:
            task = bar.add_task(stage, total=steps, rates="")
            return lambda: bar.advance(task)

        found = find(opened, set_up(model), length, limit, started)
        address = opened.address
    _print(found)
    kept = sum(f.q <= 0.1 for f in found)
    click.echo(
        f"{len(found)} candidates measured and stored, {kept} at a false discovery rate of 10 %. Store: {address}"
    )


def _print(found: Sequence[Found]) -> None:
    if not found:
        return
    click.echo(f"{'crosses':>8}{'null':>8}{'p':>8}{'q':>8}{'lost':>8}{'random':>8}  what")
    for f in found[:20]:
        null = f"{f.crossing.null.mean():8.3f}" if len(f.crossing.null) else " " * 8
        lost = f"{f.ablation.lost:8.3f}{f.ablation.lost_random:8.3f}" if f.ablation.n else " " * 16
        path = " > ".join(dict.fromkeys(f"L{r.layer} {r.site} {r.index}" for r in f.candidate.roots))
        click.echo(f"{f.crossing.weight:8.3f}{null}{f.crossing.p_value:8.3f}{f.q:8.3f}{lost}  {f.text!r} {path}")
