"""llama.cpp: which classes its converter knows, and which weights a graph multiplies past any adapter.

A graph applies adapters where it multiplies through ``build_lora_mm`` or ``build_lora_mm_id``; a plain
``ggml_mul_mat`` or ``ggml_get_rows`` of a weight does not look for one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftkit.engines.releases.python_classes import PythonClass, PythonClasses
from graftkit.engines.releases.table import ClassSupport

ENGINE = "llama_cpp"
PACKAGE = "conversion"
_WEIGHT = r"\(\s*(?:ctx0\s*,\s*)?(?:model\.layers\[\w+\]|model|layer)\.(\w+)\s*,"
_LOOKS = re.compile(rf"build_lora_mm(?:_id)?\s*{_WEIGHT}")
_RAW = re.compile(rf"ggml_(?:mul_mat|mul_mat_id|get_rows)\s*{_WEIGHT}")
_EMBEDS = re.compile(r"build_inp_embd\s*\(\s*model\.(\w+)")
_CREATED = re.compile(r"(\w+)\s*=\s*create_tensor\(tn\(LLM_TENSOR_(\w+)([^;]*);")
# The output layer of a model without one, which is the embeddings under another name.
_AGAIN = "TENSOR_DUPLICATED"
# Made by a helper, create_tensor_qkv, and not by name.
_PROJECTIONS = {"wq": "ATTN_Q", "wk": "ATTN_K", "wv": "ATTN_V", "wo": "ATTN_OUT"}


def read(root: Path) -> Mapping[str, ClassSupport]:
    """Return what the source says of each class that the converter of adapters knows.

    Args:
        root: the folder that holds ``conversion``, ``gguf-py`` and ``src``.
    """
    classes = PythonClasses(root, (PACKAGE,))
    text = frozenset(_dictionary(root / PACKAGE / "__init__.py", "TEXT_MODEL_MAP"))
    source = _Source(root)
    found = {}
    for cls in (cls for named in classes.by_name.values() for cls in named):
        arch = _arch(classes, cls)
        for name in text.intersection(_registered(cls)) if arch is not None and arch != "MMPROJ" else ():
            found[name] = source.support(cls, str(arch))
    return found


def _registered(cls: PythonClass) -> Iterable[str]:
    """Return the names that a converter's class is registered for."""
    for node in cls.node.decorator_list:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "register":
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def _arch(classes: PythonClasses, cls: PythonClass) -> str | None:
    """Return the last part of a converter's ``model_arch``, its own or inherited."""
    given = (ancestor.assigned.get("model_arch") for ancestor in classes.lineage(cls))
    return next((node.attr for node in given if isinstance(node, ast.Attribute)), None)


