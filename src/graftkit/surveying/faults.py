"""Faults of PEFT and transformers that an adapter on a model would meet, each with its page in docs/upstream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn


class _Adaptable(Protocol):
    """What is read of a site (``graftkit.surveying.sites.Site``)."""

    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def adaptable(self) -> bool: ...


class Fault(Enum):
    """A fault of another project: the page that reports it, and what people read."""

    RENAMED_ON_RELOAD = (
        "peft_renames_saved_keys",
        "PEFT saves the adapter whole, and drops these tensors when it loads it",
    )
    NO_INPUT_EMBEDDINGS = (
        "peft_asks_for_input_embeddings",
        "PEFT alone attaches and loads an adapter only while model.config.tie_word_embeddings is False: it asks "
        "for input embeddings, and the model's class does not say where they are",
    )

    @property
    def page(self) -> str:
        """The page, from the root of graftkit's repository."""
        return f"docs/upstream/{self.value[0]}.md"

    @property
    def says(self) -> str:
        """What happens, as a sentence without its full stop."""
        return self.value[1]

    @property
    def of_lora_alone(self) -> bool:
        """Whether only LoRA meets it; PEFT converts the names of no other method."""
        return self is Fault.RENAMED_ON_RELOAD


@dataclass(frozen=True, slots=True)
class FoundFault:
    """A fault that a model has, and the paths of the sites that it touches."""

    fault: Fault
    sites: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "fault": self.fault.name.lower(),
            "page": self.fault.page,
            "says": self.fault.says,
            "sites": list(self.sites),
        }


def find_faults(model: nn.Module, sites: Iterable[_Adaptable]) -> tuple[FoundFault, ...]:
    """Return the known faults that adapters on this model would meet, with the sites that each touches."""
    adaptable = [site for site in sites if site.adaptable]
    found = {
        Fault.RENAMED_ON_RELOAD: tuple(_lost_on_reload(model, adaptable)),
        Fault.NO_INPUT_EMBEDDINGS: tuple(s.path for s in adaptable) if hides_input_embeddings(model) else (),
    }
    return tuple(FoundFault(fault, paths) for fault, paths in found.items() if paths)


def _lost_on_reload(model: nn.Module, sites: list[_Adaptable]) -> Iterator[str]:
    """Yield the sites whose saved LoRA tensors PEFT renames when it loads them, so that they fit no module.

    PEFT reads its own names as those of an original checkpoint. It is asked for one layer of each kind: names
    differ in numbers alone from layer to layer.
    """
    examples = {re.sub(r"\d+", "0", site.path): site for site in reversed(sites)}
    lost = set(_renamed(model, [_saved_under(site) for site in examples.values()]))
    kinds = {kind for kind, site in examples.items() if _saved_under(site) in lost}
    return (site.path for site in sites if re.sub(r"\d+", "0", site.path) in kinds)


def _saved_under(site: _Adaptable) -> str:
    """Return the name in the model of the first LoRA tensor that PEFT saves for a site.

    For a parameter it is that of the module that holds it; of several parameters' in one module, the outer one's.
    """
    if site.kind == "embedding":
        return f"{site.path}.lora_embedding_A"
    holder = site.path.rpartition(".")[0] if site.kind == "parameter" else site.path
    return f"{holder}.lora_A.weight"


def _renamed(model: nn.Module, names: list[str]) -> Iterator[str]:
    """Yield the names of LoRA tensors in the model that PEFT does not find again after it has read them."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not _renames_any(model, names):
        return iter(())
    import torch
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # a PEFT that renames nothing
        return iter(())
    saved = {f"base_model.model.{name}": torch.empty(1, 1, device="meta") for name in names}
    read = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), saved)
    return (name for name in names if f"base_model.model.{name}" not in read)


def _renames_any(model: Any, names: list[str]) -> bool:
    """Check without PEFT whether transformers' own renamings of checkpoint keys change any of these names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return any(renaming.rename_source_key(name)[0] != name for name in names for renaming in renamings)


def hides_input_embeddings(model: Any) -> bool:
    """Check whether PEFT will ask for input embeddings that the model's class does not name.

    Source: ``peft.utils.other._get_module_names_tied_with_embedding``.
    """
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return False
    if not isinstance(getattr(model, "_tied_weights_keys", None), dict):
        return False
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        return True
    return False
