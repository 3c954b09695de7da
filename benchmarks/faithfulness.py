"""How faithful circuits are, by keep rule and threshold: the measurements behind docs/faithfulness.md.

    python -m benchmarks.faithfulness measure ROWS.jsonl [--every N] [--start M]
    python -m benchmarks.faithfulness report ROWS.jsonl [--out docs/images]
    python -m benchmarks.faithfulness cost

`measure` takes every N-th prompt of the package with its default roots, finds each root's circuit under
every rule and threshold of `GRID`, and measures it and both baselines in the real model (METHOD 6, mean
ablation). A third baseline is the top-N of direct attribution among the features that push the root the way
it went. Also the features with an edge into each root are ablated to zero one at a time, and the edge is noted
beside what the root's pre-activation loses. One line a root; what is there already is not measured again.

`report` prints tables with bootstrap confidence intervals over circuits, and draws the plots.
`cost` prints the processor time of a prompt with its default circuits, without measuring them and for that.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch

from ingest import faithfulness
from ingest.attribution import RULES, Attribution, Roots, attribute
from ingest.circuits import CircuitRequest, prompt_record
from ingest.cli import LOGIT_THRESHOLDS, THRESHOLDS
from ingest.faithfulness import Ablation, Claim, Intervention, ablation, as_features, measure, measured, root_values
from ingest.model import MINI
from ingest.prompts import Prompt
from ingest.replacement import ReplacementModel
from ingest.roots import Root, from_the_top, parse_root, resolve, root_table
from ingest.setup import Setup, set_up

GRID = {
    "relative": (0.005, 0.01, 0.02, 0.05),
    "support": (0.005, 0.01, 0.02, 0.05),
    "top_mass": (0.35, 0.7),
    "paper": (0.05, 0.2, 0.5),
}
DRAWS = 2  # random sets a circuit; many circuits make up for few draws
EDGE_SHARE = 0.02
RESAMPLES = 2000
MEASURES = ("faithfulness", "necessity")


@click.group()
def main() -> None:
    """Measure, and report."""


@main.command("measure")
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--every", default=2, show_default=True, help="Take every N-th prompt.")
@click.option("--start", default=0, show_default=True, help="Beginning with this one.")
@click.option("--seconds", default=330.0, show_default=True, help="Stop after so long; run again to go on.")
def measure_command(rows: Path, every: int, start: int, seconds: float) -> None:
    """Measure what is not in ROWS yet."""
    torch.set_num_threads(1)
    faithfulness.DRAWS = DRAWS
    done = {json.loads(line)["prompt"] for line in rows.read_text().splitlines()} if rows.exists() else set()
    prompts = [json.loads(line)["prompt"] for line in (MINI.parent / "prompts.jsonl").read_text().splitlines()][
        start::every
    ]
    setup, started = set_up("mini"), time.monotonic()
    mean, zero = ablation(setup, "mean"), ablation(setup, "zero")
    for number, text in enumerate(prompts):
        if number in done:
            continue
        if time.monotonic() - started > seconds:
            click.echo(f"{number} of {len(prompts)} prompts")
            return
        replacement = setup.replace(setup.model.tokens(text))
        found = list(measure_prompt(setup, replacement, number, mean, zero))
        with rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    click.echo(f"all {len(prompts)} prompts")


def package_prompts() -> list[str]:
    """The prompts that come with `mini`."""
    return [json.loads(line)["prompt"] for line in (MINI.parent / "prompts.jsonl").read_text().splitlines()]


def measure_prompt(
    setup: Setup, replacement: ReplacementModel, number: int, mean: Ablation, zero: Ablation
) -> Iterator[dict[str, Any]]:
    """One row a root: its circuits under every rule and threshold, and its edges."""
    (roots,) = resolve([parse_root("default", setup.model, setup.dictionaries)], replacement)
    roots = from_the_top(roots)
    table = root_table(roots, replacement)
    claims: list[Claim] = []
    keys: list[tuple[int, str, float]] = []
    for rule, thresholds in GRID.items():
        for threshold in thresholds:
            found = attribute(replacement, table, RULES[rule](threshold))
            for r, root in enumerate(roots):
                claims.append(Claim(f"{number}/{r}/{rule}/{threshold}", root, kept(setup, replacement, found, r)))
                keys.append((r, rule, threshold))
    nothing = [Claim(f"{number}/{r}/none", root, as_features(setup, [])) for r, root in enumerate(roots)]
    shares = measure(setup, replacement, [*claims, *nothing], mean)
    signed = signed_shares(setup, replacement, table, claims, [r for r, _, _ in keys], mean)
    direct = attribute(replacement, table, lambda attr, _: torch.zeros_like(attr, dtype=torch.bool))
    for r, root in enumerate(roots):
        yield {
            "prompt": number,
            "root": [root.site, root.layer, root.position, root.index],
            "value": float(table.value[r]),
            "floor": shares[len(claims) + r].faithfulness,
            "circuits": [
                {
                    "rule": rule,
                    "threshold": threshold,
                    "size": int((claim.features[:, 1] > 0).sum()),
                    **{k: v for k, v in vars(share).items() if k != "ablation"},
                    "signed_faithfulness": same_way[0],
                    "signed_necessity": same_way[1],
                }
                for (of, rule, threshold), claim, share, same_way in zip(keys, claims, shares, signed, strict=False)
                if of == r
            ],
            "edges": edges(setup, replacement, root, table, direct, r, zero),
        }


def kept(setup: Setup, replacement: ReplacementModel, found: Attribution, r: int) -> torch.Tensor:
    """The features that root `r` kept, as rows of (site, position, index)."""
    rows: list[torch.Tensor] = []
    for number, d in enumerate(setup.dictionaries):
        site = replacement.site(d.record.layer, d.record.site)
        mask = (found.mlp if d.record.site == "mlp" else found.attn)[d.record.layer].kept[r]
        at = [torch.full_like(site.index[mask], number), site.position[mask], site.index[mask]]
        rows.append(torch.stack(at, 1))
    return torch.cat(rows)


def signed_shares(
    setup: Setup, replacement: ReplacementModel, table: Roots, claims: list[Claim], of: list[int], by: Ablation
) -> list[tuple[float, float]]:
    """(faithfulness, necessity) of a third baseline: the top-N of direct attribution that push the root its way."""
    everything = attribute(replacement, table, lambda attr, _: attr != 0)
    sites = [(n, d.record, replacement.site(d.record.layer, d.record.site)) for n, d in enumerate(setup.dictionaries)]
    active = torch.cat([torch.stack([torch.full_like(s.index, n), s.position, s.index], 1) for n, _, s in sites])
    attr = torch.cat(
        [(everything.mlp if d.site == "mlp" else everything.attn)[d.layer].feature for _, d, _ in sites], 1
    )
    attr = attr * table.value.sign()[:, None] * (active[:, 1] > 0)
    interventions: list[Intervention] = []
    for claim, r in zip(claims, of, strict=True):
        n = int((claim.features[:, 1] > 0).sum())
        chosen = active[attr[r].topk(min(n, int((attr[r] > 0).sum()))).indices]
        interventions += [Intervention(claim.root, chosen, outside) for outside in (True, False)]
    values = root_values(setup, replacement.trace.tokens.tolist(), interventions, by).view(-1, 2)
    shares = values / table.value[of, None]
    return [(float(f), 1 - float(n)) for f, n in shares]


def edges(
    setup: Setup, replacement: ReplacementModel, root: Root, table: Roots, direct: Attribution, r: int, zero: Ablation
) -> list[tuple[float, float]]:
    """(edge, loss of the root's pre-activation without its source) of every edge of at least `EDGE_SHARE`.

    With nothing kept in the sweep, attributions are the direct edges into the root, summed over heads.
    """
    value = float(table.value[r])
    sources: list[tuple[int, int, int]] = []
    weights: list[float] = []
    for number, d in enumerate(setup.dictionaries):
        site = replacement.site(d.record.layer, d.record.site)
        attr = (direct.mlp if d.record.site == "mlp" else direct.attn)[d.record.layer].feature[r]
        strong = ((attr.abs() >= EDGE_SHARE * abs(value)) & (site.position > 0)).nonzero()[:, 0]
        sources += [(number, int(site.position[i]), int(site.index[i])) for i in strong]
        weights += attr[strong].tolist()
    interventions = [Intervention(root, as_features(setup, [source]), False) for source in sources]
    after = root_values(setup, replacement.trace.tokens.tolist(), interventions, zero, pre_activations=True)
    return [(w / value, (value - a) / value) for w, a in zip(weights, after.tolist(), strict=True)]


@main.command("report")
@click.argument("rows", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/images"), show_default=True)
def report_command(rows: Path, out: Path) -> None:
    """Print the tables and draw the plots."""
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    frame = pd.DataFrame(
        {"circuit": n, "kind": "logit" if row["root"][0] == "logit" else "feature", "floor": row["floor"], **circuit}
        for n, row in enumerate(read)
        for circuit in row["circuits"]
    )
    click.echo(f"{frame['circuit'].nunique()} circuits of {len({row['prompt'] for row in read})} prompts\n")
    for kind, part in frame.groupby("kind"):
        click.echo(f"{kind}s: {part['circuit'].nunique()}; with nothing kept {part['floor'].mean():.2f}\n")
        for measure_ in MEASURES:
            click.echo(summary(part, measure_) + "\n")
    click.echo(edge_summary(read))
    out.mkdir(parents=True, exist_ok=True)
    draw(frame, read, out)


@main.command("cost")
def cost_command() -> None:
    """Processor seconds of every eighth prompt: trace and circuits, and measuring these."""
    torch.set_num_threads(1)
    setup = set_up("mini")
    by, root = ablation(setup, "mean"), parse_root("default", setup.model, setup.dictionaries)
    seconds: list[tuple[float, float]] = []
    for text in package_prompts()[::8]:
        started = time.process_time()
        replacement = setup.replace(setup.model.tokens(text))
        request = CircuitRequest("support", THRESHOLDS["support"], root, logit_threshold=LOGIT_THRESHOLDS["support"])
        record = prompt_record(Prompt(text, "bench"), "p", setup.model, "r", replacement, [request])
        traced = time.process_time()
        measured(setup, replacement, record, by)
        seconds.append((traced - started, time.process_time() - traced))
    trace, measuring = np.median(seconds, axis=0)
    click.echo(
        f"trace and circuits {trace:.2f} s, measuring them {measuring:.2f} s (medians of {len(seconds)} prompts)"
    )


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over circuits."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return float(values.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def shown(values: np.ndarray, form: str = "{:.2f}") -> str:
    """Mean and interval, as a table shows them."""
    return f"{form} [{form}, {form}]".format(*interval(values))


def summary(frame: pd.DataFrame, measure_: str) -> str:
    """One row a rule and threshold: median size, mean, how far ahead of each baseline, and the distance from 1.

    `behind top-N` is the share of circuits that do worse than it, `above 1.1` the share that overshoot.
    """
    beside = {"random": "random", "top": "top-N", "signed": "top-N of one sign"}
    head = ["rule", "threshold", "features", measure_, *(f"ahead of {name}" for name in beside.values())]
    head += ["behind top-N", "above 1.1", "distance from 1", "top-N's distance"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (rule, threshold), part in frame.groupby(["rule", "threshold"], sort=False):
        own, top = part[measure_].to_numpy(), part[f"top_{measure_}"].to_numpy()
        cells = [str(rule), str(threshold), f"{part['size'].median():.0f}", shown(own)]
        cells += [shown(own - part[f"{b}_{measure_}"].to_numpy(), "{:+.2f}") for b in beside]
        cells += [f"{(own < top - 1e-6).mean():.0%}", f"{(own > 1.1).mean():.0%}"]
        cells += [f"{np.abs(own - 1).mean():.2f}", f"{np.abs(top - 1).mean():.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def edge_summary(read: list[dict[str, Any]]) -> str:
    """Spearman's rank correlation of edges and single ablations, within roots and over all edges."""
    lines: list[str] = []
    for kind in ("feature", "logit"):
        tables = [
            np.array(row["edges"]) for row in read if row["edges"] and (row["root"][0] == "logit") == (kind == "logit")
        ]
        within = np.array([spearman(t) for t in tables if len(t) >= 5])
        pooled = np.concatenate(tables)
        lines.append(
            f"{kind}s: {len(pooled)} edges into {len(tables)} roots; rank correlation {spearman(pooled):.2f} over all, "
            f"{shown(within)} within the {len(within)} roots that have five or more; same sign "
            f"{(np.sign(pooled[:, 0]) == np.sign(pooled[:, 1])).mean():.0%}"
        )
    return "\n".join(lines)


def spearman(table: np.ndarray) -> float:
    """Rank correlation of the two columns."""
    ranks = pd.DataFrame(table).rank().to_numpy()
    return float(np.corrcoef(ranks.T)[0, 1])


def draw(frame: pd.DataFrame, read: list[dict[str, Any]], out: Path) -> None:
    """faithfulness.png: shares against size, a curve a rule, beside both baselines. edges.png: edges, ablations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5), sharex="col")
    for column, (kind, of_kind) in enumerate(frame.groupby("kind")):
        for row, m in enumerate(MEASURES):
            axis = axes[row, column]
            for color, (rule, part) in zip(("C0", "C1", "C2", "C3"), of_kind.groupby("rule", sort=False), strict=False):
                curve(axis, part, m, color, "-", str(rule))
                curve(axis, part, f"top_{m}", color, "--", "top-N of its sizes" if rule == "relative" else None)
                curve(axis, part, f"random_{m}", color, ":", "random of its sizes" if rule == "relative" else None)
            curve(axis, of_kind[of_kind["rule"] == "support"], f"signed_{m}", "C1", "-.", "top-N of one sign")
            axis.set_xscale("log")
            axis.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_title(f"{m}, {kind} roots")
            axis.set_ylabel("share of the root's value")
        axes[0, column].axhline(of_kind["floor"].mean(), color="0.7", linewidth=1, label="nothing kept")
        axes[1, column].set_xlabel("features in the circuit, mean")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "faithfulness.png", dpi=80)

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.5))
    for axis, kind in zip(axes, ("feature", "logit"), strict=True):
        pooled = np.concatenate(
            [row["edges"] for row in read if row["edges"] and (row["root"][0] == "logit") == (kind == "logit")]
        )
        axis.plot(*pooled.T, ".", markersize=2, alpha=0.4)
        axis.axline((0, 0), slope=1, color="0.6", linewidth=1)
        axis.set(xlim=(-0.6, 1), ylim=(-0.6, 1), title=f"into {kind} roots")
        axis.set_xlabel("edge, share of the root's pre-activation")
        axis.set_ylabel("lost in the real model without its source")
    figure.tight_layout()
    figure.savefig(out / "edges.png", dpi=80)


def curve(axis: Any, part: pd.DataFrame, m: str, color: str, style: str, label: str | None) -> None:
    """Means with intervals of one measure over a rule's thresholds."""
    points = [(g["size"].mean(), *interval(g[m].to_numpy())) for _, g in part.groupby("threshold")]
    size, mean, low, high = np.array(sorted(points)).T
    axis.errorbar(size, mean, [mean - low, high - mean], color=color, linestyle=style, marker=".", label=label)


if __name__ == "__main__":
    main()
