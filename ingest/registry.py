"""Published models and dictionary sets by name: what `--model NAME` and `--dictionaries NAME` mean.

One table of models, one of sets. A set says for which model, sites and layers it is, in which files of which
repository at which revision it lies, in what form, and with which of the model's weights it was trained:

    processed   TransformerLens' default: layer norms folded, writing weights and unembedding centred, value
                biases folded into the output's
    centred     the writing weights centred, nothing else
    raw         the weights as they are published

hook_z differs between the first and the others by the value biases, hook_attn_out and hook_mlp_out between the
last and the others by their mean, so dictionaries of different conventions are never mixed. Any release of
SAELens that reads one of the atlas' hooks has an entry too, made from SAELens' own table.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from atlas.errors import AtlasError

CONVENTIONS: Mapping[str, frozenset[str]] = {
    "processed": frozenset({"fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"}),
    "centred": frozenset({"center_writing_weights"}),
    "raw": frozenset(),
}
MAIN = "main"


@dataclass(frozen=True)
class PublishedModel:
    """A model on the hub; `sha256` is that of model.safetensors at `revision`, where it is known."""

    repository: str
    revision: str
    sha256: str | None = None


MODELS: Mapping[str, PublishedModel] = {
    "gpt2": PublishedModel(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": PublishedModel("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": PublishedModel("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": PublishedModel("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "distilgpt2": PublishedModel(
        "distilbert/distilgpt2",
        "2290a62682d06624634c1f46a6ad5be0f47f38aa",
        "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
    ),
}


@dataclass(frozen=True)
class DictionarySet:
    """A published set: at most one dictionary a layer, all at one site.

    `files` holds, for each layer, the files of its dictionary within the repository. `form` is `saelens`
    (cfg.json and sae_weights.safetensors, read as they are) or `pickled` (a .pt that is converted once; see
    ingest/convert.py). `source` is the set's name on Neuronpedia and the last part of its dictionaries' ids.
    """

    name: str
    model: str
    site: str
    repository: str
    revision: str
    files: Mapping[int, tuple[str, ...]]
    form: str
    weights: str
    source: str


def _hook_z_kk(layer: int, l1: str, width: int, cutoff: str, version: int) -> tuple[str, str]:
    stem = (
        f"gpt2-small_L{layer}_Hcat_z_lr1.20e-03_l1{l1}_ds{width}_bs4096_dc{cutoff}_rsanthropic_rie25000_nr4_v{version}"
    )
    return f"{stem}_cfg.json", f"{stem}.pt"


_HOOK_Z_KK = (
    ("1.80e+00", 24576, "1.00e-06", 9),
    ("8.00e-01", 24576, "1.00e-06", 5),
    ("1.00e+00", 24576, "1.00e-06", 4),
    ("9.00e-01", 24576, "1.00e-06", 9),
    ("1.10e+00", 24576, "1.00e-06", 7),
    ("1.00e+00", 49152, "1.00e-06", 9),
    ("1.10e+00", 24576, "1.00e-06", 9),
    ("1.10e+00", 49152, "1.00e-06", 9),
    ("1.30e+00", 24576, "1.00e-05", 6),
    ("1.20e+00", 24576, "1.00e-06", 9),
    ("1.30e+00", 24576, "1.00e-05", 9),
    ("3.00e+00", 24576, "3.16e-06", 9),
)

SETS: Mapping[str, DictionarySet] = {
    entry.name: entry
    for entry in (
        DictionarySet(
            name="gpt2-small-hook-z-kk",
            model="gpt2",
            site="attn",
            repository="ckkissane/attn-saes-gpt2-small-all-layers",
            revision=MAIN,
            files={layer: _hook_z_kk(layer, *parts) for layer, parts in enumerate(_HOOK_Z_KK)},
            form="pickled",
            weights="processed",
            source="att-kk",
        ),
        DictionarySet(
            name="pchlenski/gpt2-transcoders",
            model="gpt2",
            site="mlp",
            repository="pchlenski/gpt2-transcoders",
            revision="4f3ca345572ce2d75018a60d10b4dca8bd899e99",
            files={
                layer: (f"final_sparse_autoencoder_gpt2-small_blocks.{layer}.ln2.hook_normalized_24576.pt",)
                for layer in range(12)
            },
            form="pickled",
            weights="processed",
            source="tres-dc",
        ),
        DictionarySet(
            name="gpt2-small-attn-out-v5-32k",
            model="gpt2",
            site="attn",
            repository="jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs",
            revision=MAIN,
            files={
                layer: (f"v5_32k_layer_{layer}/cfg.json", f"v5_32k_layer_{layer}/sae_weights.safetensors")
                for layer in range(12)
            },
            form="saelens",
            weights="raw",
            source="att_32k-oai",
        ),
    )
}
DEFAULTS: Mapping[str, tuple[str, ...]] = {"gpt2": ("gpt2-small-hook-z-kk", "pchlenski/gpt2-transcoders")}
_SITES = {"hook_z": "attn", "attn.hook_z": "attn", "hook_attn_out": "attn", "ln2.hook_normalized": "mlp"}


def published_model(name: str) -> PublishedModel:
    """The model that NAME or NAME@REVISION stands for; an unknown name is a repository of the hub."""
    name, _, revision = name.partition("@")
    found = MODELS.get(name, PublishedModel(name, MAIN))
    return PublishedModel(found.repository, revision) if revision not in ("", found.revision) else found


def published_set(name: str) -> DictionarySet:
    """The set that NAME or NAME@REVISION stands for. Raises AtlasError when there is none that the atlas reads."""
    name, _, revision = name.partition("@")
    found = SETS[name] if name in SETS else _release(name)
    return replace(found, revision=revision) if revision else found


def parse_layers(text: str) -> frozenset[int]:
    """The layers that `0-3,7` stands for. Raises AtlasError where it stands for none."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,3})(?:\s*-\s*([0-9]{1,3}))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise AtlasError(f"Layers {text!r} cannot be read; give numbers and ranges, such as 0-3,7.")
        layers.update(found)
    return frozenset(layers)


