"""Whether what a recipe names as its data is there: a local file or folder, or a dataset of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from graftkit.errors import DataError, SourceError
from graftkit.recipes.recipe import Recipe
from graftkit.surveying.sources.hub import file_metadata, is_hub_id
from graftkit.text import suggest

# Files of rows, packed or not; a dataset of the hub has no such suffix.
_SUFFIXES = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|zip|gz|zst|xz)$", re.IGNORECASE)
# The hub's answers after which a copy in the cache is as good as none.
_NO_SUCH_DATASET = frozenset({"hub-not-found", "hub-no-revision"})


def place_of(path: str, recipe: Recipe) -> Path:
    """Return where a path of the recipe is: it is relative to the recipe."""
    return recipe.path.parent / Path(path).expanduser()


def check_source(path: str, place: Path) -> None:
    """Check that data is at ``place``, or that ``path`` is a dataset that the hub or its cache has.

    A path that is not there is never asked for on the hub, and the hub is asked once: ``datasets`` would repeat
    its requests for half a minute.

    Raises:
        DataError: ``data-missing``: there is no such file or folder; ``data-unreachable``: there may be such a
            dataset, and neither the hub nor the cache gives it.
    """
    if place.exists() or "://" in path:
        return
    if _is_path(path, place):
        raise _no_such_path(place)
    try:
        file_metadata(path, "README.md", repo_type="dataset")
    except SourceError as error:
        if error.code != "hub-no-file" and (error.code in _NO_SUCH_DATASET or not _is_cached(path)):
            raise _unreachable(path, place, error) from error


def _is_path(path: str, place: Path) -> bool:
    """Check whether a name that is not there can only be meant as a path."""
    if _SUFFIXES.search(path) or path.startswith("~"):
        return True
    if "/" not in path:
        return "." in path or "\\" in path  # the few datasets without an owner have neither in their names
    return not is_hub_id(path) or place.parent.is_dir()


def _is_cached(path: str) -> bool:
    """Check whether ``datasets`` has prepared this dataset before, or the hub's cache has files of it.

    Source: ``datasets.load.CachedDatasetModuleFactory``, ``huggingface_hub.file_download.repo_folder_name``.
    """
    from datasets import config
    from huggingface_hub import constants

    prepared = Path(config.HF_DATASETS_CACHE, path.replace("/", "___"))
    fetched = Path(constants.HF_HUB_CACHE, f"datasets--{path.replace('/', '--')}")
    return prepared.is_dir() or fetched.is_dir()


def _no_such_path(place: Path) -> DataError:
    folder = place.parent
    return DataError(
        "the data is not there",
        where=str(place),
        why="there is no such file or folder" if folder.is_dir() else f"there is no folder {folder}",
        help=_neighbour(place) or "paths are relative to the recipe; a dataset of the hub is named owner/name",
        code="data-missing",
    )


def _unreachable(path: str, place: Path, error: SourceError) -> DataError:
    fetch = f"fetch it once online with `hf download --repo-type dataset {path}`, or name a local file or folder"
    return DataError(
        "the dataset is neither here nor in the cache, and the hub did not send it",
        where=path,
        why=error.why or error.what,
        help=_neighbour(place) or fetch,
        code="data-unreachable",
    )


def _neighbour(place: Path) -> str | None:
    """Return a suggestion from what lies where the data was looked for, or None."""
    try:
        return suggest(place.name, [entry.name for entry in place.parent.iterdir()])
    except OSError:
        return None
