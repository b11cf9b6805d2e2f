"""The stock PEFT configuration of a plan: exact targets, sizes that divide every layer, and the user's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.config.extras import check_extras
from graftkit.planning.config.methods import Method
from graftkit.planning.config.options import check_parameter_options
from graftkit.planning.decisions import Attached
from graftkit.planning.initializers import default_config
from graftkit.planning.matching import as_whole_path, rewritten_names, smallest_exact
from graftkit.planning.selection.patterns import rekey
from graftkit.planning.trials.skeleton import Slot, ask, method_refused, slots_of
from graftkit.surveying.sites import ModelMap, Site

if TYPE_CHECKING:
    from peft import PeftConfig


def build_config(
    model_map: ModelMap,
    attached: Sequence[Attached],
    method: Method,
    hyperparameters: Mapping[str, Any],
    options: Mapping[str, Any],
) -> PeftConfig:
    """Return the configuration that adapts exactly the ``attached`` sites.

    Args:
        hyperparameters: from ``field_values``.
        options: further fields of the configuration, as ``check_options`` accepts them.

    Raises:
        PlanError: ``expert-option`` (an option that PEFT cannot apply to a
            bare parameter), ``option-invalid`` with PEFT's own message, ``size-not-dividing``, or what
            ``check_extras``, ``rekey`` and ``default_config`` raise.
    """
    check_extras(model_map, [a.target_path for a in attached], options)
    modules = [a.site for a in attached if a.via == "target_modules"]
    parameters = [a.target_path for a in attached if a.via == "target_parameters"]
    matched = [replace(a.site, path=a.target_path) for a in attached]
    keyed = {
        name: rekey(name, value, model_map, matched)
        for name, value in options.items()
        if name.endswith("_pattern") and isinstance(value, Mapping)
    }
    fields: dict[str, Any] = {
        "task_type": model_map.model.task_type,
        "target_modules": smallest_exact(
            [site.path for site in modules],
            model_map.module_paths,
            regex_is_safe=not rewritten_names(model_map.model.model_type),
        ),
        **_following_sites(method, modules),
        **hyperparameters,
        **method.options,
        **options,
        **keyed,
        **default_config(options.get("init_lora_weights"), options),
    }
    if parameters:
        check_parameter_options(fields, parameters[0])
        # PEFT reads no regular expression here.
        fields["target_parameters"] = smallest_exact(parameters, model_map.parameter_paths, regex_is_safe=False)
    if method.dividing_field is None or method.dividing_field in hyperparameters:
        return _made(method, fields)
    return _dividing(method, fields, slots_of(model_map, modules), method.dividing_field, options)


def _made(method: Method, fields: Mapping[str, Any]) -> PeftConfig:
    try:
        return method.config_class(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise PlanError(
            "PEFT refuses this combination of options",
            where=method.config_class.__name__,
            why=str(error),
            help="change the option that the message names",
            code="option-invalid",
        ) from error


# ---- fields that follow from the sites ----


def _following_sites(method: Method, sites: Sequence[Site]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "feedforward_modules" in method.defaults:
        fields["feedforward_modules"] = _feedforward(sites)
    if "fan_in_fan_out" in method.defaults and sites and all(s.kind == "conv1d_transposed" for s in sites):
        fields["fan_in_fan_out"] = True
    return fields


def _feedforward(sites: Sequence[Site]) -> str | list[str]:
    """Return the layers whose input IA3 scales: where an MLP comes back to the model's width.

    A regular expression on the whole path: PEFT compares a list here without regard to dots.
    Source: ``peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING``.
    """
    down = [site.path for site in sites if site.role == "mlp.down"]
    if not down:
        return []
    return as_whole_path(smallest_exact(down, [site.path for site in sites]))


# ---- sizes that have to divide every layer ----


def _dividing(
    method: Method, fields: dict[str, Any], slots: Sequence[Slot], name: str, options: Mapping[str, Any]
) -> PeftConfig:
    """Return the configuration whose size divides every planned layer: PEFT's default, or the next that does.

    Raises:
        PlanError: ``size-not-dividing`` for a size that the user chose.
    """
    sizes = _dividing_sizes(method.defaults[name], slots)
    one_of_each = list({(slot.kind, slot.shape): slot for slot in slots}.values())
    why = None
    for size in [options[name]] if name in options else sizes:
        config = _made(method, {**fields, name: size})
        answer = ask(config, one_of_each)
        why = answer.refusal or answer.adjusted
        if why is None:
            return config
    if name not in options:
        raise method_refused(config, str(why))
    raise PlanError(
        f"{name}={options[name]} does not divide every planned layer",
        where=method.config_class.__name__,
        why=why,
        help=f"{name}={sizes[-1]} does, or leave it out",
        code="size-not-dividing",
    )


def _dividing_sizes(default: int, slots: Sequence[Slot]) -> list[int]:
    """Return sizes that divide the layers, PEFT's default first, best guess next.

    Some methods divide a layer's input only, others its output as well: the wider claim comes last.
    """
    inputs = gcd(*(slot.inputs for slot in slots))
    both = gcd(inputs, *(slot.outputs for slot in slots))
    return list(dict.fromkeys([default, _divisor(inputs, default), _divisor(both, default)]))


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``most``."""
    return next((n for n in range(min(number, most), 0, -1) if number % n == 0), 1)


# ---- configurations as JSON ----


def config_dict(config: PeftConfig) -> dict[str, Any]:
    """Return a PEFT configuration as JSON-ready values, sets sorted and enumerations named."""
    return {key: _plain(value) for key, value in config.to_dict().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    value = getattr(value, "value", value)  # of an enum
    return str(value) if isinstance(value, str) else value