def _dictionary(path: Path, name: str) -> dict[str, ast.expr]:
    """Return the entries of a dictionary in a module or a class: a key's last part -> its value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            return {
                key.attr if isinstance(key, ast.Attribute) else str(getattr(key, "value", "")): value
                for key, value in zip(node.value.keys, node.value.values, strict=True)
            }
    return {}


@dataclass(frozen=True)
class _Source:
    """The graphs of llama.cpp, and how its names become transformers'."""

    root: Path

    @cached_property
    def _leaves(self) -> Mapping[str, tuple[str, ...]]:
        """Tensor, as in ``LLM_TENSOR_…`` -> the last parts of the names that the converter takes for it."""
        path = self.root / "gguf-py/gguf/tensor_mapping.py"
        every = {**_dictionary(path, "mappings_cfg"), **_dictionary(path, "block_mappings_cfg")}
        names = {tensor: ast.literal_eval(node) for tensor, node in every.items() if isinstance(node, ast.Tuple)}
        written = self._written("TENSOR_NAMES")
        python = {written[tensor]: given for tensor, given in names.items()}
        found = {tensor: python.get(text.replace("%d", "{bid}"), ()) for tensor, text in self._tensors.items()}
        return {
            tensor: tuple(dict.fromkeys(n.rpartition(".")[2] for n in given)) for tensor, given in found.items()
        }

    @cached_property
    def _tensors(self) -> Mapping[str, str]:
        """``LLM_TENSOR_…`` -> its name in files."""
        return dict(re.findall(r"\{\s*LLM_TENSOR_(\w+),\s*\"([^\"]+)\"", self._arch_text))

    @cached_property
    def _arch_text(self) -> str:
        return (self.root / "src/llama-arch.cpp").read_text(encoding="utf-8")

    def _written(self, dictionary: str) -> dict[str, str]:
        """Return a dictionary of strings in the Python package: an enum's member -> what files have for it."""
        entries = _dictionary(self.root / "gguf-py/gguf/constants.py", dictionary)
        return {member: str(node.value) for member, node in entries.items() if isinstance(node, ast.Constant)}

    @cached_property
    def _architectures(self) -> Mapping[str, str]:
        """Member of the Python package's enum of architectures -> ``LLM_ARCH_…``."""
        cpp = {text: arch for arch, text in re.findall(r"\{\s*LLM_ARCH_(\w+),\s*\"([^\"]+)\"", self._arch_text)}
        return {member: cpp[text] for member, text in self._written("MODEL_ARCH_NAMES").items() if text in cpp}

    @cached_property
    def _graphs(self) -> Mapping[str, Path]:
        """Architecture -> the file that builds its graph."""
        files = sorted((self.root / "src/models").glob("*.cpp"))
        named = (
            (re.findall(r"llama_model_(\w+)::build_arch_graph", f.read_text(encoding="utf-8")), f) for f in files
        )
        return {name: file for names, file in named for name in names}

    @cached_property
    def _classes(self) -> Mapping[str, str]:
        """``LLM_ARCH_…`` -> the architecture whose class it makes."""
        text = (self.root / "src/llama-model.cpp").read_text(encoding="utf-8")
        made = re.findall(r"((?:case LLM_ARCH_\w+:\s*)+)return new llama_model_(\w+)\(", text)
        return {arch: name for cases, name in made for arch in re.findall(r"LLM_ARCH_(\w+)", cases)}

    @cached_property
    def _shared(self) -> Mapping[str, tuple[str, ...]]:
        """Architecture -> those whose tensors or graph it uses."""
        text = (self.root / "src/models/models.h").read_text(encoding="utf-8")
        blocks = re.split(r"\nstruct llama_model_", text)[1:]
        uses = re.compile(r"llama_model_(\w+)(?:::graph|\(params\) \{\})")
        return {block.split(None, 1)[0]: tuple(dict.fromkeys(uses.findall(block))) for block in blocks}

    def support(self, cls: PythonClass, arch: str) -> ClassSupport:
        """Return what the graph of an architecture does with adapters."""
        name = self._classes.get(self._architectures.get(arch, arch), arch)
        files = [self._graphs[n] for n in (name, *self._shared.get(name, ())) if n in self._graphs]
        if not files:
            return ClassSupport(None, cls.source, arch=name)
        text = "\n".join(file.read_text(encoding="utf-8") for file in dict.fromkeys(files))
        made = {member: tensor for member, tensor, rest in _CREATED.findall(text) if _AGAIN not in rest}
        tensors = {**_PROJECTIONS, **made}
        looks = set(_LOOKS.findall(text)) | set(_EMBEDS.findall(text))
        raw = set(_RAW.findall(text))
        return ClassSupport(
            True,
            files[0].relative_to(self.root).as_posix(),
            raw=self._named(raw - looks, tensors),
            mixed=self._named(raw & looks, tensors),
            arch=name,
        )

    def _named(self, members: Iterable[str], tensors: Mapping[str, str]) -> tuple[str, ...]:
        found = (self._leaves.get(tensors.get(member, ""), ()) for member in members)
        return tuple(sorted({leaf for leaves in found for leaf in leaves}))
