"""Find what an adapter changes, by letting PEFT attach it to the model on the meta device."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.adapters.expert_layout import UNKNOWN_HELP, UNKNOWN_WHY, ExpertLayout, expert_layout
from graftkit.adapters.file import AdapterFile
from graftkit.adapters.placement import trained_rows
from graftkit.errors import MergeError
from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.changes import BiasDelta, Change, LowRank, PeftLayer, SavedRows, SavedWeight
from graftkit.merging.unsupported import rebuilds_base, refuse
from graftkit.modeling.unwrapping import PEFT_PREFIX, without_base_layers
from graftkit.planning.matching import target_matcher
from graftkit.surveying.ties import tied_names
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_ADAPTER = "default"
_TOKENS = "trainable_tokens_delta"


@dataclass(frozen=True)
class Effects:
    """One adapter's changes.

    Attributes:
        changes: parameter name -> its changes.
        weight: the factor of all updates.
    """

    tensors: AdapterTensors
    changes: Mapping[str, tuple[Change, ...]] = field(repr=False)
    weight: float

    @cached_property
    def config(self) -> PeftConfig:
        """The adapter's configuration, as PEFT reads it."""
        return read_config(self.tensors.file)


def read_effects(file: AdapterFile, model: PreTrainedModel, weight: float = 1.0) -> Effects:
    """Find what each tensor of an adapter changes.

    Args:
        file: the adapter.
        model: the base on the meta device; it is not modified.
        weight: the factor of its updates.

    Raises:
        MergeError: ``merge-does-not-fit``: a tensor belongs to no module, or a module lacks a tensor;
            ``merge-expert-layout``: nothing says how its experts lie in a tensor; one of the refusals of
            :func:`graftkit.merging.unsupported.refuse`.
    """
    config = read_config(file)
    tensors = AdapterTensors(file)
    tensors.check_not_empty()
    refuse(file, config)
    if file.peft_type == "LORA":
        adapted = attach_on_meta(model, config)
        tensors = _in_pefts_columns(_as_peft_loads(tensors, adapted), adapted)
        found = [*_lora(adapted, model, config, tensors)]
    else:
        found = [*_layers(config, model, tensors)]
    found += _saved_values(model, tensors, {name for _, change in found for name in change.tensors})
    _check_claims(found, tensors)
    if rebuilds_base(config):
        found += _moved_elsewhere(model, found)
    changes: dict[str, list[Change]] = defaultdict(list)
    for param, change in found:
        changes[param].append(change)
    return Effects(tensors, MappingProxyType({p: tuple(c) for p, c in changes.items()}), weight)


def read_config(file: AdapterFile) -> PeftConfig:
    """Read the adapter's configuration with PEFT.

    Raises:
        MergeError: ``merge-config``: the installed PEFT cannot read it.
    """
    from peft import PeftConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftConfig.from_pretrained(str(file.folder))
    except Exception as error:
        raise MergeError(
            "PEFT cannot read the adapter's configuration",
            where=str(file.folder),
            why=f"{type(error).__name__}: {error}",
            help="check the file, or install the PEFT that wrote it",
            code="merge-config",
        ) from error


def attach_on_meta(model: PreTrainedModel, config: PeftConfig, **fields: Any) -> Any:
    """Return a copy of the model to which PEFT has attached the adapter's layers, all on the meta device.

    Args:
        fields: other values of the configuration.

    Raises:
        MergeError: ``merge-does-not-fit``: PEFT rejects this configuration for this model.
    """
    import torch
    from peft import PeftModel

    # The initial values do not matter here.
    bare = layers_only(config, **{"init_lora_weights": True, **fields})
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return PeftModel(copy.deepcopy(model), bare, adapter_name=_ADAPTER)
    except Exception as error:
        raise _does_not_fit(f"PEFT rejects it: {error}") from error


