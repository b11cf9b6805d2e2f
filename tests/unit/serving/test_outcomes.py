"""What log-probabilities say of an adapter: the figures are those of a computation by hand, and noise decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.engines.outcome import Outcome
from graftkit.serving.outcomes import Measured, figures_of, outcome_of, refused, served

BASE = [-1.0, -2.0, -3.0, -4.0]
ADAPTED = [-2.0, -1.5, -3.5, -2.0]
NOISE = 1e-5


def log_softmax(logits: np.ndarray) -> list[float]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return list((shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).ravel())


def measured(served_adapted: list[float], *, noise: float = NOISE) -> Measured:
    return Measured(BASE, ADAPTED, [value + noise for value in BASE], served_adapted)


def outcome(served_adapted: list[float], *, noise: float = NOISE) -> Outcome:
    return outcome_of(figures_of(measured(served_adapted, noise=noise)))


def test_the_figures_are_the_largest_differences() -> None:
    found = figures_of(Measured(BASE, ADAPTED, [-1.0, -2.0, -3.0, -4.25], [-2.0, -1.5, -3.0, -2.0]))
    assert (found.effect, found.error, found.base_error) == (2.0, 0.5, 0.25)
    assert found.served_effect == 2.25
    assert found.compared == 4


def test_what_is_as_near_as_the_base_is_applied() -> None:
    assert outcome([value - 2 * NOISE for value in ADAPTED]) is Outcome.APPLIED


def test_what_is_the_base_again_is_ignored() -> None:
    assert outcome([value + NOISE for value in BASE]) is Outcome.IGNORED


def test_a_part_that_is_missing_is_different() -> None:
    assert outcome([*ADAPTED[:3], BASE[3]]) is Outcome.DIFFERENT


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 8.0])
def test_a_scaled_update_is_scaled_by_that_factor(factor: float) -> None:
    # In nats the change of a small update is proportional to it.
    random = np.random.default_rng(0)
    logits, update = random.normal(size=(20, 64)), 0.02 * random.normal(size=(20, 64))
    base, adapted = log_softmax(logits), log_softmax(logits + update)
    found = figures_of(Measured(base, adapted, base, log_softmax(logits + factor * update)))
    assert outcome_of(found) is Outcome.SCALED
    assert found.factor == pytest.approx(factor, rel=0.05)


def test_an_effect_within_the_noise_is_unknown_whatever_was_served() -> None:
    for answer in (BASE, ADAPTED, [-9.0, -9.0, -9.0, -9.0]):
        assert outcome(answer, noise=0.5) is Outcome.UNKNOWN


def test_what_has_no_effect_is_unknown() -> None:
    assert outcome_of(figures_of(Measured(BASE, BASE, BASE, BASE))) is Outcome.UNKNOWN


def test_masked_tokens_are_left_out() -> None:
    found = figures_of(
        Measured([*BASE, -5.0], [*ADAPTED, -6.0], [*BASE, -math.inf], [*ADAPTED, -math.inf]),
    )
    assert found.compared == 4
    assert outcome_of(found) is Outcome.APPLIED


def test_nothing_finite_is_no_comparison() -> None:
    with pytest.raises(ValueError):
        figures_of(Measured([math.nan], [0.0], [0.0], [0.0]))


def test_other_lengths_are_no_comparison() -> None:
    with pytest.raises(ValueError):
        figures_of(Measured(BASE, ADAPTED, BASE, ADAPTED[:3]))


logprobs = st.lists(st.floats(-20, 0), min_size=3, max_size=12)


@given(base=logprobs, seed=st.integers(0, 1000), noise=st.floats(0, 1e-3))
def test_an_engine_that_is_as_exact_with_the_adapter_never_gets_an_alarm(
    base: list[float], seed: int, noise: float
) -> None:
    random = np.random.default_rng(seed)
    adapted = [value - float(random.uniform(0.5, 3)) for value in base]
    shift = [float(random.choice([-1, 1])) * noise for _ in base]
    answer = Measured(base, adapted, _sum(base, shift), _sum(adapted, shift))
    assert outcome_of(figures_of(answer)) is Outcome.APPLIED


@given(base=logprobs, seed=st.integers(0, 1000))
def test_an_ignored_adapter_is_never_applied(base: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    adapted = [value - float(random.uniform(0.5, 3)) for value in base]
    assert outcome_of(figures_of(Measured(base, adapted, base, base))) is Outcome.IGNORED


def _sum(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]


def test_the_result_holds_the_figures_and_says_why_it_is_unknown() -> None:
    found = served(measured(ADAPTED, noise=0.5), "llama.cpp 0.3.36", replaced=("a kernel",))
    assert found.outcome is Outcome.UNKNOWN
    assert found.says
    assert found.base_error == pytest.approx(0.5)
    assert found.replaced == ("a kernel",)


def test_a_refusal_keeps_the_words() -> None:
    found = refused("vllm 0.32.0", "ValueError: no")
    assert (found.outcome, found.says, found.effect) == (Outcome.REFUSED, "ValueError: no", None)