def layers_of(entry: DictionarySet, layers: frozenset[int] | None) -> Sequence[int]:
    """The set's layers, or those among `layers`. Raises AtlasError where none is left."""
    chosen = sorted(layer for layer in entry.files if layers is None or layer in layers)
    if not chosen:
        raise AtlasError(f"{entry.name} has no dictionary for the layers asked for; it has {_said(entry.files)}.")
    return chosen


def _release(name: str) -> DictionarySet:
    """An entry from SAELens' own table; SAELens runs models on raw weights but for what a release says."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory().get(name)
    if release is None:
        raise AtlasError(
            f"There are no dictionaries {name!r}: give a folder, a release of SAELens, or one of {', '.join(SETS)}."
        )
    if release.conversion_func is not None:
        raise AtlasError(f"{name} is published in a form of its own ({release.conversion_func}), which is not read.")
    files: dict[int, tuple[str, ...]] = {}
    sites: set[str] = set()
    for id, path in release.saes_map.items():
        match = re.fullmatch(r"blocks\.([0-9]+)\.(.+)", id)
        if match is None or match[2] not in _SITES:
            raise AtlasError(
                f"{name} reads {id}; the atlas needs blocks.L.attn.hook_z, blocks.L.hook_attn_out or "
                "blocks.L.ln2.hook_normalized."
            )
        files[int(match[1])] = (f"{path}/cfg.json", f"{path}/sae_weights.safetensors")
        sites.add(_SITES[match[2]])
    if len(files) < len(release.saes_map) or len(sites) > 1:
        raise AtlasError(f"{name} has several dictionaries a layer; bring those you choose into a folder.")
    overrides: Mapping[str, object] = release.config_overrides or {}
    arguments = overrides.get("model_from_pretrained_kwargs")
    sources = {neuronpedia_source(id) for id in release.neuronpedia_id.values()}
    return DictionarySet(
        name=name,
        model={"gpt2-small": "gpt2"}.get(release.model, release.model),
        site=sites.pop(),
        repository=release.repo_id,
        revision=MAIN,
        files=files,
        form="saelens",
        weights=convention(name, arguments if isinstance(arguments, dict) else {}),
        source=(sources.pop() if len(sources) == 1 else None) or name,
    )


def convention(where: object, arguments: Mapping[str, object]) -> str:
    """The weights that SAELens' `model_from_pretrained_kwargs` ask for; none of them means raw.

    Raises AtlasError where they are a mixture that has no name here.
    """
    asked = frozenset(step for step in CONVENTIONS["processed"] if arguments.get(step) is True)
    for name, steps in CONVENTIONS.items():
        if asked == steps:
            return name
    raise AtlasError(
        f"{where} was trained on weights with {', '.join(sorted(asked))}; the atlas knows dictionaries of "
        f"{', '.join(CONVENTIONS)} weights."
    )


def neuronpedia_source(id: object) -> str | None:
    """`att-kk` of `gpt2-small/5-att-kk`; None where that is no such id."""
    match = re.fullmatch(r"[^/]+/[0-9]+-(.+)", id) if isinstance(id, str) else None
    return match[1] if match else None


def _said(layers: Iterable[int]) -> str:
    return "layers " + ", ".join(map(str, sorted(layers)))
