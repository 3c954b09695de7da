"""Virtual weights: the feature-to-feature wiring of the model, without activations, patterns or scales (METHOD 7).

    MLP   w_u P enc_v                            into MLP feature v of layer l, from the sites below
    OV    w_u P W_V[h] enc_v[h]                  into attention feature v of layer l through head h, from layers < l
    QK    w_u P W_Q[h] . w_v P W_K[h]            between u at the query and v at the key of a head of layer l, both
                                                 from layers < l

Of all pairs, the `top` strongest by |weight| are kept per target; a QK wire runs from v to u, as a QK edge does, and
is kept per target and layer. Targets are taken in blocks, sources a dictionary (and head) at a time, so that no more
than BLOCK x d_sae weights are in memory at once.

An SAE on attn_out is read back through the heads: enc_v[h] = W_O[h] enc_v.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click
import torch
from jaxtyping import Float, Int

from atlas.cli import store_option
from atlas.errors import AtlasError
from atlas.wiring import Wire, write_dictionaries, write_wires
from ingest.cli import model_options
from ingest.dictionaries import Dictionary
from ingest.replacement import centre
from ingest.setup import Setup, set_up

BLOCK = 1024
KINDS = ("MLP", "OV", "QK")

_Sides = dict[int | None, Float[torch.Tensor, "d_sae width"]]
_Best = tuple[Float[torch.Tensor, "n _"], Int[torch.Tensor, "n _"], Int[torch.Tensor, "n _"]]


@dataclass(frozen=True)
class WiredBlock:
    """The wires of one kind into some targets; `layer` is the heads' layer for QK, and None otherwise."""

    via: str
    layer: int | None
    targets: list[str]
    wires: list[Wire]


@dataclass(frozen=True)
class _Source:
    """The features of one dictionary as seen by one head, or by no head (None)."""

    dictionary: Dictionary
    head: int | None
    vectors: Float[torch.Tensor, "d_sae width"]


@torch.no_grad()
def wired_blocks(setup: Setup, layers: Sequence[int], kinds: Sequence[str], top: int) -> Iterator[WiredBlock]:
    """The `top` strongest wires into every feature of the chosen layers, block after block of targets."""
    for layer in layers:
        here = [d for d in setup.dictionaries if d.record.layer == layer]
        below = [d for d in setup.dictionaries if d.record.layer < layer]
        heads = range(setup.model.record.n_heads) if below else ()
        for target in here:
            if target.record.site == "mlp" and "MLP" in kinds:
                under = below + [d for d in here if d.record.site == "attn"]
                sources = [_Source(d, None, writes(setup, d)) for d in under]
                yield from _blocks("MLP", None, target, sources, {None: target.W_enc.T}, top)
            if target.record.site == "attn" and "OV" in kinds:
                sources = [_Source(d, head, w) for d in below for w in [writes(setup, d)] for head in heads]
                sides: _Sides = {head: reads(setup, target, head) for head in heads}
                yield from _blocks("OV", layer, target, sources, sides, top)
        if "QK" in kinds:
            W_Q, W_K = setup.model.weights.W_Q[layer], setup.model.weights.W_K[layer]
            sources = [_Source(d, h, w @ W_K[h]) for d in below for w in [writes(setup, d)] for h in heads]
            for target in below:
                sides: _Sides = {head: writes(setup, target) @ W_Q[head] for head in heads}
                yield from _blocks("QK", layer, target, sources, sides, top)


def writes(setup: Setup, dictionary: Dictionary) -> Float[torch.Tensor, "d_sae d_model"]:
    """P w of every feature of a dictionary: what it writes to the residual stream, centred."""
    written = dictionary.W_dec
    if dictionary.record.hook_in.endswith("hook_z"):
        written = written @ setup.model.weights.W_O[dictionary.record.layer].flatten(0, 1)
    return centre(written)


