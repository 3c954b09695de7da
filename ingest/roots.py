"""Which circuits are asked for: `--roots` in words, resolved to nodes of one prompt.

    default           the three likeliest next tokens, and eight features of the middle layer
    logits            the three likeliest next tokens at the last position
    features          eight MLP feature activations of the middle layer: the four strongest by
                      activation times decoder norm, and the four that, among the 64 strongest, owe
                      most of their pre-activation to what attention brought from other positions
    @POS              the likeliest next tokens at a position, and its four strongest middle-layer features
    2/mlp/812         a named feature where it is strongest (or, with @POS, there); attn likewise
    " Paris"          a token's logit at the last position (or, with @POS, there)
    " Paris- Rome"    the difference of two tokens' logits; the first may hold no @, which begins a position

The strongest features alone are mostly features of the token itself; their circuits are dull, hence
the second four. What fires on BOS is not evidence of anything: no root stands there.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from atlas.errors import AtlasError
from ingest.attribution import Roots
from ingest.dictionaries import Dictionary
from ingest.model import LanguageModel
from ingest.replacement import ReplacementModel, centre

N_LOGITS = 3
N_STRONGEST = 4
N_CANDIDATES = 64
FEATURE = re.compile(r"(?:(?P<model>.+)/)?(?P<layer>\d+)/(?P<site>attn|mlp)/(?:(?P<name>[^/]+)/)?(?P<index>\d+)")


@dataclass(frozen=True)
class Root:
    """A node that a circuit explains: a feature (`index` in its dictionary) or a logit (`index` a token).

    `versus` is the second token of a logit difference.
    """

    site: str
    layer: int
    position: int
    index: int
    versus: int | None = None


@dataclass(frozen=True)
class RootRequest:
    """One word of `--roots`, understood: what kind, and where if it said so."""

    spec: str
    kind: str
    position: int | None = None
    layer: int = -1
    index: int = -1
    versus: int | None = None


def middle_layer(n_layers: int) -> int:
    """The layer whose features are roots by default: at 5/12 of the depth, GPT-2 small's layer 5."""
    return round(n_layers * 5 / 12)


def parse_root(spec: str, model: LanguageModel, dictionaries: Iterable[Dictionary]) -> RootRequest:
    """Understand one word of `--roots`. Raises AtlasError for an unknown feature, token or position."""
    match = re.fullmatch(r"(.*)@(\d+)", spec, re.DOTALL)
    word, position = (match[1], int(match[2])) if match else (spec, None)
    if position is not None and not 0 < position < model.record.n_ctx:
        raise AtlasError(
            f"Root {spec!r}: positions run from 1 to {model.record.n_ctx - 1}; position 0 is the beginning-of-sequence "
            "token, on which no circuit is rooted."
        )
    if word in ("default", "logits", "features") and position is None:
        return RootRequest(spec, word)
    if not word and position is not None:
        return RootRequest(spec, "position", position)
    if feature := FEATURE.fullmatch(word):
        return _feature_request(spec, feature, position, model, dictionaries)
    return _token_request(spec, word, position, model)


def _feature_request(
    spec: str, match: re.Match[str], position: int | None, model: LanguageModel, dictionaries: Iterable[Dictionary]
) -> RootRequest:
    layer, site, index = int(match["layer"]), match["site"], int(match["index"])
    if match["model"] not in (None, model.record.id):
        raise AtlasError(
            f"Root {spec!r} is a feature of model {match['model']!r}, but this run uses {model.record.id!r}."
        )
    for dictionary in dictionaries:
        if (dictionary.record.layer, dictionary.record.site) == (layer, site):
            if dictionary.record.d_sae == 0 or not dictionary.record.id.endswith(match["name"] or ""):
                there = dictionary.record.id if dictionary.record.d_sae else "no dictionary"
                raise AtlasError(f"Root {spec!r}: this run has {there} at layer {layer} {site}.")
            if index < dictionary.record.d_sae:
                return RootRequest(spec, site, position, layer, index)
            raise AtlasError(f"Root {spec!r}: {dictionary.record.id} has features 0 to {dictionary.record.d_sae - 1}.")
    raise AtlasError(f"Root {spec!r}: model {model.record.id} has layers 0 to {model.record.n_layers - 1}.")


