"""Rows of direct edges against circuit-tracer 0.5.0, on the same weights and the same targets.

    python -m benchmarks.bench_circuit_tracer 32|64 [cpu|cuda]

A random model of GPT-2 small's shape with random MLP transcoders of 24,576 features in all 12 layers, their biases
set so that about 50 fire on a token; attention is frozen and passed through; a prompt of 32 or 64 random tokens;
float32, both on 2 threads, or both on the GPU and without TF32. circuit-tracer picks 2,048 targets (10 logits and
the features of most influence), and a row holds the edges into one target from all active features, errors and
embeddings. Its seconds are those of its computation of rows alone, without its forward pass, encoding and ranking.
Ours are of the same rows and from the same sources (without biases, position embeddings, and the MLPs on the first
token); they are handed over a block at a time and let go, as ingestion takes them. Compared are all edges of its
graph, node for node. How fast our matrix products run is told beside one large product, timed in turn: where the
two are alike, only fewer operations a row could give more rows a second.

circuit-tracer is installed into an environment of its own under .cache, which shares torch with this one.
Prints one JSON object.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import deque
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from atlas.records import Kind
from benchmarks.bench_ingest import gpt2_shaped
from benchmarks.clock import wall
from ingest.edges import Sources, Targets, depth_of
from ingest.model import MINI, check_device
from ingest.nodes import Group, Nodes
from ingest.open_paths import EdgeRows, edge_rows
from ingest.replacement import ReplacementModel, centre
from ingest.setup import Setup

VERSION = "0.5.0"
THREADS, BATCH, N_ROWS, N_LOGITS, REPEATS = 2, 256, 2048, 10, 3
SIDE = 4096  # of the two matrices of one large product


@torch.inference_mode()
def main(n_tokens: str, device: str = "cpu") -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision("highest")
    check_device(device)
    python = environment()
    setup = gpt2_shaped(sites=("mlp",), device=device)
    tokens = torch.randint(1, 50_000, (int(n_tokens) - 1,), generator=torch.Generator().manual_seed(1))
    replacement = setup.replace([setup.model.bos, *tokens.tolist()])
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), setup, replacement)
        side = Path(__file__).with_name("circuit_tracer_side.py")
        done = subprocess.run([str(python), str(side), name], check=True, stdout=subprocess.PIPE, text=True)
        graph = load_file(Path(name) / "graph.safetensors", device)
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    nodes = nodes_of(setup, replacement)
    sources, targets = sources_of(nodes), targets_of(graph, replacement)
    torch.set_num_threads(1)  # operations are counted in this thread alone
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _of_addmm}) as counter:
        rows = [*chain(*edge_rows(sources, targets, replacement, list))]
    torch.set_num_threads(THREADS)
    edges = table(rows, len(targets.node), len(sources.node))
    compared, worst = difference(graph, edges, nodes)
    took: list[tuple[float, float, float]] = []
    for _ in range(REPEATS):
        started, cpu = wall(device), time.process_time()
        edge_rows(sources, targets, replacement, partial(deque, maxlen=0))
        took.append((wall(device) - started, time.process_time() - cpu, large_product(device)))
    seconds, cpu, product = (statistics.median(column) for column in zip(*took, strict=True))
    speed, full_speed = (n / s / 1e9 for n, s in ((counter.get_total_flops(), seconds), (2 * SIDE**3, product)))
    own, other = len(edges) / seconds, theirs["rows"] / theirs["rows_s"]
    by_processor = theirs["cpu_s"] / theirs["rows"] * len(edges) / cpu
    print(
        json.dumps(
            {
                "tokens": len(replacement.trace.tokens),
                "targets (rows)": theirs["rows"],
                "sources": len(sources.node),
                "circuit-tracer, rows a second": round(other, 1),
                "rows a second": round(own, 1),
                "rows a second / circuit-tracer's (goal: at least 40)": round(own / other, 1),
                **({"the same by processor time": round(by_processor, 1)} if device == "cpu" else {}),
                "GFLOP a row": round(counter.get_total_flops() / len(edges) / 1e9, 3),
                "GFLOP a second": round(speed),
                "of one large product": round(full_speed),
                "share of that": round(speed / full_speed, 2),
                "circuit-tracer with its forward pass, encoding and ranking, s": round(theirs["whole_s"], 1),
                **{f"circuit-tracer, {what}": round(gb, 1) for what, gb in theirs["peak"].items()},
                "edges compared": compared,
                "largest difference / the target's largest edge (goal: at most 0.001)": float(f"{worst:.1e}"),
            }
        )
    )


def large_product(device: str) -> float:
    """Seconds of one product of two matrices of SIDE x SIDE."""
    a, b = torch.rand(2, SIDE, SIDE, device=device)
    started = wall(device)
    torch.mm(a, b)
    return wall(device) - started


def _of_addmm(added: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """The operations of an addmm_, which PyTorch does not count."""
    return 2 * a.numel() * b[1]


def environment() -> Path:
    """The Python that has circuit-tracer, installed now unless it was before."""
    folder = Path(__file__).parents[1] / ".cache" / f"circuit-tracer-{VERSION}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "zz-shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
        wanted = f"circuit-tracer=={VERSION}"
        subprocess.run([python, "-m", "pip", "install", "-q", wanted], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return python


def write(folder: Path, setup: Setup, replacement: ReplacementModel) -> None:
    """The weights as circuit-tracer reads them, and what is asked of it."""
    bridge, weights, trace = setup.model.bridge, setup.model.weights, replacement.trace
    tensors = {"tokens": trace.tokens, "embed.W_E": bridge.W_E, "pos_embed.W_pos": trace.pos_embed}
    tensors |= {"unembed.W_U": weights.W_U, "unembed.b_U": weights.b_U}
    for layer in range(replacement.n_layers):
        for name in ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O"):
            tensors[f"blocks.{layer}.attn.{name}"] = getattr(weights, name)[layer]
        for name in ("W_in", "b_in", "W_out", "b_out"):
            tensors[f"blocks.{layer}.mlp.{name}"] = getattr(bridge, name)[layer]
        d = replacement.mlp[layer].dictionary
        parts = {"W_enc": d.W_enc.T, "b_enc": d.b_enc, "W_dec": d.W_dec, "b_dec": d.b_dec}
        save_file({name: part.contiguous() for name, part in parts.items()}, folder / f"transcoder.{layer}.safetensors")
    save_file(
        {name: part.detach().clone(memory_format=torch.contiguous_format) for name, part in tensors.items()},
        folder / "model.safetensors",
    )
    request = {"threads": THREADS, "batch": BATCH, "rows": N_ROWS, "logits": N_LOGITS, "eps": bridge.cfg.eps}
    request |= {"tokenizer": str(MINI / "tokenizer.json"), "device": setup.model.device.type}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")


def nodes_of(setup: Setup, replacement: ReplacementModel) -> Nodes:
    """The nodes that circuit-tracer's edges come from."""
    every = torch.arange(len(replacement.trace.tokens), device=setup.model.device)
    groups = [Group(Kind.EMBEDDING, -1, "", every, every)]
    for layer in range(replacement.n_layers):
        place = replacement.mlp[layer].position.nonzero()[:, 0]
        groups += [
            Group(Kind.MLP, layer, "mlp", replacement.mlp[layer].position[place], place),
            Group(Kind.ERROR, layer, "mlp", every[1:], every[1:]),
        ]
    return Nodes("bench", setup.model, replacement, groups, [], [])