def shares_rows(model: PreTrainedModel, config: PeftConfig, params: Iterable[str]) -> bool:
    """Check whether PEFT trains one set of rows for all modules that share a weight.

    Args:
        model: the base on the meta device; it is not modified.
        params: the weight's names.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    indices = getattr(config, "trainable_token_indices", None)
    adapted = attach_on_meta(model, config, trainable_token_indices=indices)
    rows = {
        f"{core_path(name).removesuffix('.token_adapter')}.weight": layer.trainable_tokens_delta[_ADAPTER]
        for name, layer in adapted.named_modules()
        if isinstance(layer, TrainableTokensLayer)
    }
    first, *others = (rows.get(param) for param in params)
    return first is not None and all(other is first for other in others)


def layers_only(config: PeftConfig, **fields: Any) -> PeftConfig:
    """Return a copy of a configuration without its task and its saved values, which are found by name.

    Args:
        config: of any tuner.
        fields: other values; those that this tuner does not have are ignored.
    """
    changed = copy.deepcopy(config)
    without = {"task_type": None, "modules_to_save": None, "trainable_token_indices": None, "inference_mode": True}
    for name, value in {**without, **fields}.items():
        if hasattr(changed, name):
            setattr(changed, name, value)
    return changed


def _as_peft_loads(tensors: AdapterTensors, adapted: Any) -> AdapterTensors:
    """Stack adapters of experts that were saved one by one, as PEFT does on loading."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    expected = {f"{name}.{leaf}" for name, layer in _lora_layers(adapted) for leaf in expected_shapes(layer)}
    lora = {name for name in tensors.shapes if ".lora_" in name}
    if lora <= expected:
        return tensors
    loaded = {name: tensors.read(name) for name in tensors.shapes}
    try:
        made = convert_peft_adapter_state_dict_for_transformers(
            adapted, adapted.peft_config[_ADAPTER], loaded, adapter_name=_ADAPTER
        )
    except Exception as error:
        raise _does_not_fit(f"PEFT cannot convert its expert tensors: {error}") from error
    new = {name: value for name, value in made.items() if name not in loaded}
    replaced = tensors.replaced | (loaded.keys() - made.keys())
    return AdapterTensors(tensors.file, MappingProxyType(new), replaced)


def _in_pefts_columns(tensors: AdapterTensors, adapted: Any) -> AdapterTensors:
    """Return the tensors with the columns of each stacked B in PEFT's order.

    Raises:
        MergeError: ``merge-expert-layout``: nothing says in which order they are.
    """
    layout = expert_layout(tensors.file.config)
    if layout is ExpertLayout.RANK_MAJOR:
        return tensors
    made = {}
    for name, layer in _lora_layers(adapted):
        rank, experts = int(layer.r[_ADAPTER]), getattr(layer, "num_experts", 1)
        b = f"{name}.lora_B.weight"
        # With one rank or one expert there is one order.
        if min(rank, experts) < 2 or tensors.shapes.get(b, ())[1:] != (rank * experts,):
            continue
        if layout is ExpertLayout.UNKNOWN:
            raise _unknown_layout(b)
        stored = tensors.read(b)
        made[b] = stored.view(len(stored), experts, rank).transpose(1, 2).reshape(stored.shape)
    converted = MappingProxyType({**tensors.converted, **made})
    return AdapterTensors(tensors.file, converted, tensors.replaced | made.keys())


def _unknown_layout(tensor: str) -> MergeError:
    return MergeError(
        "it is not known which columns of a tensor belong to which expert",
        where=tensor,
        why=UNKNOWN_WHY,
        help=UNKNOWN_HELP,
        code="merge-expert-layout",
    )


def _lora_layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.scaling:
            yield name, module


