"""A model with its dictionaries, loaded and checked: all that tracing a prompt needs."""

from dataclasses import dataclass
from pathlib import Path

import torch

from atlas.errors import AtlasError
from atlas.records import ReplacementModelRecord
from ingest.dictionaries import Dictionary, load_dictionaries, replacement_id
from ingest.model import MINI, LanguageModel, load_model
from ingest.replacement import ReplacementModel, replacement_model
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


def set_up(name: str, dtype: torch.dtype = torch.float32) -> Setup:
    """The model `name` (see `load_model`) with the dictionaries in its folder `dictionaries`.

    Raises AtlasError when either cannot be used.
    """
    model = load_model(name, dtype)
    directory = (MINI if name == "mini" else Path(name)) / "dictionaries"
    if not directory.is_dir():
        raise AtlasError(f"Model {name!r} has no dictionaries: put them into {directory}, one folder each.")
    dictionaries = load_dictionaries(directory, model)
    record = ReplacementModelRecord(
        id=replacement_id(model, dictionaries),
        name=model.record.id,
        model=model.record,
        dictionaries=tuple(dictionary.record for dictionary in dictionaries),
    )
    return Setup(model, dictionaries, record)