def reads(setup: Setup, dictionary: Dictionary, head: int) -> Float[torch.Tensor, "d_sae d_model"]:
    """W_V[h] enc[h] of every feature of an attention dictionary."""
    W, layer = setup.model.weights, dictionary.record.layer
    encoders = centre(dictionary.W_enc.T) if dictionary.layer_norm else dictionary.W_enc.T
    if dictionary.record.hook_in.endswith("hook_z"):
        of_head = encoders.unflatten(1, W.W_V.shape[1:2] + W.W_V.shape[3:])[:, head]
    else:
        of_head = encoders @ W.W_O[layer, head].T
    return of_head @ W.W_V[layer, head].T


def _blocks(
    via: str, layer: int | None, target: Dictionary, sources: list[_Source], sides: _Sides, top: int
) -> Iterator[WiredBlock]:
    """Blocks of targets, of which `sides` is the other half of each head's product; none without sources."""
    for start in range(0, target.record.d_sae if sources else 0, BLOCK):
        block = {head: side[start : start + BLOCK] for head, side in sides.items()}
        n = len(block[sources[0].head])
        best = torch.zeros(n, 0), torch.zeros(n, 0, dtype=torch.long), torch.zeros(n, 0, dtype=torch.long)
        for number, source in enumerate(sources):
            best = _keep_strongest(best, block[source.head] @ source.vectors.T, number, top)
        targets = [f"{target.record.id}/{start + i}" for i in range(n)]
        yield WiredBlock(via, layer if via == "QK" else None, targets, _wires(via, layer, targets, sources, best))


def _keep_strongest(best: _Best, weights: Float[torch.Tensor, "n d_sae"], number: int, top: int) -> _Best:
    """The strongest of what was kept (weight, number of its source, index in that) and of one more source's weights."""
    found = weights.abs().topk(min(top, weights.shape[1]), dim=1).indices
    weight = torch.cat([best[0].to(weights.dtype), weights.gather(1, found)], dim=1)
    source = torch.cat([best[1], torch.full_like(found, number)], dim=1)
    index = torch.cat([best[2], found], dim=1)
    kept = weight.abs().topk(min(top, weight.shape[1]), dim=1).indices
    return weight.gather(1, kept), source.gather(1, kept), index.gather(1, kept)


def _wires(via: str, layer: int | None, targets: list[str], sources: list[_Source], best: _Best) -> list[Wire]:
    wires: list[Wire] = []
    for target, *columns in zip(targets, *(column.tolist() for column in best), strict=True):
        for rank, (weight, number, index) in enumerate(zip(*columns, strict=True), 1):
            source = sources[number]
            name = f"{source.dictionary.record.id}/{index}"
            wires.append(Wire(name, target, via, layer, source.head, weight, rank))
    return wires


@click.command()
@model_options
@store_option
@click.option("--via", "kinds", type=click.Choice(KINDS), multiple=True, help="This kind only; may be repeated.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Wires to keep per target.")
def wiring(
    model: str,
    dictionaries: Sequence[str],
    layers: frozenset[int] | None,
    store: str | None,
    kinds: Sequence[str],
    top: int,
) -> None:
    """Store the strongest virtual weights: which features the model's weights connect, whatever the prompt.

    With --layers, between the features of these layers only. The questions `wired` and `used` compare the wires
    with what the stored prompts show.
    """
    import atlas

    setup = set_up(model, dictionaries=dictionaries, layers=layers)
    chosen = [layer for layer in range(setup.model.record.n_layers) if layers is None or layer in layers]
    setup = Setup(setup.model, [d for d in setup.dictionaries if d.record.d_sae], setup.record)
    if not setup.dictionaries:
        raise AtlasError(f"There are no dictionaries of layers {sorted(chosen)} of {model}.")
    n_wires = 0
    from atlas.schema import prepare

    with atlas.connect(store) as opened:
        prepare(opened)
        write_dictionaries(opened, [d.record for d in setup.dictionaries])
        with click.progressbar(wired_blocks(setup, chosen, kinds or KINDS, top), label="Wiring") as blocks:
            for block in blocks:
                write_wires(opened, block.via, block.targets, block.wires, block.layer)
                n_wires += len(block.wires)
        click.echo(f"{n_wires} virtual weights into the features of layers {chosen} written. Store: {opened.address}")