def _token_request(spec: str, word: str, position: int | None, model: LanguageModel) -> RootRequest:
    def token(text: str) -> int | None:
        ids = model.tokens(text)[1:]
        return ids[0] if len(ids) == 1 else None

    if (index := token(word)) is not None:
        return RootRequest(spec, "logit", position, index=index)
    for dash in (i for i, letter in enumerate(word) if letter == "-"):
        first, second = token(word[:dash]), token(word[dash + 1 :])
        if first is None or second is None:
            continue
        if first == second:
            raise AtlasError(f"Root {spec!r} is a token less itself, which is always 0; give two different tokens.")
        if "@" in word[:dash]:
            raise AtlasError(
                f"Root {spec!r}: after @ comes a position from 1 to {model.record.n_ctx - 1}; the first token of a "
                "difference may hold no @."
            )
        return RootRequest(spec, "logit", position, index=first, versus=second)
    pieces = [model.token_text(i) for i in model.tokens(word)[1:]]
    raise AtlasError(
        f"Root {spec!r} is neither `default`, `logits`, `features`, @POSITION, a feature such as 2/mlp/812, nor one "
        f"token or a difference of two: the tokenizer cuts it into {pieces}."
    )


def resolve(requests: Iterable[RootRequest], model: ReplacementModel) -> list[list[Root]]:
    """The roots that each request stands for on this prompt; empty where nothing it names is active."""
    return [[root for root in _resolve(request, model) if root.position > 0] for request in requests]


def _resolve(request: RootRequest, model: ReplacementModel) -> list[Root]:
    last = len(model.trace.tokens) - 1
    position = last if request.position is None else request.position
    if position > last:
        return []
    if request.kind == "default":
        return _logits(model, last) + _features(model)
    if request.kind == "logits":
        return _logits(model, last)
    if request.kind == "features":
        return _features(model)
    if request.kind == "position":
        return _logits(model, position) + _strongest_at(model, position)
    if request.kind == "logit":
        return [Root("logit", model.n_layers, position, request.index, request.versus)]
    return _named_feature(request, model)


def _logits(model: ReplacementModel, position: int) -> list[Root]:
    tokens = model.trace.logits[position].topk(N_LOGITS).indices.tolist()
    return [Root("logit", model.n_layers, position, token) for token in tokens]


def _strength(model: ReplacementModel, layer: int) -> Float[torch.Tensor, " active"]:
    """Activation times decoder norm of a layer's MLP features, zero on BOS."""
    site = model.mlp[layer]
    return site.value * site.dictionary.decoder_norm[site.index] * (site.position > 0)


def _features(model: ReplacementModel) -> list[Root]:
    layer = middle_layer(model.n_layers)
    site = model.mlp[layer]
    ordered, order = _strength(model, layer).sort(descending=True, stable=True)
    order = order[ordered > 0][:N_CANDIDATES]
    share = _moved_share(model, layer, site.index[order], site.position[order], site.value[order])
    moved = N_STRONGEST + share[N_STRONGEST:].argsort(descending=True, stable=True)[:N_STRONGEST]
    chosen = order[[*range(min(N_STRONGEST, len(order))), *moved.tolist()]]
    return _mlp_roots(model, layer, chosen)


def _strongest_at(model: ReplacementModel, position: int) -> list[Root]:
    layer = middle_layer(model.n_layers)
    here = (model.mlp[layer].position == position).nonzero()[:, 0]
    strongest = _strength(model, layer)[here].topk(min(N_STRONGEST, len(here))).indices
    return _mlp_roots(model, layer, here[strongest])


