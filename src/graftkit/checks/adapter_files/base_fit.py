"""How a saved adapter fits a base: which of its tensors have a place there, and which stock PEFT leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from graftkit.adapters.placement import ModuleIndex, trained_rows
from graftkit.checks.adapter_files.saved_adapter import SavedAdapter
from graftkit.modeling.unwrapping import PEFT_PREFIX
from graftkit.planning.matching import rewritten_names
from graftkit.surveying.sites import ModelMap, Site

_TOKENS = ".trainable_tokens_delta"


@dataclass(frozen=True)
class BaseFit:
    """A saved adapter and the base to load it on."""

    saved: SavedAdapter
    base: ModelMap

    @cached_property
    def _index(self) -> ModuleIndex:
        assert self.saved.prefix is not None
        return ModuleIndex(self.base, self.saved.prefix)

    @property
    def sites(self) -> Mapping[str, Site]:
        """Sites by each of their names: their own path and those of their wrappers."""
        return self._index.sites

    @cached_property
    def adapted(self) -> tuple[tuple[str, Site], ...]:
        """Module in the file, and the site that it belongs to; those that belong to none are left out."""
        found = ((core, self._index.site_of(core)) for core in self.saved.modules)
        return tuple((core, site) for core, site in found if site is not None)

    def holds_parameters(self, core: str) -> bool:
        """Check whether the module holds parameters that can be adapted, such as stacked experts."""
        return core in self._index.parameter_holders

    @cached_property
    def wrapped(self) -> tuple[str, ...]:
        """The paths of the wrappers that the saved targets name."""
        return tuple(name for name in self.base.inner if self.saved.targets and self.saved.matches(name))

    @cached_property
    def planned(self) -> tuple[str, ...]:
        """The paths of the sites that the saved targets reach; a wrapper's name counts for the linear inside."""
        reached = [p for p in self.base.module_paths if self.saved.matches(p) and not self._rewritten(p)]
        paths = {self.base.inner[path].path if path in self.base.inner else path for path in reached}
        if self.saved.file.config.get("ensure_weight_tying"):
            # Source: peft.tuners.lora.model.LoraModel._add_targets_to_tie.
            paths |= {other for path in paths if path in self.sites for other in self.sites[path].tied_to}
        return tuple(path for path in self.base.module_paths if path in paths and path in self.sites)

    def _rewritten(self, path: str) -> bool:
        """Check whether PEFT, loading the adapter, takes this module's target for one of stacked experts.

        Source: ``peft.utils.transformers_weight_conversion._convert_peft_config_moe``.
        """
        return self.saved.file.peft_type == "LORA" and path.rpartition(".")[2] in self.rewritten

    @cached_property
    def rewritten(self) -> Mapping[str, str]:
        """Leaf name that PEFT takes for stacked experts on this base -> their parameter."""
        return rewritten_names(self.base.model.model_type)

    @cached_property
    def lost(self) -> Mapping[str, str]:
        """Tensor -> why stock PEFT leaves it out when it loads the adapter on this base."""
        planned = frozenset(self.planned) if self.saved.targets is not None else None
        return {name: why for name in self.saved.file.tensors if (why := self._why_lost(name, planned))}

    def _why_lost(self, name: str, planned: frozenset[str] | None) -> str:
        core = self.saved.module_of(name)
        if name in self.saved.file.duplicates or (core is not None and self._is_one_expert(core)):
            return ""
        place = self._index.place(name, self.saved.file.tensors[name])
        if isinstance(place, str):
            return place
        if place.new_name != name:
            return place.why
        if name.endswith(_TOKENS):
            return self._rows_beyond(name.removeprefix(PEFT_PREFIX).removesuffix(_TOKENS))
        if ".modules_to_save." in name:
            return "PEFT loads saved modules without modules_to_save in the name"
        if core is None or planned is None or core in self.saved.parameters or place.module in planned:
            return ""
        if place.module is None:
            return f"no target names a parameter of {core}"
        if self._rewritten(place.module):
            return f"PEFT takes the target {place.module.rpartition('.')[2]} for stacked experts on this base"
        return f"no target names {place.module}"

    def _rows_beyond(self, module: str) -> str:
        """Return which trained row the base does not have, or an empty string."""
        module = module.removesuffix(".token_adapter")
        last = max(trained_rows(self.saved.file.config, module), default=-1)
        site = self.sites.get(module)
        if site is None or last < site.shape[0]:
            return ""
        return f"it has values for row {last}, and {module} has {site.shape[0]} rows"

    def _is_one_expert(self, core: str) -> bool:
        """Check whether PEFT, loading the adapter, stacks this tensor with those of the other experts."""
        parts = core.split(".")
        return (
            len(parts) > 2
            and parts[-1] in self.rewritten
            and parts[-2].isdigit()
            and ".".join(parts[:-2]) in self._index.parameter_holders
        )

    def has_place(self, name: str, renamed: str | None = None) -> bool:
        """Check whether the base has a place of the tensor's shape under its name, or under another one."""
        return not isinstance(self._index.place(renamed or name, self.saved.file.tensors[name]), str)
