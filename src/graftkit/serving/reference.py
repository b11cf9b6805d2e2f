"""What transformers and PEFT compute, for an engine to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.live_adapter import adapter_parameters
from graftkit.errors import VerifyError
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.threads import one_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from peft import PeftModel

# Rows of token ids, and the lengths up to which each is cut.
_ROWS = 3
_LENGTHS = range(2, 9)
# The first ids of most vocabularies are special.
_FIRST_ID = 4
# What a fresh adapter is to change a log-probability by, in nats, and the noise it starts and ends with.
_EFFECT = 0.5
_FIRST_STD = 0.05
_LAST_STD = 2.0


def text_prefixes(config: Any, *, seed: int = 0) -> list[list[int]]:
    """Return token ids for a model to go on from: 21 prefixes of 2 to 8 tokens, none of them special.

    Args:
        config: the model's configuration; with a token that begins sentences, each prefix begins with it.
        seed: of the tokens.
    """
    import random

    text = config.get_text_config()
    special = _special_ids(config) | _special_ids(text)
    plain = [index for index in range(_FIRST_ID, text.vocab_size) if index not in special]
    draw = random.Random(seed)
    rows = [[draw.choice(plain) for _ in range(max(_LENGTHS))] for _ in range(_ROWS)]
    begin = _first_id(getattr(text, "bos_token_id", None))
    return [[*begin, *row[:length]] for row in rows for length in _LENGTHS]


def _first_id(token: Any) -> list[int]:
    return [token] if isinstance(token, int) and token >= 0 else []


def _special_ids(config: Any) -> set[int]:
    """Return the ids in fields called ``…_token_id`` or ``…_token_ids``, ``…_token_index`` and the like."""
    found: set[int] = set()
    for name, value in config.to_dict().items():
        if "token_id" in name or "token_index" in name:
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def log_probabilities(model: Any, prefixes: Sequence[Sequence[int]]) -> NDArray[Any]:
    """Return the log-probabilities of the token after each prefix, as the model's forward gives them.

    Args:
        model: a transformers model with a head for text, or a PEFT model around one.
        prefixes: token ids.

    Returns:
        float32 of shape (prefixes, vocabulary).

    Raises:
        VerifyError: ``prove-model``: the model cannot be run on text alone.
    """
    import numpy as np
    import torch

    rows = []
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model), one_thread():
        for prefix in prefixes:
            try:
                logits = model(input_ids=torch.tensor([list(prefix)], device=device), use_cache=False).logits
            except Exception as error:
                raise VerifyError(
                    "the model cannot be run on text alone",
                    where=type(model).__name__,
                    why=f"{type(error).__name__}: {error}",
                    help="name a model that generates text",
                    code="prove-model",
                ) from error
            rows.append(logits[0, -1].float().log_softmax(-1).cpu().numpy())
    return np.stack(rows)


def give_effect(model: PeftModel, prefixes: Sequence[Sequence[int]], base: NDArray[Any], *, seed: int = 0) -> None:
    """Add noise to an adapter until the model's log-probabilities show it.

    The noise is doubled until one of them changes by half a nat, or the noise is larger than any weight: an
    adapter on what no text passes through shows nothing.

    Args:
        model: changed in place, unless its adapter shows already.
        prefixes: token ids.
        base: the log-probabilities of the base, from before an initializer may have moved it.
        seed: of the noise.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = list(adapter_parameters(model).values())
    noise = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    fresh = [parameter.detach().clone() for parameter in parameters]
    std = _FIRST_STD
    while std <= _LAST_STD and abs(log_probabilities(model, prefixes) - base).max() < _EFFECT:
        with torch.no_grad():
            for parameter, start, added in zip(parameters, fresh, noise, strict=True):
                parameter.copy_(start + std * added.to(parameter))
        std *= 2