def expected_shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that PEFT saves for a LoRA layer, by their names in the layer."""
    shapes = {}
    for key, tensor in layer.state_dict().items():
        kind, of_adapter, rest = key.partition(f".{_ADAPTER}")
        if of_adapter and kind.startswith("lora_"):
            shapes[kind if kind == "lora_magnitude_vector" else kind + rest] = tuple(tensor.shape)
    return shapes


def _lora(
    adapted: Any, model: PreTrainedModel, config: Any, tensors: AdapterTensors
) -> Iterator[tuple[str, Change]]:
    """Yield the changes of every LoRA layer."""
    layers = dict(_lora_layers(adapted))
    if not layers:
        raise _does_not_fit("its targets match no module")
    through_peft = rebuilds_base(config)
    for name, layer in layers.items():
        core = core_path(name)
        expected = {f"{name}.{leaf}": shape for leaf, shape in expected_shapes(layer).items()}
        missing = [n for n in expected if n not in tensors.shapes]
        if missing and f"{name}.weight" in tensors.shapes and core.endswith(tuple(config.modules_to_save or ())):
            continue  # trained whole: PEFT then puts no adapter on it
        if missing:
            raise _does_not_fit(f"it has no {missing[0]}")
        own = tuple(n for n in tensors.shapes if n.startswith(f"{name}.lora_"))
        # A weight that the file holds as it was after an initializer moved it is loaded like that.
        moved = through_peft and f"{name}.base_layer.weight" not in tensors.shapes
        if moved or not _is_plain(layer) or set(own) != set(expected):
            yield from _through_peft(model, core, own)
            continue
        for tensor, shape in expected.items():
            if tensors.shapes[tensor] != shape:
                raise _does_not_fit(f"{tensor} is {list(tensors.shapes[tensor])}, and {core} takes {list(shape)}")
        yield from _one_lora(name, core, layer)


def core_path(name: str) -> str:
    """Return the path in the base of a module that PEFT has wrapped."""
    return without_base_layers(name.removeprefix(PEFT_PREFIX))


def _is_plain(layer: Any) -> bool:
    """Check whether the layer is plain LoRA or DoRA."""
    variant = layer.lora_variant.get(_ADAPTER)
    kind = variant if isinstance(variant, type) else type(variant)
    return variant is None or kind.__name__.startswith("Dora")


def _one_lora(name: str, core: str, layer: Any) -> Iterator[tuple[str, Change]]:
    from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper

    rank, scale = int(layer.r[_ADAPTER]), float(layer.scaling[_ADAPTER])
    magnitude = f"{name}.lora_magnitude_vector" if _ADAPTER in layer.lora_magnitude_vector else None
    a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    if isinstance(layer, ParamWrapper):
        stacked = layer.get_param().dim() == 3
        experts = layer.num_experts if stacked else 0
        flip = stacked and not layer._did_swap_in_out_features
        yield f"{core}.{layer.parameter_name}", LowRank(a, b, rank, scale, experts, flip)
    elif isinstance(layer, Embedding):
        a, b = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
        yield f"{core}.weight", LowRank(a, b, rank, scale, flip=True, magnitude=magnitude)
    elif isinstance(layer, MultiheadAttention):
        yield f"{core}.in_proj_weight", LowRank(a, b, rank, scale)
    else:
        _check_convolution(core, layer)
        flip = bool(getattr(layer, "fan_in_fan_out", False))
        yield f"{core}.weight", LowRank(a, b, rank, scale, flip=flip, magnitude=magnitude)
    if layer.lora_bias[_ADAPTER]:
        if getattr(layer.get_base_layer(), "bias", None) is None:
            raise MergeError(
                "the adapter has a bias where the base has none",
                where=core,
                why="lora_bias=True on a layer without one: its bias has nowhere to go",
                help="serve the adapter unmerged, or train it without lora_bias",
                code="merge-no-bias",
            )
        yield f"{core}.bias", BiasDelta(f"{name}.lora_B.bias", scale)


def _check_convolution(core: str, layer: Any) -> None:
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise MergeError(
            "an adapter on a grouped convolution cannot be merged",
            where=core,
            why="its update mixes the groups, which the convolution keeps apart",
            help="serve the adapter unmerged, or train it without this layer (exclude_modules)",
            code="merge-grouped-convolution",
        )


def shares_state(config: Any) -> bool:
    """Check whether the tuner's layers share values, so that none can be built without the others."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    said = getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "uses_shared_state", False)
    # Projections that are drawn at random once, sized for the largest layer.
    return bool(said) or hasattr(config, "projection_prng_key")


def _layers(config: Any, model: PreTrainedModel, tensors: AdapterTensors) -> Iterator[tuple[str, Change]]:
    """Yield the changes of another tuner: by its tensors' names, or by its targets where layers share tensors."""
    own = _own_tensors(config, tensors)
    if shares_state(config):
        every = tuple(name for names in own.values() for name in names)
        own = dict.fromkeys(_targeted(config, model), every)
    for path, names in own.items():
        yield from _through_peft(model, path, names)