def _mlp_roots(model: ReplacementModel, layer: int, chosen: Int[torch.Tensor, " n"]) -> list[Root]:
    site = model.mlp[layer]
    at = zip(site.position[chosen].tolist(), site.index[chosen].tolist(), strict=True)
    return [Root("mlp", layer, position, index) for position, index in at]


def _moved_share(
    model: ReplacementModel, layer: int, index: torch.Tensor, position: torch.Tensor, value: torch.Tensor
) -> Float[torch.Tensor, " n"]:
    """The part of MLP features' pre-activations that attention brought in one step from other positions.

    BOS is not counted: heads rest on it when they have nothing to do.
    """
    trace, below = model.trace, slice(layer + 1)
    at = trace.pattern[below, :, position].movedim(2, 1)
    own = at.gather(3, position[:, None, None].expand(*at.shape[:3], 1)) * trace.v[below, position]
    z = trace.z[below, position] - own - at[..., :1] * trace.v[below, :1]
    moved = (z.flatten(2) @ model.weights.W_O[below].flatten(1, 2)).sum(0)
    read = centre(model.mlp[layer].dictionary.encoder(index)) / trace.sigma_mid[layer][position, None]
    return (moved * read).sum(1) / value


def _named_feature(request: RootRequest, model: ReplacementModel) -> list[Root]:
    site = (model.mlp if request.kind == "mlp" else model.attn)[request.layer]
    here = (site.index == request.index) & (site.position > 0)
    if request.position is not None:
        here &= site.position == request.position
    if not here.any():
        return []
    strongest = int((site.value * here).argmax())
    return [Root(request.kind, request.layer, int(site.position[strongest]), request.index)]


def from_the_top(roots: Iterable[Root]) -> list[Root]:
    """Roots in the order in which the sweep begins them: logits first, then MLP before attention layer by layer."""
    return sorted(roots, key=lambda root: (-root.layer, root.site == "attn"))


def root_table(roots: Sequence[Root], model: ReplacementModel) -> Roots:
    """Reads, values and constants of roots, in their order (METHOD 2)."""
    position = model.trace.tokens.new_tensor([root.position for root in roots])
    index = model.trace.tokens.new_tensor([root.index for root in roots])
    read = model.trace.embed.new_zeros(len(roots), model.trace.embed.shape[1])
    value, constant = read.new_zeros(len(roots)), read.new_zeros(len(roots))
    for layer, name in dict.fromkeys((root.layer, root.site) for root in roots):
        rows = [i for i, root in enumerate(roots) if (root.layer, root.site) == (layer, name)]
        if name == "logit":
            read[rows], value[rows], constant[rows] = _logit_reads([roots[i] for i in rows], model)
            continue
        site = model.site(layer, name)
        value[rows] = site.value[site.places(position[rows], index[rows])]
        constant[rows] = model.constants(layer, name, index[rows], position[rows])
        if name == "mlp":
            encoder = site.dictionary.encoder(index[rows])
            read[rows] = centre(encoder) / model.trace.sigma_mid[layer][position[rows], None]
    return Roots(
        layer=tuple(root.layer for root in roots),
        site=tuple(root.site for root in roots),
        position=position,
        index=index,
        read=read,
        value=value,
        constant=constant,
    )


def _logit_reads(roots: Sequence[Root], model: ReplacementModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reads, values and constants of logits, less those of the tokens that they are compared with."""
    trace, weights = model.trace, model.weights
    position, index = [root.position for root in roots], [root.index for root in roots]
    read, value, constant = weights.W_U.T[index], trace.logits[position, index], weights.b_U[index]
    for i, root in enumerate(roots):
        if root.versus is not None:
            read[i] -= weights.W_U[:, root.versus]
            value[i] -= trace.logits[root.position, root.versus]
            constant[i] -= weights.b_U[root.versus]
    return centre(read) / trace.sigma_final[position, None], value, constant
