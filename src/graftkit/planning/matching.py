"""How PEFT reads targets and patterns, and the smallest targets that make it read exactly the planned sites."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

# Longer than any module path; regular expressions are not run over what is longer.
LONGEST_NAME = 500
# The regular expressions that PEFT makes of a key of rank_pattern and the like, and of a name in modules_to_save.
# Sources: ``peft.utils.other.get_pattern_key``, ``peft.tuners.tuners_utils.check_target_module_exists``.
KEY_FORM = r"(.*\.)?({})$"
SAVED_FORM = r"(^|.*\.){}($|\..*)"
# More suffixes than this read worse than one regular expression.
_LONGEST_SUFFIX_LIST = 32


# ---- patterns: rank_pattern, alpha_pattern and the like ----


@functools.lru_cache(maxsize=4096)  # Python's own cache holds 512, which a pattern of full paths exceeds
def _key_matcher(key: str) -> Callable[[str], object]:
    return re.compile(KEY_FORM.format(key)).match


def key_matches(key: str, path: str) -> bool:
    """Check whether PEFT applies a key of a pattern to the module or parameter at ``path``."""
    return len(path) <= LONGEST_NAME and _key_matcher(key)(path) is not None


def value_at(pattern: Mapping[str, Any] | None, path: str, default: Any = None) -> Any:
    """Return the value that PEFT uses at ``path``: that of the first key that matches, else the default.

    Source: ``peft.utils.other.get_pattern_key``, which gives back the path itself where no key matches.
    """
    pattern = pattern or {}
    return pattern.get(next((key for key in pattern if key_matches(key, path)), path), default)


# ---- targets ----


def ends_with(path: str, name: str) -> bool:
    """Check whether ``path`` is ``name``, or ends with it after a dot."""
    return path == name or path.endswith(f".{name}")


def matched_by(targets: str | Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the paths PEFT would adapt: a string is a regular expression for the whole path, a list has suffixes.

    Source: ``peft.tuners.tuners_utils.check_target_module_exists``.
    """
    if isinstance(targets, str):
        pattern = re.compile(targets)
        return [path for path in paths if pattern.fullmatch(path)]
    wanted = set(targets)
    return [path for path in paths if any(suffix in wanted for suffix in suffixes(path))]


def suffix_finder(wanted: Collection[str]) -> Callable[[str], list[str]]:
    """Return a function that lists which of ``wanted`` a path ends with, however many they are, by look-up."""
    known = frozenset(wanted)
    depths = sorted({name.count(".") + 1 for name in known})

    def found(path: str) -> list[str]:
        parts = path.split(".")
        tails = (".".join(parts[-depth:]) for depth in takewhile(len(parts).__ge__, depths))
        return [tail for tail in tails if tail in known]

    return found


def target_matcher(fields: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a function that checks whether the targets of a configuration, with its filters, name a module.

    PEFT itself decides. It compares every module with every target, though, so that a list of full paths would
    take minutes: the targets that a path ends with are looked up first.

    Source: ``peft.tuners.tuners_utils.check_target_module_exists``.

    Args:
        fields: the configuration's fields, ``target_modules`` a regular expression, a list, or None for none.
    """
    targets = fields.get("target_modules")
    # PEFT compiles these again for every module, and Python keeps only a few hundred compiled expressions.
    saved = [re.compile(SAVED_FORM.format(name)).match for name in fields.get("modules_to_save") or ()]
    others = {**fields, "modules_to_save": None}
    is_regex = isinstance(targets, str)
    near = suffix_finder(() if is_regex else targets or ())
    filters = (fields.get(name) for name in ("exclude_modules", "layers_to_transform"))
    peft_decides = is_regex or any(value not in (None, "", [], ()) for value in filters)

    def named(path: str) -> bool:
        if len(path) > LONGEST_NAME or any(matches(path) for matches in saved):
            return False
        found = targets if is_regex else near(path)
        if not found or not peft_decides:
            return bool(found)
        return _matched_by_peft(SimpleNamespace(**{**others, "target_modules": found}), path)

    return named


def _matched_by_peft(config: SimpleNamespace, path: str) -> bool:
    # Imported here because names without filters never need PEFT, whose import takes seconds.
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, path))


def smallest_exact(planned: Sequence[str], paths: Sequence[str], *, regex_is_safe: bool = True) -> str | list[str]:
    """Return the smallest ``target_modules`` that matches ``planned`` and nothing else among ``paths``.

    A list of suffixes, else a regular expression, else the full paths. First form that is exact wins.

    Args:
        planned: module paths to match, all of them in ``paths``.
        paths: every module path of the model.
        regex_is_safe: False where PEFT rewrites a regular expression before it matches (see ``rewritten_names``).
    """
    forms: Sequence[Callable[..., str | list[str] | None]] = (_as_suffixes, _as_regex)
    for form in forms[: 2 if regex_is_safe else 1]:
        targets = form(planned, paths)
        if targets is not None and sorted(matched_by(targets, paths)) == sorted(planned):
            return targets
    return sorted(planned)


def is_all_linear(targets: object) -> bool:
    """Check whether targets are PEFT's "all-linear", in any letter case."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def as_whole_path(targets: str | Iterable[str]) -> str:
    """Return a regular expression for the whole path that matches what ``targets`` do."""
    return targets if isinstance(targets, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"


def inside_of(name: str, paths: Iterable[str]) -> list[str]:
    """Return the paths inside a module that ``name`` is, or that ends with it after a dot."""
    return [path for path in paths if f".{name}." in f".{path}"]


def whole_modules(names: Iterable[str]) -> str:
    """Return a regular expression for the modules that end with one of these names, and everything inside them."""
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(names)))})(?:\..*)?"


