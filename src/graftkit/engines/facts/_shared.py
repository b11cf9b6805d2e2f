"""Facts that several engines have in common."""

from packaging.specifiers import SpecifierSet

from graftkit.engines.base import Fact, Feature, Remedy, Stance

_ALL = SpecifierSet()
_ACTIVATED = "serve it with an engine that knows activated LoRA (llama.cpp); it cannot be merged"
# What a merge refuses too: `graftkit.merging.unsupported`.
_UNMERGED = {
    Feature.NO_WEIGHTS: "serve it with PEFT; it cannot be merged",
    Feature.ALORA: _ACTIVATED,
    Feature.REPLICATION: "serve it with PEFT; it cannot be merged",
    Feature.QALORA: "serve it with PEFT; it cannot be merged",
}


def refuses_unmerged(feature: Feature, says: str, source: str, versions: SpecifierSet = _ALL) -> Fact:
    """Return the fact that an engine refuses what cannot be merged either."""
    return Fact(feature, Stance.REFUSES, says, source, versions, help=_UNMERGED[feature])


def ignores_moved_base(source: str, versions: SpecifierSet = _ALL) -> Fact:
    """Return the fact that an engine adds a LoRA to the original base, whatever its initializer did to it."""
    says = "adds B·A to the original base, which is not the one it was trained on"
    return Fact(Feature.MOVED_BASE, Stance.IGNORES, says, source, versions, remedy=Remedy.CONVERT)


def ignores_invocation_tokens(source: str, versions: SpecifierSet = _ALL) -> Fact:
    """Return the fact that an engine runs an activated LoRA as if it were a plain one."""
    says = "ignores invocation tokens, so the adapter acts on the whole prompt"
    return Fact(Feature.ALORA, Stance.IGNORES, says, source, versions, help=_ACTIVATED)


def ignores_patterns(source: str, versions: SpecifierSet = _ALL) -> tuple[Fact, Fact]:
    """Return the facts that an engine scales every layer by the configuration's own alpha and rank."""
    says = "scales every layer by lora_alpha / r"
    rank, alpha = Feature.RANK_PATTERN, Feature.ALPHA_PATTERN
    return (
        Fact(rank, Stance.IGNORES, says, source, versions, remedy=Remedy.CONVERT),
        Fact(alpha, Stance.IGNORES, says, source, versions, remedy=Remedy.CONVERT),
    )
