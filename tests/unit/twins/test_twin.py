"""The live twin: same class, alive weights, clamps that clamp, and no trace left on the global state."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch

from graftkit.errors import BuildError, SourceError
from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.model_class import model_class_for
from graftkit.twins.bounds import calibrate_bounds
from graftkit.twins.example_batch import example_batch
from graftkit.twins.twin import twin


def _forward(model, **kwargs):
    with torch.no_grad():
        return model(**example_batch(model, **kwargs))


def test_class_is_the_same_and_size_is_tiny(case, twin_of_case):
    assert type(twin_of_case) is model_class_for(case.config())
    assert sum(p.numel() for p in twin_of_case.parameters()) < 3_000_000
    assert not twin_of_case.training
    assert {p.device.type for p in twin_of_case.parameters()} == {"cpu"}


def test_loss_is_finite_and_every_part_gets_a_gradient(case, twin_of_case):
    loss = twin_of_case(**example_batch(twin_of_case)).loss
    loss.backward()
    assert torch.isfinite(loss)
    dead = [
        name
        for name, p in twin_of_case.named_parameters()
        if (p.grad is None or not p.grad.abs().sum() > 0) and not any(part in name for part in case.unused)
    ]
    assert dead == []


def test_logits_depend_on_the_input(twin_of_case):
    first, second = _forward(twin_of_case, seed=0).logits, _forward(twin_of_case, seed=1).logits
    assert torch.isfinite(first).all()
    assert (first - second).abs().mean() > 0.01


def _shape_of(model):
    """Module paths without layer numbers, each with its class: what the architecture is made of."""
    return {(_unnumbered(name), type(module).__name__) for name, module in model.named_modules()}


def _ties(model):
    """Groups of parameter paths, without layer numbers, that are one parameter."""
    names = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(_unnumbered(name))
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _unnumbered(path):
    return re.sub(r"\.\d+(?=\.|$)", ".N", path)


def test_modules_and_ties_are_those_of_the_original(case, twin_of_case):
    original = build_on_meta(case.config())
    assert _shape_of(twin_of_case) == _shape_of(original)
    assert _ties(twin_of_case) == _ties(original)


GEMMA4_E2B = "google/gemma-4-E2B-it"


@pytest.fixture(scope="module")
def e2b():
    from transformers import Gemma4Config

    from graftkit.families import geometry

    return Gemma4Config.from_dict(dict(geometry(GEMMA4_E2B)))


def test_clamps_are_found_by_structure_in_every_tower(e2b):
    paths = [wrapper.path for wrapper in bounded_wrappers(twin(e2b))]
    assert sum("vision_tower" in path for path in paths) == 14
    assert sum("audio_tower" in path for path in paths) == 20


def test_clamps_bite_a_share_of_the_activations(e2b):
    model = twin(e2b)
    shares = {}

    def record(wrapper, values, side):
        low, high = (wrapper.bounds[f"{side}_{end}"] for end in ("min", "max"))
        assert low.isfinite()
        assert high.isfinite()
        assert low < high
        shares[wrapper.path, side] = ((values < low) | (values > high)).float().mean().item()

    for wrapper in bounded_wrappers(model):
        wrapper.module.register_forward_pre_hook(lambda _, args, w=wrapper: record(w, args[0], "input"))
        wrapper.layer.register_forward_hook(lambda _, __, out, w=wrapper: record(w, out, "output"))
    _forward(model)
    assert len(shares) == 2 * len(bounded_wrappers(model))
    assert all(0 < share < 0.5 for share in shares.values())
    assert sum(shares.values()) / len(shares) == pytest.approx(0.06, abs=0.02)


def test_clamps_bite_on_other_inputs_too(e2b):
    model = twin(e2b)
    clamped = _forward(model, seed=7).logits
    for wrapper in bounded_wrappers(model):
        for name, bound in wrapper.bounds.items():
            bound.fill_(float("-inf") if name.endswith("min") else float("inf"))
    assert not torch.allclose(clamped, _forward(model, seed=7).logits)


def test_clamps_off_means_no_bounds():
    from transformers import Gemma4Config

    from graftkit.families import geometry

    assert bounded_wrappers(twin(Gemma4Config.from_dict(dict(geometry("google/gemma-4-31B"))))) == []


def test_unreached_clamps_get_a_finite_constant(e2b):
    model = twin(e2b)
    for wrapper in bounded_wrappers(model):
        wrapper.bounds["input_max"].fill_(float("inf"))
    calibrate_bounds(model, None)
    assert all(wrapper.bounds["input_max"].isfinite() for wrapper in bounded_wrappers(model))


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_same_seed_gives_the_same_model_and_another_seed_another(e2b):
    first, again, other = (_state(twin(e2b, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(changed) > len(first) / 2


def test_global_random_state_is_undisturbed(e2b):
    before = torch.get_rng_state()
    example_batch(twin(e2b, seed=5), seed=6)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weights_do_not_depend_on_the_global_random_state(e2b):
    first = _state(twin(e2b))
    with torch.random.fork_rng(devices=[]):
        torch.rand(100)
        again = _state(twin(e2b))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_live_model_gives_its_own_class():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    live = LlamaForSequenceClassification(_tiny_llama(LlamaConfig, pad_token_id=0))
    model = twin(live)
    assert type(model) is LlamaForSequenceClassification
    assert torch.isfinite(_forward(model).loss)


# PEFT reads a property of transformers models that transformers 5.23 renamed; nothing here calls either.
_PEFT_READS_A_RENAMED_PROPERTY = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@_PEFT_READS_A_RENAMED_PROPERTY
def test_a_peft_model_gives_its_base_models_class():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    adapted = get_peft_model(LlamaForCausalLM(_tiny_llama(LlamaConfig)), LoraConfig(target_modules=["q_proj"]))
    assert type(twin(adapted)) is LlamaForCausalLM


def _tiny_llama(config_class, **fields):
    return config_class(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **fields
    )


def test_dtype_is_taken():
    from transformers import Qwen3Config

    model = twin(Qwen3Config(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(_forward(model).loss)


def test_overrides_are_taken():
    from transformers import Qwen3Config

    assert len(twin(Qwen3Config(), overrides={"num_hidden_layers": 3, "layer_types": None}).model.layers) == 3


def test_norms_let_through_what_they_normalize():
    """MobileViT draws the scales of its norms like matrices, around zero, and trained ones are near one."""
    norms = [module for module in twin("mobilevit").modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all((norm.weight - 1).abs().max() < 0.5 for norm in norms)


def test_tables_of_a_checkpoint_that_are_no_parameters_are_drawn():
    """A codebook of zeros would be all that a codec decodes; a bias of zeros stays."""
    codec, bart = twin("xcodec"), twin("bart")
    codes = [buffer for name, buffer in codec.named_buffers() if name.endswith("codebook.embed")]
    assert codes
    assert all(0.5 < table.std() < 2 for table in codes)
    assert not bart.final_logits_bias.any()


def test_state_space_parameters_keep_their_structure():
    from transformers import MambaConfig

    mixer = twin(MambaConfig()).backbone.layers[0].mixer
    states = torch.arange(1, mixer.ssm_state_size + 1).float()
    assert torch.allclose(mixer.A_log, states.log().expand_as(mixer.A_log))


def test_what_cannot_be_built_is_an_error_with_a_way_out():
    from transformers import LlamaConfig

    with pytest.raises(BuildError) as caught:
        twin(LlamaConfig(), overrides={"hidden_act": "no-such-function"})
    assert caught.value.code == "twin"
    assert caught.value.why
    assert caught.value.help


def test_what_would_not_be_small_is_refused_before_it_is_built():
    from transformers import LlamaConfig

    with pytest.raises(BuildError) as caught:
        twin(LlamaConfig(), overrides={"hidden_size": 65536, "num_attention_heads": 64})
    assert caught.value.code == "twin"
    assert caught.value.__cause__ is None, "the class itself refused it"


def test_what_names_no_model_is_a_source_error():
    with pytest.raises(SourceError):
        twin(42)
