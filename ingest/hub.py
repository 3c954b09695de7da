"""Files from the hub: each downloaded once into the hub's cache, at its revision, and checked.

huggingface_hub downloads with a progress bar, resumes what was broken off, and keeps what it has; HF_HOME and
HF_HUB_CACHE say where, HF_HUB_OFFLINE that nothing may be downloaded. It keeps a large file under its publisher's
sha256, which is compared with the bytes here each time, and so is a sha256 that the registry knows.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from atlas.errors import AtlasError, cause

NAMED = 4  # files that a sentence names one by one; of more, the whole repository is to be brought


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    repository: str,
    revision: str,
    files: Sequence[str],
    known: Mapping[str, str | None] | None = None,
    bring: Sequence[str] = (),
) -> list[Path]:
    """The `files` of a repository in the hub's cache, downloaded where they are not there yet.

    `known` are sha256 of files; `bring` all that will be asked for, to be named where one is missing. Raises
    AtlasError when one is neither there nor to be had, or is not what its publisher gave.
    """
    paths = [_fetch_one(repository, revision, file, bring or files) for file in files]
    for file, path in zip(files, paths, strict=True):
        _check(path, (known or {}).get(file))
    return paths


def commit_of(path: Path) -> str:
    """The commit of a file in the hub's cache (models--OWNER--NAME/snapshots/COMMIT/...)."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else "local"


def cache_folder() -> Path:
    """Where the atlas keeps what it made of downloads: ATLAS_CACHE, or circuit-atlas in the user's cache."""
    given = os.environ.get("ATLAS_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "circuit-atlas"


def _fetch_one(repository: str, revision: str, file: str, all_files: Sequence[str]) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        raise AtlasError(_missing(repository, revision, file, all_files, reason)) from error
    except EntryNotFoundError as error:
        raise AtlasError(f"{repository} has no file {file} at revision {revision}.") from error
    except RevisionNotFoundError as error:
        raise AtlasError(f"{repository} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise AtlasError(f"The hub has no {repository} that may be read without a token.") from error
    except Exception as error:
        raise AtlasError(_missing(repository, revision, file, all_files, cause(error))) from error


def _missing(repository: str, revision: str, file: str, all_files: Sequence[str], reason: str) -> str:
    """What to bring, and where to put it."""
    from huggingface_hub import constants

    folder = "models--" + repository.replace("/", "--")
    names = " ".join(all_files) + " " if len(all_files) <= NAMED else ""
    return (
        f"{file} of {repository} at {revision} is not in the hub's cache, and was not downloaded: {reason}. Where "
        f"there is a network, run `hf download {repository} {names}--revision {revision}`, then copy "
        f"the folder {folder} of its cache to {Path(constants.HF_HUB_CACHE) / folder} here."
    )


def _check(path: Path, known: str | None) -> None:
    published = Path(os.readlink(path)).name if path.is_symlink() else ""
    expected = known or (published if re.fullmatch("[0-9a-f]{64}", published) else None)
    if expected is not None and (found := sha256(path)) != expected:
        raise AtlasError(
            f"{path} is not what was published: its sha256 is {found[:16]}..., and {expected[:16]}... was expected. "
            f"Remove {path.resolve()} and run this again."
        )
