"""Configuration -> the class that its model is loaded into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError, MissingDependencyError
from graftkit.surveying.sources.load_config import LoadedConfig
from graftkit.surveying.sources.remote_code import remote_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The task heads to try, the most general generative one first. A configuration that names its own
# architecture never reaches this list.
_AUTO_CLASSES = (
    "AutoModelForMultimodalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForCTC",
    "AutoModelForImageClassification",
    "AutoModelForTextRecognition",
    "AutoModel",
)


def model_class_of(loaded: LoadedConfig) -> type[PreTrainedModel]:
    """Return the class to load a model into: its own code's where that may run, else transformers'.

    Raises:
        SourceError: ``remote-code-failed``.
        BuildError: ``no-model-class``.
        MissingDependencyError: the class needs a package that is not installed.
    """
    return remote_model_class(loaded) or model_class_for(loaded.config)


def model_class_for(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the installed transformers that ``config`` would be loaded into.

    The first of ``config.architectures`` that transformers has, else the first task in a fixed order that
    knows the configuration's type.

    Raises:
        BuildError: ``no-model-class``.
        MissingDependencyError: the class needs a package that is not installed.
    """
    import transformers

    for name in config.architectures or ():
        named: Any = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    for auto_name in _AUTO_CLASSES:
        chosen = _mapped(getattr(transformers, auto_name)._model_mapping, type(config))
        if chosen is not None:
            return _there(chosen[0] if isinstance(chosen, tuple) else chosen, config)
    raise BuildError(
        f"no model class of transformers {transformers.__version__} takes {type(config).__name__}",
        where=config.model_type,
        why="the configuration names no architecture, and no auto class maps its type",
        help="pass the model itself: gk.survey(model)",
        code="no-model-class",
    )


def _mapped(mapping: Any, config_class: type[PretrainedConfig]) -> Any:
    """Return what an auto class's lazy mapping has for a configuration class, None where it has nothing.

    It is looked up by its name, which a stranger's class may share; ``keys()`` would tell them apart, and
    imports every family of the mapping for it, which takes half a second.
    """
    if not _is_listed(config_class) and config_class not in mapping.keys():  # noqa: SIM118 (`in` tests names)
        return None
    try:
        return mapping[config_class]
    except (KeyError, ValueError):
        # ValueError: some of its entries name a class that their module does not export.
        return None


def _is_listed(config_class: type[PretrainedConfig]) -> bool:
    """Check whether a class is the one that transformers itself has for one of its model types."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = (kind for kind, name in CONFIG_MAPPING_NAMES.items() if name == config_class.__name__)
    return any(CONFIG_MAPPING[kind] is config_class for kind in types)


def _there(chosen: Any, config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return a class, unless it is transformers' stand-in for one whose packages are not installed."""
    from transformers.utils.import_utils import DummyObject

    if isinstance(chosen, DummyObject):
        needed = ", ".join(chosen._backends)
        raise MissingDependencyError(
            f"{chosen.__name__} needs {needed}, which is not installed",
            where=config.model_type,
            why="transformers has this class only where these packages can be imported",
            help=f"install {needed}",
        )
    return chosen  # type: ignore[no-any-return]


def remote_model_class(loaded: LoadedConfig) -> type[PreTrainedModel] | None:
    """Return the model class that a model's own code defines, None where it brings none or it may not run.

    Of the classes that ``auto_map`` names, the one that ``config.architectures`` names too, else the first
    one for a task, else ``AutoModel``'s.

    Raises:
        SourceError: ``remote-code-failed``, where the code cannot be fetched or run.
    """
    auto_map = getattr(loaded.config, "auto_map", None)
    if loaded.code is None or not isinstance(auto_map, dict):
        return None
    tasks_first = sorted(auto_map, key=lambda name: name == "AutoModel")
    offered = [auto_map[name] for name in tasks_first if name.startswith("AutoModel")]
    offered = [reference for reference in offered if isinstance(reference, str)]
    if not offered:
        return None
    wanted = set(loaded.config.architectures or ())
    reference = next((ref for ref in offered if ref.rpartition(".")[2] in wanted), offered[0])
    return remote_class(reference, loaded.code, loaded.revision)  # type: ignore[no-any-return]
