"""Find the module of a base model that each tensor of an adapter belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from graftkit.adapters.file import AdapterFile
from graftkit.errors import AdapterError
from graftkit.modeling.unwrapping import PEFT_PREFIX, without_base_layers
from graftkit.planning.matching import ends_with
from graftkit.surveying import kinds
from graftkit.surveying.checkpoint.safetensors_header import StoredTensor
from graftkit.surveying.sites import ModelMap, Site
from graftkit.text import and_more

_OUT, _IN = 0, 1
# Tensor of a linear's adapter -> (its axis, the side of the linear whose size that axis must have).
# Sources: the layer classes under peft.tuners (lora, loha, ia3, vera), each an nn.Linear or a parameter.
_AXES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "lora_A": (1, _IN),
        "lora_B": (0, _OUT),
        "lora_magnitude_vector": (0, _OUT),
        "hada_w1_a": (0, _OUT),
        "hada_w2_a": (0, _OUT),
        "hada_w1_b": (1, _IN),
        "hada_w2_b": (1, _IN),
        "vera_lambda_b": (0, _OUT),
    }
)
# What PEFT puts between a module and the weights that it saves beside an adapter.
_INSERTED = frozenset({"base_layer", "token_adapter", "modules_to_save", "original_module"})
_RANK_AXIS: Mapping[str, int] = MappingProxyType({"lora_A": 0, "lora_embedding_A": 0})


def trained_rows(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """Return the indices of the rows that an adapter's configuration trains in a module.

    Sources: ``peft.LoraConfig.trainable_token_indices``, ``peft.TrainableTokensConfig.token_indices``.
    """
    given = config.get("trainable_token_indices") or config.get("token_indices") or ()
    if isinstance(given, Mapping):
        given = next((rows for name, rows in given.items() if ends_with(module, name)), ())
    return tuple(int(row) for row in given)


@dataclass(frozen=True, slots=True)
class TensorPlacement:
    """One tensor, and the module that it belongs to.

    Attributes:
        name: in the file.
        new_name: the name that stock PEFT expects.
        why: the reason for the new name, or an empty string.
        module: path of the module it adapts; None if it adapts no single module (stacked experts, saved modules,
            tensors that all layers share).
        name_in_file: the module's path in the file.
        rank: the rank that the tensor's shape implies, or None.
    """

    name: str
    new_name: str
    why: str = ""
    module: str | None = None
    name_in_file: str = ""
    rank: int | None = None


def place_tensors(file: AdapterFile, model_map: ModelMap) -> tuple[TensorPlacement, ...]:
    """Find the module of every tensor.

    Raises:
        AdapterError: ``adapter-does-not-fit``: a tensor has no module, or does not fit its shape, or two tensors
            have the same place; ``adapter-config``: PEFT does not know the method.
    """
    index = ModuleIndex(model_map, _tuner_prefix(file))
    placements = []
    misfits: dict[str, str] = {}
    for name, stored in file.tensors.items():
        place = TensorPlacement(name, name) if name in file.duplicates else index.place(name, stored)
        if isinstance(place, TensorPlacement):
            placements.append(place)
        else:
            misfits[name] = place
    misfits.update(_collisions(placements))
    if misfits:
        raise _does_not_fit(misfits, file, model_map)
    return tuple(placements)


def _tuner_prefix(file: AdapterFile) -> str:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    try:
        return str(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(file.peft_type)])
    except (KeyError, ValueError):
        raise AdapterError(
            f"adapters of type {file.peft_type!r:.80} belong to no module",
            where=str(file.folder),
            why="the installed PEFT keeps no tensors in a model's layers for this type",
            help="such adapters name no modules, so there is nothing to migrate",
            code="adapter-config",
        ) from None


@dataclass(frozen=True)
class ModuleIndex:
    """The base model's modules by name."""

    model_map: ModelMap
    tuner_prefix: str

    @cached_property
    def modules(self) -> frozenset[str]:
        return frozenset(self.model_map.module_paths)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Site by each of its names: its own path, and those of its wrappers."""
        return {name: site for site in self.model_map for name in site.names if site.kind != "parameter"}

    @cached_property
    def parameter_holders(self) -> frozenset[str]:
        return frozenset(s.path.rpartition(".")[0] for s in self.model_map if s.kind == "parameter")

    def place(self, name: str, stored: StoredTensor) -> TensorPlacement | str:
        """Return the tensor's placement, or the reason why it has none."""
        if not name.startswith(PEFT_PREFIX):
            # What all layers share is stored on the tuner itself: VeRA's projections are base_model.vera_A and _B.
            shared = name.startswith("base_model.") and name.count(".") == 1
            return TensorPlacement(name, name) if shared else f"its name does not begin with {PEFT_PREFIX}"
        parts = name.removeprefix(PEFT_PREFIX).split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(self.tuner_prefix)), None)
        if not at:
            return self._beside_the_adapter(name, parts, stored)
        holder, tensor = parts[:at], parts[at:]
        # PEFT nests one layer per adapted parameter of a module, and calls the inner ones base_layer.
        core = without_base_layers(".".join(holder))
        if core in self.parameter_holders and core not in self.sites:
            return TensorPlacement(name, name)
        return self._on_site(name, core, tensor, stored)

    def site_of(self, core: str) -> Site | None:
        """Return the site that a module of the file belongs to, or None."""
        return self._site(core)[0]

    def _on_site(self, name: str, core: str, tensor: list[str], stored: StoredTensor) -> TensorPlacement | str:
        found, why = self._site(core)
        if found is None:
            return why
        if (misfit := _misfit(found, tensor[0], stored)) is not None:
            return misfit
        renamed = found.path != core
        return TensorPlacement(
            name=name,
            new_name=".".join((f"{PEFT_PREFIX}{found.path}", *tensor)) if renamed else name,
            why=why if renamed else "",
            module=found.path,
            name_in_file=core if core in self.sites else found.names[-1],
            rank=_rank(tensor[0], stored),
        )

    def _site(self, core: str) -> tuple[Site | None, str]:
        site = self.sites.get(core)
        if site is not None:
            return site, f"in the base, this linear is inside {site.wrapper.cls}" if site.wrapper else ""
        if core in self.modules:
            return None, f"{core} has no weight that can be adapted"
        # A module that the training tool inserted: one more component than the base has.
        outer = core.rpartition(".")[0]
        site = self.sites.get(outer)
        if site is not None and site.wrapper is not None:
            return site, f"the base has no {core.rpartition('.')[2]} between {outer} and its linear"
        return None, f"the base has no module {core}"

    def _beside_the_adapter(self, name: str, parts: list[str], stored: StoredTensor) -> TensorPlacement | str:
        """Place saved weights: modules to save, biases, trained tokens."""
        path = ".".join(part for part in parts[:-1] if part not in _INSERTED)
        if path not in self.modules:
            return f"the base has no module {path}"
        site = self.sites.get(path)
        if site is None or site.path != path or site.quantized or parts[-1] != "weight":
            return TensorPlacement(name, name)
        if stored.shape == site.shape:
            return TensorPlacement(name, name)
        return f"its shape is {list(stored.shape)}, and that of {path} is {list(site.shape)}"


