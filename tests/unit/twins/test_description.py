"""What a twin says of itself is what it is."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import LlamaConfig, MixtralConfig

from graftkit.errors import GraftError
from graftkit.twins.description import describe_twin
from graftkit.twins.twin import twin


@pytest.fixture(scope="module")
def mixtral():
    return twin(_config())


def _config():
    return MixtralConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def test_every_changed_field_is_named_with_both_values(mixtral):
    described = describe_twin(mixtral)
    before, after = _config().to_dict(), mixtral.config.to_dict()
    differ = {name for name, value in after.items() if value != before.get(name)} - {"dtype"}
    changed = {
        change.path: (change.source, change.twin) for change in described.changes if change.twin is not None
    }
    assert changed == {name: (before[name], after[name]) for name in differ}
    assert {change.path for change in described.dropped} == {"quantization_config"}


def test_layers_experts_and_widths_are_told_apart(mixtral):
    described = describe_twin(mixtral)
    assert [(c.path, c.source, c.twin) for c in described.layers] == [("num_hidden_layers", 32, 2)]
    assert [(c.path, c.source, c.twin) for c in described.experts] == [("num_local_experts", 8, 4)]
    widths = {c.path: c.twin for c in described.widths}
    assert widths["hidden_size"] == mixtral.config.hidden_size
    assert not {"num_hidden_layers", "num_local_experts"} & set(widths)


def test_it_counts_the_parameters_and_names_the_class(mixtral):
    described = describe_twin(mixtral)
    assert described.parameters == sum(p.numel() for p in mixtral.parameters())
    assert (described.model_class, described.model_type) == ("MixtralForCausalLM", "mixtral")


def test_it_is_json(mixtral):
    described = describe_twin(mixtral)
    fields = json.loads(json.dumps(described.to_dict()))
    assert fields["changes"]["num_hidden_layers"] == {"source": 32, "twin": 2}
    assert fields["kept"] == list(described.kept)


def test_parts_are_named_by_their_path():
    from transformers import LlavaConfig

    paths = {change.path for change in describe_twin(twin(LlavaConfig())).layers}
    assert paths == {"text_config.num_hidden_layers", "vision_config.num_hidden_layers"}


def test_a_copy_and_an_adapted_twin_keep_it(mixtral):
    from peft import LoraConfig, get_peft_model

    described = describe_twin(mixtral)
    copied = copy.deepcopy(mixtral)
    assert describe_twin(copied) == described
    assert describe_twin(get_peft_model(copied, LoraConfig(target_modules=["q_proj"]))) == described


def test_what_is_no_twin_has_none():
    from transformers import LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(GraftError) as caught:
        describe_twin(LlamaForCausalLM(small))
    assert caught.value.code == "no-twin"
