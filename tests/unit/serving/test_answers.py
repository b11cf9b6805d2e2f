"""Whatever a server sends is read as log-probabilities, or as none; nothing of it is trusted."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graftkit.adapters.record import ExpectedPrompt
from graftkit.serving.probing.answers import answer_of, candidates

PROMPT = ExpectedPrompt(
    ids=(1,), tokens=(3, 4, 5, 6), pieces=(" Paris", "Paris", "", "\n"), base=(-1,) * 4, adapter=(-2,) * 4
)
NAMES = [
    "choices",
    "logprobs",
    "content",
    "top_logprobs",
    "token",
    "text",
    "id",
    "logprob",
    "details",
    "top_tokens",
]
NAMES += ["completion_probabilities", "usage", "prompt_tokens", "token_id:3", " Paris"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(NAMES) | st.text(max_size=4)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
)


@given(anything)
def test_anything_is_read(response: Any) -> None:
    answer = answer_of(response, PROMPT)
    assert set(answer.values) <= set(PROMPT.tokens)


@given(st.floats() | st.integers())
@example(0.0)
@example(-(10**400))
@example(-float("inf"))
@example(float("nan"))
@example(0.5)
def test_only_what_a_log_probability_can_be_is_read(number: float | int) -> None:
    listed = [{"id": 3, "logprob": number}]
    response = {"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]}
    # A server may round a little above 0.
    is_one = -sys.float_info.max <= number <= 1e-3
    assert answer_of(response, PROMPT).values == ({3: float(number)} if is_one else {})


LISTED = [{"id": 3, "token": "▁Paris", "logprob": -1.5}, {"id": 9, "token": "x", "logprob": -2.5}]


@pytest.mark.parametrize(
    "response",
    [
        pytest.param({"choices": [{"logprobs": {"top_logprobs": [{"token_id:3": -1.5}]}}]}, id="vLLM"),
        pytest.param({"choices": [{"logprobs": {"top_logprobs": [{" Paris": -1.5, "x": -3}]}}]}, id="completions"),
        pytest.param({"choices": [{"logprobs": {"content": [{"top_logprobs": LISTED}]}}]}, id="chats, mlx_lm"),
        pytest.param({"completion_probabilities": [{"top_logprobs": LISTED}]}, id="llama.cpp"),
        pytest.param([{"details": {"top_tokens": [[{"id": 3, "text": " Paris", "logprob": -1.5}]]}}], id="TGI"),
    ],
)
def test_every_form(response: Any) -> None:
    assert candidates(response)
    assert dict(answer_of(response, PROMPT).values) == {3: -1.5}


def completion(**texts: float) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"top_logprobs": [texts]}}]}


def test_a_text_that_is_another_token_s_without_its_space() -> None:
    """A server that drops leading spaces says "Paris" for either."""
    pieces = (" Paris", "Paris", " a", " b")
    spaced = PROMPT.model_copy(update={"pieces": pieces})
    assert dict(answer_of(completion(Paris=-1.0, b=-2.0), spaced).values) == {}
    assert dict(answer_of(completion(**{"Paris": -1.0, " b": -2.0}), spaced).values) == {4: -1.0, 6: -2.0}


def test_a_text_that_several_tokens_have() -> None:
    twice = [{"token": " Paris", "logprob": -1.0}, {"token": " Paris", "logprob": -2.0}]
    response = {"choices": [{"logprobs": {"content": [{"top_logprobs": twice}]}}]}
    assert dict(answer_of(response, PROMPT).values) == {}
