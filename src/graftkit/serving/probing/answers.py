"""The log-probabilities in a server's answer, in each of the forms in which servers write them.

Sources: OpenAI's completions (``choices[].logprobs.top_logprobs``: one object of text -> number a token) and chat
(``choices[].logprobs.content[].top_logprobs``: a list); llama.cpp's server, ``completion_probabilities`` and the
chat form for both (tools/server/README.md); mlx_lm.server, the chat form for both, with ``id``; Text Generation
Inference, ``details.top_tokens``. vLLM writes "token_id:5" for a token's text where ``return_tokens_as_token_ids``
is set.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.adapters.record import ExpectedPrompt

_ID_PREFIX = "token_id:"
_LARGEST = sys.float_info.max
# How tokenizers write a space within a token.
_SPACES = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})


@dataclass(frozen=True)
class Candidate:
    """One token that may come next, as a server names it.

    Attributes:
        id: None where the server names only its text.
        text: None where it names only its id.
    """

    id: int | None
    text: str | None
    logprob: float


@dataclass(frozen=True)
class Answer:
    """A server's answer to one prompt.

    Attributes:
        values: the record's token -> its log-probability, of those that the server names.
        prompt_tokens: how many tokens the server made of the prompt; None where it does not say.
    """

    values: Mapping[int, float]
    prompt_tokens: int | None = None


def answer_of(response: Any, prompt: ExpectedPrompt) -> Answer:
    """Read an answer; the values are empty where it has no log-probabilities of a token in the record."""
    found = [c for c in candidates(response) if c.logprob <= 1e-3]
    usage = response.get("usage") if isinstance(response, Mapping) else None
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return Answer(_matched(found, prompt), count if type(count) is int else None)


def candidates(response: Any) -> list[Candidate]:
    """Return the candidates for the first token that the server made, of those with finite numbers."""
    choice = _first(_get(response, "choices"))
    logprobs = _get(choice, "logprobs")
    forms = (
        _get(_first(_get(logprobs, "content")), "top_logprobs"),
        _first(_get(logprobs, "top_logprobs")),
        _get(_first(_get(response, "completion_probabilities")), "top_logprobs"),
        _first(_get(_get(_first(response) or response, "details"), "top_tokens")),
    )
    return next((found for form in forms if (found := list(_listed(form)))), [])


def _listed(form: Any) -> Iterator[Candidate]:
    if isinstance(form, Mapping):
        for text, value in form.items():
            yield from _candidate(None, text, value)
    elif isinstance(form, Sequence) and not isinstance(form, str):
        for entry in form:
            yield from _candidate(
                _get(entry, "id"), _get(entry, "token") or _get(entry, "text"), _get(entry, "logprob")
            )


def _candidate(token: Any, text: Any, value: Any) -> Iterator[Candidate]:
    # An integer of JSON may be larger than any float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        return
    if isinstance(text, str) and text.startswith(_ID_PREFIX) and text.removeprefix(_ID_PREFIX).isdigit():
        token, text = int(text.removeprefix(_ID_PREFIX)), None
    yield Candidate(token if type(token) is int else None, text if isinstance(text, str) else None, float(value))


def _matched(found: Sequence[Candidate], prompt: ExpectedPrompt) -> dict[int, float]:
    """Return the record's token -> log-probability, by ids, else by texts that are those of one token only."""
    by_text = {piece: token for piece, token in zip(prompt.pieces, prompt.tokens, strict=False) if piece}
    if _drops_spaces(found, prompt.pieces):
        by_text = {}
    named = Counter(candidate.text for candidate in found)
    values: dict[int, float] = {}
    for candidate in found:
        token = candidate.id
        if token is None and candidate.text is not None and named[candidate.text] == 1:
            token = by_text.get(candidate.text, by_text.get(candidate.text.translate(_SPACES)))
        if token in prompt.tokens:
            values.setdefault(token, candidate.logprob)
    return values


def _drops_spaces(found: Sequence[Candidate], pieces: Sequence[str]) -> bool:
    """Check whether a server's texts lack the spaces that tokens begin with: "a" may then be the token " a"."""
    spaced = sum(piece[:1].isspace() for piece in pieces)
    texts = [candidate.text.translate(_SPACES) for candidate in found if candidate.text]
    return 3 * spaced >= len(pieces) and bool(texts) and not any(text[:1].isspace() for text in texts)


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None