def rewritten_names(model_type: str | None) -> Mapping[str, str]:
    """Return leaf name -> the experts' parameter that PEFT takes it for on this model type, wherever it stands.

    On these types PEFT turns such names, and any regular expression, into ``target_parameters`` before it
    matches: a dense ``mlp.gate_proj`` would be dropped, and a regular expression loses its scope.

    Source: ``peft.utils.transformers_weight_conversion._convert_peft_config_moe``.
    """
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    if conversion.get_checkpoint_conversion_mapping(model_type) is None:
        return {}
    return dict(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def suffixes(path: str) -> list[str]:
    """Return every dotted suffix of a path, the path itself included, shortest first."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _as_suffixes(planned: Sequence[str], paths: Sequence[str]) -> list[str] | None:
    """Return the shortest suffix of each planned path that no other path shares; None where they are unwieldy."""
    wanted = set(planned)
    taken = {suffix for path in paths if path not in wanted for suffix in suffixes(path)}
    chosen: set[str] = set()
    for path in planned:
        suffix = next((s for s in suffixes(path) if s not in taken), None)
        if suffix is None or len(chosen) >= _LONGEST_SUFFIX_LIST:
            return None
        # A suffix that counts layers one by one is longer than a regular expression for all of them.
        if any(part.isdigit() for part in suffix.split(".")):
            return None
        chosen.add(suffix)
    return sorted(chosen)


# ---- regular expressions ----


def _as_regex(planned: Sequence[str], paths: Sequence[str]) -> str:
    wanted = set(planned)
    others = {_template(path) for path in paths if path not in wanted}
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in planned:
        groups[_template(path)].append(path)
    exact: list[tuple[str, ...]] = []
    for template, members in groups.items():
        exact += [_escape(template)] if template not in others else _enumerated(template, members)
    merged = _merge_at(_merge_at(exact, 1), 2)
    return "|".join(r"\.".join(parts) for parts in merged)


def _template(path: str) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in path.split("."))


def _escape(template: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(r"\d+" if part == "#" else re.escape(part) for part in template)


def _enumerated(template: tuple[str, ...], members: list[str]) -> list[tuple[str, ...]]:
    """Name the layer numbers, because others of the same template are not planned."""
    split = [member.split(".") for member in members]
    numbered = [i for i, part in enumerate(template) if part == "#"]
    if len(numbered) != 1:
        return [tuple(re.escape(part) for part in parts) for parts in split]
    at = numbered[0]
    numbers = sorted({parts[at] for parts in split}, key=int)
    escaped = [re.escape(part) for part in template]
    escaped[at] = numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"
    return [tuple(escaped)]


def _merge_at(patterns: Iterable[tuple[str, ...]], from_end: int) -> list[tuple[str, ...]]:
    """Join the patterns that differ only in the component ``from_end`` places from the end."""
    merged: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    short = [parts for parts in patterns if len(parts) < from_end]
    for parts in patterns:
        if len(parts) >= from_end:
            at = len(parts) - from_end
            merged[parts[:at], parts[at + 1 :]].append(parts[at])
    joined = [
        (*head, leaves[0] if len(leaves) == 1 else f"(?:{'|'.join(sorted(leaves))})", *tail)
        for (head, tail), leaves in merged.items()
    ]
    return joined + short
