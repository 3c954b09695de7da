"""A model with its dictionaries, loaded and checked: all that tracing a prompt needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from atlas.errors import AtlasError
from atlas.records import ReplacementModelRecord
from ingest.convert import convert
from ingest.dictionaries import (
    Dictionary,
    Origin,
    Place,
    layer_of,
    load_dictionaries,
    places_in,
    replacement_id,
    weights_of,
)
from ingest.hub import cache_folder, commit_of, fetch
from ingest.model import MINI, LanguageModel, check_device, check_name, load_model
from ingest.registry import DEFAULTS, SETS, DictionarySet, layers_of, published_set
from ingest.replacement import ReplacementModel, replacement_model
from ingest.shelf import shelf_within
from ingest.trace import trace


@dataclass(frozen=True)
class Setup:
    """The model, its dictionaries (attn and mlp of each layer in turn), and their record."""

    model: LanguageModel
    dictionaries: list[Dictionary]
    record: ReplacementModelRecord

    def replace(self, tokens: list[int]) -> ReplacementModel:
        """One forward pass and one encode: the local replacement model of a prompt (METHOD 1)."""
        return replacement_model(trace(self.model, tokens), self.model.weights, self.dictionaries)


def set_up(
    name: str,
    dtype: torch.dtype = torch.float32,
    dictionaries: Sequence[str] = (),
    layers: frozenset[int] | None = None,
    memory: int | None = None,
    device: str = "cpu",
) -> Setup:
    """The model `name` (see `load_model`) with dictionaries: see `places_for`.

    With `memory`, the bytes that the process may take, dictionaries are opened when they are needed and closed again.
    Raises AtlasError when either cannot be used, when they do not belong together, or when `memory` is too little.
    """
    model, places = load_with_places(name, dtype, dictionaries, layers, device)
    found = load_dictionaries(places, model, shelf_within(memory))
    record = ReplacementModelRecord(
        id=replacement_id(model, found, dtype),
        name=model.record.id,
        model=model.record,
        dictionaries=tuple(dictionary.record for dictionary in found if dictionary.record.d_sae),
        open_attention=tuple(dictionary.record.layer for dictionary in found if dictionary.is_open),
        dtype=str(dtype).removeprefix("torch."),
    )
    return Setup(model, found, record)


def load_with_places(
    name: str,
    dtype: torch.dtype = torch.float32,
    dictionaries: Sequence[str] = (),
    layers: frozenset[int] | None = None,
    device: str = "cpu",
) -> tuple[LanguageModel, list[Place]]:
    """The model with the weights that its dictionaries were trained on, and where these lie."""
    check_name(name)
    check_device(device)  # before anything is downloaded
    places = places_for(name, dictionaries, layers)
    weights = {weights_of(place): place for place in places}
    if len(weights) > 1:
        said = " and ".join(f"{place.folder} on {name}" for name, place in weights.items())
        raise AtlasError(
            f"Dictionaries that were trained on different weights of the model cannot be mixed: {said} weights."
        )
    return load_model(name, dtype, next(iter(weights)), device), places


def places_for(name: str, dictionaries: Sequence[str], layers: frozenset[int] | None) -> list[Place]:
    """Where the dictionaries lie: each of `dictionaries` is a folder of folders or a set's name in the registry.

    Without any, those in the model's folder `dictionaries`, or the default sets of a published model. What is not
    in the hub's cache is downloaded, and converted where it must be; `layers` takes a part.
    """
    inside = (MINI if name == "mini" else Path(name)) / "dictionaries"
    base = name.partition("@")[0]
    chosen = list(dictionaries) or ([] if inside.is_dir() else list(DEFAULTS.get(base, ())))
    if not chosen and not inside.is_dir():
        raise AtlasError(
            f"Model {name!r} has no dictionaries: put them into {inside}, one folder each, or give --dictionaries, "
            f"a folder or one of {', '.join(SETS)}."
        )
    places: list[Place] = []
    for each in chosen or [str(inside)]:
        if Path(each).is_dir():
            places += [p for p in places_in(Path(each)) if layers is None or layer_of(p.folder) in layers]
            continue
        entry = published_set(each)
        if entry.model != base and not Path(name).is_dir():
            raise AtlasError(f"{entry.name} is for model {entry.model}, not {name}.")
        places += _fetched(entry, layers_of(entry, layers))
    if not places:  # all are folders: a set without these layers says so itself
        there = {layer_of(p.folder) for each in chosen or [str(inside)] for p in places_in(Path(each))}
        asked, known = (", ".join(map(str, sorted(numbers))) for numbers in (layers or (), there))
        raise AtlasError(f"No dictionary is for the layers asked for ({asked}); there are some for layers {known}.")
    return places


def _fetched(entry: DictionarySet, layers: Sequence[int]) -> list[Place]:
    """Dictionaries of a published set, downloaded and converted unless that was done before."""
    bring = [file for layer in layers for file in entry.files[layer]]
    downloaded = {layer: fetch(entry.repository, entry.revision, entry.files[layer], bring=bring) for layer in layers}
    return [_converted(entry, layer, files) for layer, files in downloaded.items()]


def _converted(entry: DictionarySet, layer: int, files: Sequence[Path]) -> Place:
    commit = commit_of(files[0])
    origin = Origin(entry.source, entry.repository, commit, entry.weights)
    if entry.form == "saelens":
        return Place(files[0].parent, origin)
    converted = cache_folder() / entry.repository / commit
    folder = converted / f"{layer}.{entry.site}"
    return Place(folder if folder.is_dir() else convert(files[-1], converted), origin)
