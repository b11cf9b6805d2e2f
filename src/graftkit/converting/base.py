"""The base that an adapter belongs to, for a conversion: names and shapes; weights only where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.converting.delta import Slice
from graftkit.errors import SourceError
from graftkit.merging.checkpoint.base import Base, read_base
from graftkit.merging.checkpoint.block_map import Block, find_blocks, matrix_shape
from graftkit.merging.checkpoint.weight_conversion import Group, group_weights
from graftkit.surveying import kinds
from graftkit.surveying.checkpoint.keys import stored_shapes
from graftkit.surveying.sites import ModelMap, Note, Site
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.survey import survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ConvertBase:
    """A base by its configuration.

    Attributes:
        source: as the user named it.
        model: on the meta device.
        options: how it is loaded: ``trust_remote_code``, ``revision``.
    """

    source: str
    model: PreTrainedModel = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)

    @cached_property
    def model_map(self) -> ModelMap:
        return survey(self.model)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by name, those that are tied included."""
        return {name: tuple(t.shape) for name, t in self.model.state_dict(keep_vars=True).items()}

    @property
    def architecture(self) -> str:
        """The class name that engines look up: the configuration's, else the class's own."""
        return str((self.model.config.architectures or [type(self.model).__name__])[0])

    @cached_property
    def weights(self) -> Base:
        """The base with its weight files.

        Raises:
            SourceError: they are not on this machine, or lack weights.
            MergeError: ``merge-quantized-base``.
        """
        return read_base(self.source, **self.options)

    def site(self, parameter: str) -> Site | None:
        """Return the site of a parameter, None where no adapter goes."""
        module = parameter.rpartition(".")[0]
        return self.model_map.by_path.get(parameter) or self.model_map.by_path.get(module)

    def is_stacked(self, parameter: str) -> bool:
        """Check whether a parameter is one matrix per expert."""
        shape = self.shapes.get(parameter, ())
        site = self.model_map.by_path.get(parameter)
        return len(shape) == 3 and site is not None

    def inputs_first(self, parameter: str) -> bool:
        """Check whether a parameter holds its matrix, or each of its experts' matrices, as (in, out).

        Source: ``is_transposed`` as ``peft.tuners.lora.layer.ParamWrapper.update_layer`` reads it.
        """
        if self.is_stacked(parameter):
            module = self.model.get_submodule(parameter.rpartition(".")[0])
            return bool(getattr(module, "is_transposed", False))
        site = self.site(parameter)
        return site is not None and site.kind in {kinds.EMBEDDING, kinds.TRANSPOSED}

    def matrix(self, parameter: str) -> tuple[int, int]:
        """Return (out, in) of a parameter's matrix, or of each expert's; an embedding's are (width, tokens)."""
        _, height, width = matrix_shape(self.shapes[parameter], self.is_stacked(parameter))
        return (width, height) if self.inputs_first(parameter) else (height, width)

    def makes_values(self, parameter: str) -> bool:
        """Check whether a key projection makes its layer's values too."""
        site = self.site(parameter)
        return site is not None and site.note is Note.KEY_IS_VALUE

    @cached_property
    def on_disk(self) -> Mapping[str, tuple[Slice, ...]]:
        """Checkpoint name -> the slices that it holds, in order; several for a tensor of all experts.

        These are the names of the checkpoints that are published: transformers' own, turned back.
        """
        found: dict[str, tuple[Slice, ...]] = {}
        stored = {
            k: shape for keys in stored_shapes(self.model, self.shapes).values() for k, shape in keys.items()
        }
        for group in group_weights(self.model, stored).of_param.values():
            found |= self._slices(group, stored)
        return found

    def _slices(self, group: Group, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Slice, ...]]:
        """Return the slices in each checkpoint tensor of a group; none where it does not hold whole rows."""
        disk = {name: stored[name] for name in group.disk}
        shapes = {name: self.shapes[name] for name in group.params}
        stacked = any(map(self.is_stacked, group.params))
        layouts = find_blocks(group, self.model, disk, shapes, stacked)
        if layouts is None:
            return {}
        return {name: tuple(self._slice(block) for block in layout.blocks) for name, layout in layouts.items()}

    def _slice(self, block: Block) -> Slice:
        stacked = self.is_stacked(block.param)
        if self.site(block.param) is None:
            return Slice(block.param)
        outs = block.ins if self.inputs_first(block.param) else block.outs
        is_all = outs == range(self.matrix(block.param)[0])
        return Slice(block.param, block.at if stacked else None, None if is_all else outs)

    @cached_property
    def disk_names(self) -> Mapping[str, tuple[tuple[str, Slice], ...]]:
        """Parameter -> the checkpoint names that hold parts of it, each with one part."""
        found: dict[str, list[tuple[str, Slice]]] = {}
        for name, slices in self.on_disk.items():
            for at in slices:
                found.setdefault(at.parameter, []).append((name, at))
        return {name: tuple(parts) for name, parts in found.items()}


def open_convert_base(
    source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> ConvertBase:
    """Read a base's configuration and build its model on the meta device.

    Raises:
        SourceError, BuildError: it names no model, or none that can be built.
    """
    loaded = load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    model = build_on_meta(loaded.config, model_class_of(loaded))
    return ConvertBase(str(source), model, {"trust_remote_code": trust_remote_code, "revision": revision})


def convert_base_of(source: object, found: ModelMap, options: Mapping[str, Any]) -> ConvertBase:
    """Return the base that was surveyed, from what the user named or, of a live model, its configuration.

    Args:
        source: what was surveyed, or the map itself.
        found: its map.
        options: ``trust_remote_code`` and ``revision``.

    Raises:
        SourceError: ``not-found``: only a map of a live model is left of it.
    """
    from transformers import PreTrainedModel

    if isinstance(source, PreTrainedModel):
        return ConvertBase(found.model.name, build_on_meta(source.config, type(source)), options)
    if found.model.origin == "live model":
        raise SourceError(
            "the base of a converted adapter has to be named",
            where=found.model.name,
            why="its configuration is needed, and a map of a live model has none",
            help="name its folder, its config.json or its hub id",
            code="not-found",
        )
    return open_convert_base(found.model.name, **options)
