"""Every twin has the structure of the full model: nothing is proven on what is only like the architecture.

The full default configuration is built without weights, and so is the twin's. What may differ is how often
something repeats, how wide it is, and what the twin's description names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.families.buildable import Built, read_buildable
from tests.families.turns import in_turns
from transformers import PretrainedConfig

from graftkit.errors import GraftError
from graftkit.families._known_twins import known_twin
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.twins.faithful.differences import differences
from graftkit.twins.faithful.keep_structure import keep_structure
from graftkit.twins.shrink import shrink

# How weights are stored and what generation does: no part of what a twin is a twin of.
NO_STRUCTURE = {"quantization_config", "compression_config", "suppress_tokens", "begin_suppress_tokens"}
BUILT = [name for name, kind in read_buildable().items() if kind is not Built.NOTHING]


@dataclass(frozen=True)
class Pair:
    """A full model and its twin, both without weights."""

    full: Any
    twin: Any


def pair_of(model_type: str) -> Pair:
    """Build both; skip a type whose default configuration describes no model, or no twin."""
    try:
        loaded = load_config(model_type)
        model_class = model_class_of(loaded)
        full = build_on_meta(loaded.config, model_class)
    except GraftError as error:
        pytest.skip(f"no full model to compare with: {error.what}")
    known = known_twin(model_class.__name__)
    try:
        kept = known.kept if known else keep_structure(full).kept
        twin = build_on_meta(shrink(loaded.config, kept=kept), model_class)
    except GraftError as error:
        pytest.skip(f"no twin: {error.what}")
    return Pair(full, twin)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", in_turns(BUILT))
def test_a_twin_is_built_like_the_full_model(model_type: str) -> None:
    pair = pair_of(model_type)
    assert [str(difference) for difference in differences(pair.full, pair.twin)] == []
    assert list(lost(pair.full.config, pair.twin.config)) == []


def lost(full: PretrainedConfig, small: PretrainedConfig, path: str = "") -> Iterator[str]:
    """Yield what the twin's configuration lacks: a part, a kind of layer, a flag, a choice of experts."""
    fields, has = full.to_dict(), small.to_dict()
    for name in full.sub_configs:
        part, twin_part = getattr(full, name, None), getattr(small, name, None)
        if isinstance(part, PretrainedConfig):
            if isinstance(twin_part, PretrainedConfig):
                yield from lost(part, twin_part, f"{path}{name}.")
            else:
                yield f"{path}{name}"
    for name, value in fields.items():
        if name in full.sub_configs or name in NO_STRUCTURE:
            continue
        kinds = isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
        if isinstance(value, bool) and has.get(name) != value:
            yield f"{path}{name}: {value}, now {has.get(name)}"
        if kinds and name.endswith("_types") and set(has.get(name) or ()) != set(value):
            yield f"{path}{name}: {sorted(set(value))}, now {has.get(name)}"
    yield from (f"{path}{what}" for what in experts_lost(fields, has))


def experts_lost(full: dict[str, Any], small: dict[str, Any]) -> Iterator[str]:
    """Yield choices among experts that are none any more."""
    for count in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        for chosen in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"):
            numbers = [fields.get(name) for fields in (full, small) for name in (chosen, count)]
            if all(isinstance(number, int) for number in numbers):
                top, of, now_top, now_of = numbers
                if top < of and not 0 < now_top < now_of:
                    yield f"{chosen} of {count}: {top} of {of}, now {now_top} of {now_of}"