def _misfit(site: Site, tensor: str, stored: StoredTensor) -> str | None:
    if site.kind == kinds.CONV and tensor == "lora_A":
        # All inputs, whatever its groups, and its kernel. Source: peft.tuners.lora.layer._ConvNd.update_layer.
        fits = stored.shape[1:] == (site.shape[1] * site.groups, *site.shape[2:])
    elif site.kind == kinds.EMBEDDING and tensor == "lora_embedding_A":
        fits = stored.shape[1:] == site.shape[:1]
    elif site.is_linear and tensor in _AXES:
        axis, side = _AXES[tensor]
        fits = stored.shape[axis : axis + 1] == (_sides(site)[side],)
    else:
        return None
    if fits:
        return None
    if not site.is_linear:
        return f"its shape is {list(stored.shape)}, and that of {site.path} is {list(site.shape)}"
    return f"its shape is {list(stored.shape)}, and {site.path} is {_sides(site)[_IN]} -> {_sides(site)[_OUT]}"


def _sides(site: Site) -> tuple[int, ...]:
    return site.shape if site.kind == kinds.LINEAR else site.shape[::-1]


def _rank(tensor: str, stored: StoredTensor) -> int | None:
    axis = _RANK_AXIS.get(tensor)
    return stored.shape[axis] if axis is not None and len(stored.shape) > axis else None


def _collisions(placements: Iterable[TensorPlacement]) -> dict[str, str]:
    by_name: dict[str, list[str]] = defaultdict(list)
    for placement in placements:
        by_name[placement.new_name].append(placement.name)
    return {
        n: f"it is one of {len(names)} tensors for the same module"
        for names in by_name.values()
        if len(names) > 1
        for n in names
    }


def _does_not_fit(misfits: Mapping[str, str], file: AdapterFile, model_map: ModelMap) -> AdapterError:
    trained_on = file.config.get("base_model_name_or_path") or "its config does not name it"
    listed = [f"{name}: {why}" for name, why in list(misfits.items())[:5]]
    return AdapterError(
        f"{len(misfits)} of {len(file.tensors)} tensors do not fit {model_map.model.name}",
        where=str(file.folder),
        why="; ".join(listed) + and_more(misfits, 5),
        help=f"name the base it was trained on ({trained_on})",
        code="adapter-does-not-fit",
    )