def _own_tensors(config: Any, tensors: AdapterTensors) -> dict[str, tuple[str, ...]]:
    """Return the names of each module's tensors; those that all layers share are under the path ""."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    own: dict[str, list[str]] = defaultdict(list)
    for name in tensors.shapes:
        parts = name.removeprefix(PEFT_PREFIX).split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(prefix)), None)
        if not name.startswith(PEFT_PREFIX):
            own[""].append(name)
        elif at is not None and not name.endswith(_TOKENS):
            own[core_path(".".join(parts[:at]))].append(name)
    return {path: tuple(names) for path, names in own.items()}


def _targeted(config: Any, model: PreTrainedModel) -> Iterator[str]:
    """Yield the modules that PEFT matches as targets."""
    matches = target_matcher(vars(config))
    for path, module in model.named_modules():
        if path and not list(module.children()) and matches(path):
            yield path


def _through_peft(model: PreTrainedModel, path: str, names: tuple[str, ...]) -> Iterator[tuple[str, Change]]:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise _does_not_fit(f"the base has no module {path}") from None
    for part, _ in module.named_parameters():
        yield f"{path}.{part}", PeftLayer(path, part, names)


def _saved_values(
    model: PreTrainedModel, tensors: AdapterTensors, claimed: set[str]
) -> Iterator[tuple[str, Change]]:
    """Yield saved weights (modules to save, biases, embeddings) and trained rows."""
    state = model.state_dict(keep_vars=True)
    for name, shape in tensors.shapes.items():
        if name in claimed:
            continue
        param = core_path(name).replace(".token_adapter.", ".")
        if param.endswith(f".{_TOKENS}"):
            module = param.removesuffix(f".{_TOKENS}")
            rows, param = trained_rows(tensors.file.config, module), f"{module}.weight"
            if param not in state or shape != (len(rows), *state[param].shape[1:]):
                continue
            if max(rows) >= len(state[param]):
                raise _resized(param, f"row {max(rows)}", f"{len(state[param])} rows")
            yield param, SavedRows(name, rows)
            continue
        if param not in state:
            continue
        if shape != tuple(state[param].shape):
            raise _resized(param, str(list(shape)), str(list(state[param].shape)))
        yield param, SavedWeight(name)


def _moved_elsewhere(model: PreTrainedModel, found: Iterable[tuple[str, Change]]) -> list[tuple[str, Change]]:
    """Return the changes to modules that share a weight which the initializer moved: PEFT saves it once, and loads
    it into what they share. Source: ``peft.tuners.lora.layer.LoraLayer.pissa_init``, which writes into it.
    """
    saved = {param: change for param, change in found if isinstance(change, SavedWeight)}
    elsewhere: list[tuple[str, Change]] = []
    for names in tied_names(model):
        moved = [saved[name] for name in names if name in saved and ".base_layer." in saved[name].tensor]
        elsewhere += [(name, change) for change in moved for name in names if name not in saved]
    return elsewhere


def _check_claims(found: list[tuple[str, Change]], tensors: AdapterTensors) -> None:
    claimed: dict[str, list[Change]] = defaultdict(list)
    for _, change in found:
        for name in change.tensors:
            claimed[name].append(change)
    unclaimed = [name for name in tensors.shapes if name not in claimed]
    if unclaimed:
        raise _does_not_fit(f"{some(unclaimed, 1)} belong to no module of the base")
    ambiguous = [n for n, by in claimed.items() if len(by) > 1 and not all(isinstance(c, PeftLayer) for c in by)]
    if ambiguous:
        raise _does_not_fit(f"{ambiguous[0]} belongs to two modules")


def _resized(param: str, trained: str, base: str) -> MergeError:
    return MergeError(
        "a weight in the adapter has another size than in the base",
        where=param,
        why=f"{trained} in the adapter, {base} in the base: the vocabulary was resized for training",
        help="resize the base too: model.resize_token_embeddings(n), save_pretrained(), and merge onto that",
        code="merge-resized",
    )


def _does_not_fit(why: str) -> MergeError:
    return MergeError(
        "the adapter does not fit this base",
        why=why,
        help="name the base it was trained on; where another tool made it, graft convert ADAPTER OUT --to peft "
        "--base BASE gives its tensors PEFT's names, and gk.migrate(adapter, base, out) those of wrapped linears",
        code="merge-does-not-fit",
    )
