"""What an exception of ``huggingface_hub`` means for the user."""

from __future__ import annotations

from graftkit.errors import SourceError
from graftkit.text import describe


def source_error(error: Exception, repo_id: str, filename: str, revision: str | None) -> SourceError:
    """Return the error, with its code and the next step, that stands for an exception of ``huggingface_hub``."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) or not isinstance(error, errors.HfHubHTTPError):
        return offline(repo_id, filename, revision, describe(error))
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"the model has no revision {revision or 'main'!r}",
            where=repo_id,
            help="name a branch, a tag or a commit that its page lists",
            code="hub-no-revision",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"the repository has no {filename}", where=repo_id, code="hub-no-file")
    status = error.response.status_code
    if isinstance(error, errors.DisabledRepoError):
        return _not_found(repo_id, "the hub has disabled it")
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return SourceError(
            "the hub does not give out this model to everyone",
            where=repo_id,
            why="it is gated, and the token in use (if any) has no access",
            help=f"accept the terms at {constants.ENDPOINT}/{repo_id} and set HF_TOKEN",
            code="hub-gated",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return _not_found(repo_id, "it does not exist, it is private, or the token in use is not valid")
    if status == 429 or status >= 500:
        return offline(repo_id, filename, revision, f"the hub answered with status {status}")
    return SourceError(
        "the hub refused the request",
        where=repo_id,
        why=describe(error),
        help="try again later, or pass a directory",
        code="hub-error",
    )


def offline(repo_id: str, filename: str, revision: str | None, why: str) -> SourceError:
    """Return the error for a file that is not in the cache while the hub cannot be reached."""
    command = f"hf download {repo_id} {filename}" + (f" --revision {revision}" if revision else "")
    return SourceError(
        f"{filename} is not in the cache, and the hub did not send it",
        where=repo_id,
        why=why,
        help=f"fetch it once online with `{command}`, or pass a directory",
        code="hub-offline",
    )


def weights_not_local(repo_id: str, revision: str | None, why: str | None) -> SourceError:
    """Return the error for weights that are not, or not all, in the cache while the hub cannot be reached."""
    command = f"hf download {repo_id}" + (f" --revision {revision}" if revision else "")
    return SourceError(
        "the model's weights are not in the cache, and the hub cannot be reached",
        where=repo_id,
        why=why,
        help=f"fetch them once online with `{command}`, or name a folder that has them",
        code="weights-not-local",
    )


def _not_found(repo_id: str, why: str) -> SourceError:
    return SourceError(
        "the hub has no such model",
        where=repo_id,
        why=why,
        help="check the id; for a private model set HF_TOKEN to a token that may read it",
        code="hub-not-found",
    )