def sources_of(nodes: Nodes) -> Sources:
    """All nodes with what they write."""
    return Sources(
        node=nodes.arange(0, len(nodes)),
        depth=torch.cat([torch.full_like(g.position, depth_of(g.layer, g.site)) for g in nodes.circuit]),
        position=torch.cat([g.position for g in nodes.circuit]),
        write=torch.cat([nodes.write(g) for g in nodes.circuit]),
    )


def targets_of(graph: dict[str, torch.Tensor], replacement: ReplacementModel) -> Targets:
    """The targets that circuit-tracer chose, in its graph's order: features, then logits at the last token."""
    trace = replacement.trace
    layer, position, index = graph["features"].T
    encoder = torch.stack(
        [replacement.mlp[at].dictionary.W_enc[:, i] for at, i in zip(layer.tolist(), index.tolist(), strict=True)]
    )
    last = torch.full_like(graph["logits"], len(trace.tokens) - 1)
    read = [
        centre(encoder) / trace.sigma_mid[layer, position, None],
        centre(replacement.weights.W_U.T[graph["logits"]]) / trace.sigma_final[last, None],
    ]
    n = len(layer) + len(last)
    return Targets(
        node=torch.arange(n, device=last.device),
        depth=torch.cat([2 * layer + 1, torch.full_like(last, 2 * replacement.n_layers)]),
        position=torch.cat([position, last]),
        read=torch.cat(read),
        value=encoder.new_zeros(n),
    )


def table(rows: list[EdgeRows], n_targets: int, n_sources: int) -> Float[torch.Tensor, "target source"]:
    """Every edge into every target."""
    edges = rows[0].weight.new_zeros(n_targets, n_sources)
    for target, source, weight in rows:
        at = target[None, :, None], source[:, None]
        edges.index_put_(at, weight, accumulate=True)  # cells are filled up with source 0 at weight 0
    return edges


def difference(
    graph: dict[str, torch.Tensor], edges: Float[torch.Tensor, "target node"], nodes: Nodes
) -> tuple[int, float]:
    """How many edges are compared, and their largest difference as a share of the target's largest edge."""
    features, replacement = graph["features"].tolist(), nodes.replacement
    number = {group.key: i for i, group in enumerate(nodes.circuit)}
    found: list[int] = []
    for layer, position, index in features:
        i = number[Kind.MLP, layer, "mlp"]
        place = replacement.mlp[layer].find(position, index)
        assert place is not None, "a feature fires in circuit-tracer and not here"
        found.append(int(nodes.first[i] + (nodes.circuit[i].place == place).nonzero()))
    errors = [nodes.numbers(number[Kind.ERROR, layer, "mlp"]) for layer in range(replacement.n_layers)]
    ours = torch.cat([errors[0].new_tensor(found), *errors, nodes.numbers(0)])
    n_pos, rows = len(replacement.trace.tokens), [*range(len(features)), *range(-len(graph["logits"]), 0)]
    widths = len(features), n_pos * len(errors), n_pos, len(graph["logits"])
    of_features, of_errors, of_tokens, _ = graph["edges"][rows].split(widths, 1)
    first = torch.arange(n_pos * len(errors), device=ours.device) % n_pos == 0  # it has errors there, at 0
    a, b = edges[:, ours], torch.cat([of_features, of_errors[:, ~first], of_tokens], 1)
    off = (a - b).abs().max(1).values / b.abs().max(1).values
    return a.numel(), float(off.max())


if __name__ == "__main__":
    main(*sys.argv[1:])
