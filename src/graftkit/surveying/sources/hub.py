"""Single files from the hub or from its cache.

Everything goes through ``huggingface_hub``, so ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and
``HF_HUB_OFFLINE`` mean here what they mean elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.errors import SourceError
from graftkit.surveying.sources.hub_errors import offline, source_error

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

# A hub that does not answer within this many seconds is treated as unreachable; HF_HUB_ETAG_TIMEOUT wins.
_ANSWER_SECONDS = 5.0
# Errors after which a cached copy is used. A file or revision that the hub says does not exist is not among them.
_CACHE_HELPS = frozenset({"hub-offline", "hub-not-found", "hub-gated"})


@dataclass(frozen=True)
class HubFile:
    """A local copy of a file of a hub repository.

    Attributes:
        path: the file in the hub's cache.
        commit: the commit it belongs to.
        validated: True where the hub confirmed it in this call, False where it was taken from the cache.
    """

    path: Path
    commit: str
    validated: bool


def is_hub_id(text: str) -> bool:
    """Check whether ``text`` is written like ``owner/name``."""
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
    """Return the cached copy of a file, or None, without a request. Takes bare legacy ids (``"gpt2"``)."""
    from huggingface_hub import try_to_load_from_cache

    if not _is_repo_name(repo_id):
        return None
    found = try_to_load_from_cache(repo_id, filename, revision=revision)
    # Otherwise it is None, or a marker that the hub once said there is no such file.
    if not isinstance(found, str):
        return None
    return HubFile(Path(found), _commit_of(Path(found), filename), validated=False)


def _commit_of(path: Path, filename: str) -> str:
    """Return the commit that a cached file belongs to: the name of the folder that ``filename`` starts from."""
    return path.parents[filename.count("/")].name


def file_metadata(
    repo_id: str, filename: str, revision: str | None = None, *, repo_type: str = "model"
) -> HfFileMetadata:
    """Ask the hub once, without retries, for a file's commit and size.

    ``hf_hub_download`` alone would retry for minutes where the hub is unreachable and nothing is cached.

    Raises:
        SourceError: ``hub-offline``, ``hub-not-found``, ``hub-gated``, ``hub-no-revision``, ``hub-no-file``
            or ``hub-error``.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode

    if is_offline_mode():
        raise offline(repo_id, filename, revision, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        url = hf_hub_url(repo_id, filename, revision=revision, repo_type=repo_type)
        metadata = get_hf_file_metadata(url, timeout=_answer_seconds())
    except Exception as error:
        # One request: whatever is not an answer of the hub means that the hub was not reached. The HTTP
        # client's own exceptions are not named, because which client it is differs between hub versions.
        raise source_error(error, repo_id, filename, revision) from error
    if metadata.commit_hash is None:
        raise offline(repo_id, filename, revision, f"what answers at {constants.ENDPOINT} is not a hub")
    return metadata


def why_not_asked(repo_id: str, revision: str | None = None) -> SourceError | None:
    """Ask the hub for a model once, and return the error where it does not answer or refuses, else None."""
    try:
        file_metadata(repo_id, "config.json", revision)
    except SourceError as error:
        return error
    return None


def _answer_seconds() -> float:
    from huggingface_hub import constants

    chosen = constants.HF_HUB_ETAG_TIMEOUT
    return _ANSWER_SECONDS if chosen == constants.DEFAULT_ETAG_TIMEOUT else chosen


def fetch(repo_id: str, filename: str, revision: str | None = None, *, max_bytes: int) -> HubFile:
    """Fetch one file through the hub's cache: confirmed by the hub where it answers, else as cached.

    Raises:
        SourceError: as :func:`file_metadata`; ``hub-file-too-large``; ``hub-cache`` (it cannot be written).
    """
    cached = from_cache(repo_id, filename, revision)
    try:
        metadata = file_metadata(repo_id, filename, revision)
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
        # By the name the user gave, not by the commit: this is what makes the cache answer to it offline.
        path = Path(hf_hub_download(repo_id, filename, revision=revision, etag_timeout=_answer_seconds()))
    except Exception as error:
        hub_failed = isinstance(error, HfHubHTTPError | LocalEntryNotFoundError)
        if hub_failed or not isinstance(error, OSError):
            raise source_error(error, repo_id, filename, revision) from error
        raise SourceError(
            f"{filename} was found, but cannot be written to the cache",
            where=constants.HF_HUB_CACHE,
            why=f"{type(error).__name__}: {error}",
            help="free space there, or set HF_HOME to a directory that can be written",
            code="hub-cache",
        ) from error
    return HubFile(path, _commit_of(path, filename), validated=True)


def read_prefix(repo_id: str, filename: str, revision: str, length: int) -> tuple[bytes, int | None]:
    """Return the first ``length`` bytes of a hub file (fewer where it is shorter), and its size in bytes.

    Asks for that range, and stops reading there even where a server ignores the range and sends it all. The
    size is None where the server does not send it.

    Raises:
        SourceError: as :func:`file_metadata`.
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
        # As in file_metadata(): what is not an answer of the hub is a hub that was not reached.
        raise source_error(error, repo_id, filename, revision) from error
    size = size.rpartition("/")[2]
    return bytes(body[:length]), int(size) if size.isdecimal() else None
