"""Tensors out of a torch file (.pt) from the net, without running anything that the file says.

Such a file is a zip with a pickle and the tensors' bytes beside it. A pickle is a program: it names functions
and classes, calls them, and sets attributes. Here every name that it may use is looked up in one table, whose
entries are stand-ins of this module that build lists, texts and tensors and cannot be changed by the pickle;
the configuration class is a stand-in too, which keeps its attributes as plain data. Any other name, and any
call of something else, is refused before it happens. No module is imported on the file's word.
"""

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from atlas.errors import AtlasError, cause

MAX_PICKLE = 1 << 20  # bytes; a configuration and a handful of tensors take a few thousand

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


class Config:
    """The stand-in for a configuration object; `values` are the attributes that it was pickled with."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in cast(dict[object, Any], state)):
            raise pickle.UnpicklingError("its configuration is no table of names and values")
        object.__setattr__(self, "values", dict(cast(dict[str, Any], state)))


class _OrderedDict(dict[Any, Any]):
    """The stand-in for OrderedDict; attributes that the pickle gives it (torch's _metadata) are left out."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Storage(NamedTuple):
    """A storage as the pickle names it: its dtype, its key within the zip, and how many numbers it says to hold."""

    dtype: torch.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it; the arguments are unchecked."""

    storage: object
    offset: object
    shape: object
    stride: object


class _RebuildTensor:
    """The stand-in for torch._utils._rebuild_tensor_v2."""

    __slots__ = ()

    def __call__(self, storage: object, offset: object, shape: object, stride: object, *_: object) -> _Tensor:
        return _Tensor(storage, offset, shape, stride)


class _Device:
    """The stand-in for torch.device: a text."""

    __slots__ = ()

    def __call__(self, *arguments: object) -> str:
        return ":".join(str(argument) for argument in arguments if isinstance(argument, (str, int)))


_CONFIG = ("sae_training.config", "LanguageModelSAERunnerConfig")
_ALLOWED: dict[tuple[str, str], Any] = {
    _CONFIG: Config,
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch", "device"): _Device(),
    **{("torch", name): name for name in _DTYPES},
    **{("torch", name): name for name in ("float64", "float32", "float16", "bfloat16")},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler whose only names are those of the table above."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            name = f"{module_name}.{global_name}"
            raise pickle.UnpicklingError(f"it asks for {name[:100]!r}, which no dictionary needs") from None

    def persistent_load(self, pid: Any, /) -> _Storage:
        """The storage that ('storage', kind, key, device, number of values) names."""
        if not isinstance(pid, tuple) or len(cast(tuple[Any, ...], pid)) != 5:
            raise pickle.UnpicklingError("it refers to something that is no storage")
        tag, kind, key, _, numel = cast(tuple[Any, ...], pid)
        known = isinstance(kind, str) and kind in _DTYPES and isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key)
        if not isinstance(tag, str) or tag != "storage" or not known or type(numel) is not int:
            raise pickle.UnpicklingError("it refers to a storage of a kind that no dictionary needs")
        return _Storage(_DTYPES[kind], key, numel)


def read_pickled(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration's attributes (`cfg`) and the tensors (`state_dict`) of a torch file.

    A file that holds a table of tensors alone has no attributes. The attributes are plain data, but of any kind:
    look at one only after its type. Nothing of the file is run. Raises AtlasError when it is no torch file, is
    damaged, or holds or asks for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            folder = _folder(archive)
            with archive.open(f"{folder}/data.pkl") as file:
                value = _Unpickler(file).load()
            return _contents(value, archive, folder)
    except OSError as error:
        raise AtlasError(f"{path} cannot be read: {error.strerror or error}.") from error
    except pickle.UnpicklingError as error:
        raise AtlasError(f"{path} was refused, and nothing of it was run: {error}.") from error
    except Exception as error:
        raise AtlasError(f"{path} is no torch file (.pt), or a damaged one ({cause(error)}).") from error


def _contents(value: object, archive: zipfile.ZipFile, folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    table = cast(dict[object, object], value) if isinstance(value, dict) else {}
    if isinstance(value, _OrderedDict) and "cfg" not in table:
        return {}, _tensors(table, archive, folder)
    config, state = table.get("cfg"), table.get("state_dict")
    if not isinstance(config, Config) or not isinstance(state, dict):
        raise pickle.UnpicklingError("it does not hold a configuration (cfg) and a table of tensors (state_dict)")
    return config.values, _tensors(cast(dict[object, object], state), archive, folder)


def _tensors(state: dict[object, object], archive: zipfile.ZipFile, folder: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, described in state.items():
        if not isinstance(name, str) or not isinstance(described, _Tensor):
            raise pickle.UnpicklingError("its table of tensors holds something that is no tensor")
        tensors[name] = _tensor(described, archive, folder)
    return tensors


def _tensor(described: _Tensor, archive: zipfile.ZipFile, folder: str) -> torch.Tensor:
    storage = described.storage
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor is made of something that is no storage")
    sizes, strides, start = _counts(described.shape), _counts(described.stride), _counts((described.offset,))[0]
    data = bytearray(archive.read(f"{folder}/data/{storage.key}"))
    if not data or len(data) != storage.numel * storage.dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {storage.key} is not what it is said to be")
    last = start + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
    if 0 in sizes or last >= storage.numel or torch.Size(sizes).numel() > storage.numel:
        raise pickle.UnpicklingError("a tensor is empty or reaches beyond its storage")
    return torch.frombuffer(data, dtype=storage.dtype).as_strided(sizes, strides, start)


def _folder(archive: zipfile.ZipFile) -> str:
    """The folder within the zip; refuses what would unpack to more than the file's size."""
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise pickle.UnpicklingError("it is compressed, and torch never compresses")
    pickles = [info for info in infos if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise pickle.UnpicklingError("it has no data.pkl of a small size, as torch writes it")
    folder = pickles[0].filename.removesuffix("/data.pkl")
    byteorder = f"{folder}/byteorder"
    if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
        raise pickle.UnpicklingError("its numbers are not little-endian")
    return folder


def _counts(values: object) -> tuple[int, ...]:
    """A tuple of numbers that are not negative and not so large that their products overflow."""
    if not isinstance(values, tuple) or len(cast(tuple[Any, ...], values)) > 2:
        raise pickle.UnpicklingError("a tensor's shape is not that of a vector or matrix")
    numbers = cast(Sequence[Any], values)
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers):
        raise pickle.UnpicklingError("a tensor's shape is not made of counts")
    return tuple(numbers)
