"""Single files from the hub or from its cache, and a precise error where one cannot be had.

Everything goes through ``huggingface_hub``, so ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and
``HF_HUB_OFFLINE`` mean here what they mean elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.errors import SourceError
from graftkit.text import named

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

# A hub that does not answer within this many seconds is treated as unreachable; HF_HUB_ETAG_TIMEOUT wins.
_ANSWER_SECONDS = 5.0
_CONFIG_BYTES = 16 * 2**20
# What a cached copy makes up for. A file or a revision that the hub says is not there is not among them.
_CACHE_HELPS = frozenset({"hub-offline", "hub-not-found", "hub-gated"})


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository, on this machine.

    Attributes:
        path: the file in the hub's cache.
        commit: the commit it belongs to.
        validated: True where the hub confirmed it in this call, False where it was taken from the cache.
    """

    path: Path
    commit: str
    validated: bool


def is_hub_id(text: str) -> bool:
    """Whether ``text`` is written like ``owner/name``."""
    return text.count("/") == 1 and _is_repo_name(text)


def _is_repo_name(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def from_cache(repo_id: str, filename: str, revision: str | None = None) -> HubFile | None:
    """The cached copy of a file, or None. Never touches the network; takes bare legacy ids (``"gpt2"``)."""
    from huggingface_hub import try_to_load_from_cache

    if not _is_repo_name(repo_id):
        return None
    found = try_to_load_from_cache(repo_id, filename, revision=revision)
    # The third possible answer is a marker: the hub once said that there is no such file.
    return HubFile(Path(found), Path(found).parent.name, validated=False) if isinstance(found, str) else None


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder that holds a model's files on this machine: a directory, or a hub id's cached snapshot."""
    if name and Path(name).is_dir():
        return Path(name)
    found = from_cache(name, "config.json", revision)
    return None if found is None else found.path.parent


def probe(repo_id: str, filename: str, revision: str | None = None) -> HfFileMetadata:
    """Ask the hub once, without retries, for a file's commit and size.

    ``hf_hub_download`` alone would retry for minutes where the hub is unreachable and nothing is cached.

    Raises:
        SourceError: ``hub-offline``, ``hub-not-found``, ``hub-gated``, ``hub-no-revision``, ``hub-no-file``
            or ``hub-error``.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode

    if is_offline_mode():
        raise _offline(repo_id, filename, revision, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        url = hf_hub_url(repo_id, filename, revision=revision)
        metadata = get_hf_file_metadata(url, timeout=_answer_seconds())
    except Exception as error:
        # One request: whatever is not an answer of the hub means that the hub was not reached. The HTTP
        # client's own exceptions are not named, because which client it is differs between hub versions.
        raise explain(error, repo_id, filename, revision) from error
    if metadata.commit_hash is None:
        raise _offline(repo_id, filename, revision, f"what answers at {constants.ENDPOINT} is not a hub")
    return metadata


def _answer_seconds() -> float:
    from huggingface_hub import constants

    chosen = constants.HF_HUB_ETAG_TIMEOUT
    return _ANSWER_SECONDS if chosen == constants.DEFAULT_ETAG_TIMEOUT else chosen


def fetch(repo_id: str, filename: str, revision: str | None = None, *, max_bytes: int) -> HubFile:
    """One file through the hub's cache: confirmed by the hub where it answers, else as cached.

    Raises:
        SourceError: as :func:`probe`; also ``hub-file-too-large`` and ``hub-cache`` (it cannot be written).
    """
    cached = from_cache(repo_id, filename, revision)
    try:
        metadata = probe(repo_id, filename, revision)
    except SourceError as error:
        if cached is None or error.code not in _CACHE_HELPS:
            raise
        return cached
    commit = str(metadata.commit_hash)
    if cached is not None and cached.commit == commit:
        return HubFile(cached.path, commit, validated=True)
    if metadata.size is not None and metadata.size > max_bytes:
        raise SourceError(
            f"{filename} is too large to be what its name says",
            where=repo_id,
            why=f"{metadata.size} bytes; at most {max_bytes} are read",
            help="check the repository on its page",
            code="hub-file-too-large",
        )
    return _download(repo_id, filename, revision)


def _download(repo_id: str, filename: str, revision: str | None) -> HubFile:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(
            # By the name the user gave, not by the commit: this is what makes the cache answer to it offline.
            hf_hub_download(repo_id, filename, revision=revision, etag_timeout=_answer_seconds())
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise explain(error, repo_id, filename, revision) from error
    except OSError as error:
        raise SourceError(
            f"{filename} was found, but cannot be written to the cache",
            where=constants.HF_HUB_CACHE,
            why=f"{type(error).__name__}: {error}",
            help="free space there, or set HF_HOME to a directory that can be written",
            code="hub-cache",
        ) from error
    except Exception as error:
        raise explain(error, repo_id, filename, revision) from error
    return HubFile(path, path.parent.name, validated=True)


def fetch_config(repo_id: str, revision: str | None = None) -> HubFile:
    """A model's ``config.json``, and no other file of it.

    Raises:
        SourceError: as :func:`fetch`; ``hub-no-config`` where the repository has none.
    """
    try:
        return fetch(repo_id, "config.json", revision, max_bytes=_CONFIG_BYTES)
    except SourceError as error:
        if error.code == "hub-no-file":
            raise _no_config(repo_id, _adapter_base(repo_id, revision)) from error
        # A hub that did not answer is not asked again.
        adapter = from_cache(repo_id, "adapter_config.json", revision)
        if error.code == "hub-offline" and adapter is not None:
            raise _no_config(repo_id, adapter_base(adapter.path)) from error
        raise


def _adapter_base(repo_id: str, revision: str | None) -> str | None:
    """The base model an adapter repository names ("" where it names none), or None where it is no adapter."""
    try:
        file = fetch(repo_id, "adapter_config.json", revision, max_bytes=_CONFIG_BYTES)
    except SourceError:
        return None
    return adapter_base(file.path)


def adapter_base(path: Path) -> str:
    """The base model that an ``adapter_config.json`` names, or "" where it names none or cannot be read."""
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return ""
    return base if isinstance(base, str) else ""


def _no_config(repo_id: str, base: str | None) -> SourceError:
    if base is None:
        why, help = (
            "its files are not those of a transformers model",
            "name a repository in the transformers format",
        )
    else:
        why = f"it is an adapter for {base}" if base else "it is an adapter"
        help = f"name the base model: {base}" if base else "name the adapter's base model"
    return SourceError(
        "this repository has no config.json", where=repo_id, why=why, help=help, code="hub-no-config"
    )


def explain(error: Exception, repo_id: str, filename: str, revision: str | None) -> SourceError:
    """What an exception of ``huggingface_hub`` means for the user."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) or not isinstance(error, errors.HfHubHTTPError):
        return _offline(repo_id, filename, revision, named(error))
    if isinstance(error, errors.RevisionNotFoundError):
        return _no_revision(repo_id, revision)
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"the repository has no {filename}", where=repo_id, code="hub-no-file")
    status = error.response.status_code
    if isinstance(error, errors.DisabledRepoError):
        return _not_found(repo_id, "the hub has disabled it")
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return _gated(repo_id)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return _not_found(repo_id, "it does not exist, it is private, or the token in use is not valid")
    if status == 429 or status >= 500:
        return _offline(repo_id, filename, revision, f"the hub answered with status {status}")
    return SourceError(
        "the hub refused the request",
        where=repo_id,
        why=named(error),
        help="try again later, or pass a directory",
        code="hub-error",
    )


def _offline(repo_id: str, filename: str, revision: str | None, why: str) -> SourceError:
    command = f"hf download {repo_id} {filename}" + (f" --revision {revision}" if revision else "")
    return SourceError(
        f"{filename} is not in the cache, and the hub did not send it",
        where=repo_id,
        why=why,
        help=f"fetch it once online with `{command}`, or pass a directory",
        code="hub-offline",
    )


def _not_found(repo_id: str, why: str) -> SourceError:
    return SourceError(
        "the hub has no such model",
        where=repo_id,
        why=why,
        help="check the id; for a private model set HF_TOKEN to a token that may read it",
        code="hub-not-found",
    )


def _gated(repo_id: str) -> SourceError:
    from huggingface_hub import constants

    return SourceError(
        "the hub does not give out this model to everyone",
        where=repo_id,
        why="it is gated, and the token in use (if any) has no access",
        help=f"accept the terms at {constants.ENDPOINT}/{repo_id} and set HF_TOKEN",
        code="hub-gated",
    )


def _no_revision(repo_id: str, revision: str | None) -> SourceError:
    return SourceError(
        f"the model has no revision {revision or 'main'!r}",
        where=repo_id,
        help="name a branch, a tag or a commit that its page lists",
        code="hub-no-revision",
    )


def read_prefix(repo_id: str, filename: str, revision: str, length: int) -> tuple[bytes, int | None]:
    """The first ``length`` bytes of a hub file (fewer where it is shorter), and its size in bytes.

    Asks for that range, and stops reading there even where a server ignores the request and sends it all.
    The size is None where the server does not tell it.

    Raises:
        SourceError: as :func:`probe`.
    """
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    asked = {**build_hf_headers(), "Range": f"bytes=0-{length - 1}", "Accept-Encoding": "identity"}
    body = bytearray()
    try:
        url = hf_hub_url(repo_id, filename, revision=revision)
        with get_session().stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
            hf_raise_for_status(answer)
            for chunk in answer.iter_raw(chunk_size=2**16):
                body += chunk
                if len(body) >= length:
                    break
            partial = answer.status_code == 206
            size = answer.headers.get("Content-Range" if partial else "Content-Length", "")
    except Exception as error:
        # As in probe(): what is not an answer of the hub is a hub that was not reached.
        raise explain(error, repo_id, filename, revision) from error
    size = size.rpartition("/")[2]
    return bytes(body[:length]), int(size) if size.isdecimal() else None
