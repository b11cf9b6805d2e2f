"""What a weight does in its layer by its names: its own, then its wrappers', then its neighbours'."""

from __future__ import annotations

# The field's usual names. A generic leaf ("linear", "dense", "proj") is not among them: its parent decides.
_NAMES_OF_ROLE = {
    "attention.q": "q_proj query queries q wq to_q q_lin linear_q query_proj q_a_proj q_b_proj",
    "attention.k": "k_proj key k wk to_k k_lin linear_k key_proj",
    "attention.v": "v_proj value v wv to_v v_lin linear_v value_proj",
    "attention.o": "o_proj out_proj o wo to_out out_lin linear_out post",
    "attention.qkv": "qkv_proj qkv queries_keys_values query_key_value c_attn wqkv in_proj_qkv",
    "attention.kv": "kv_proj keys_values kv_a_proj_with_mqa kv_b_proj kv_a_proj kv",
    "mlp.gate": "gate_proj w1 wi_0 gate",
    "mlp.up": "up_proj w3 wi_1 fc1 wi linear_fc1 c_fc dense_h_to_4h intermediate lin1 intermediate_query ffn"
    " pwconv1 pointwise_conv1",
    "mlp.down": "down_proj w2 fc2 linear_fc2 dense_4h_to_h lin2 ffw_layer_2 ffn_output pwconv2 pointwise_conv2",
    "mlp.gate_up": "gate_up_proj input_linear",
    "router": "router",
    "ssm": "in_proj x_proj dt_proj conv1d",
}
# Names that a module of a linear and a norm can have in a linear's place, beside those that end in "_proj".
_PLURALS = ("queries", "keys_values", "queries_keys_values")
_ROLES = {name: role for role, names in _NAMES_OF_ROLE.items() for name in names.split()}
# Every role that a site can have.
ROLES = frozenset(_NAMES_OF_ROLE) | {"attention", "mlp", "expert", "embedding", "lm_head", "conv", "other"}
_ATTENTION_WORDS = ("attn", "attention")
_SSM_WORDS = ("mamba", "ssm", "linear_attn", "recurrent", "rglru")
_MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "dense_relu_dense", "densereludense", "ffw", "ff")


def is_projection(path: str) -> bool:
    """Check whether a module has a linear's usual name, so that it stands where a linear would."""
    leaf = path.lower().rpartition(".")[2]
    return leaf in _ROLES and leaf.endswith(("_proj", *_PLURALS))


def role_of(
    names: tuple[str, ...], kind: str, *, in_state_space: bool = False, beside_experts: bool = False
) -> str:
    """Return the role of the weight that goes by ``names``.

    A q/k/v/o name counts as attention only where no mixer of another kind (state space, recurrence) is its
    parent; a name that no table knows falls back to the part of the layer it lies in.

    Args:
        names: the site's paths: its own, then its wrappers', outwards.
        kind: the site's kind.
        in_state_space: whether its parent is a state-space mixer by structure, whatever its name.
        beside_experts: whether it stands beside experts, where a "gate" is a router.
    """
    if kind in {"embedding", "conv"}:
        return kind
    parts = names[-1].lower().split(".")
    leaves = [name.lower().rpartition(".")[2] for name in names]
    place = "ssm" if in_state_space else _enclosing_part(parts[:-1])
    is_gate = leaves[-1] == "gate" and beside_experts and place != "attention"
    if _has(parts[-2:], ("router",)) or is_gate:
        return "router"
    for leaf in leaves:
        if (role := _ROLES.get(leaf)) is not None:
            return _reconcile(role, place)
    return _fallback(parts, place)


def _enclosing_part(parents: list[str]) -> str | None:
    """Return the part of the layer that a module lies in, as the nearest ancestor with such a name says."""
    for part in reversed(parents):
        if _has([part], _SSM_WORDS):
            return "ssm"
        if _has([part], _ATTENTION_WORDS):
            return "attention"
        if _has([part], _MLP_WORDS) or part.startswith("expert"):
            return "mlp"
    return None


def _reconcile(role: str, place: str | None) -> str:
    area = role.partition(".")[0]
    if place == "ssm" and area in {"attention", "ssm"}:
        return "ssm"
    if place == "mlp" and area == "attention":
        return "mlp.down" if role == "attention.o" else "mlp"
    if place == "attention" and area != "attention":
        return "attention"
    return role


def _fallback(parts: list[str], place: str | None) -> str:
    # A closing projection is often just "proj"; BERT-like layers have attention.output.dense and output.dense.
    is_output = not {"output", "output_query"}.isdisjoint(parts[-2:])
    if parts[-1] in {"proj", "c_proj"} or is_output:
        closing = {"attention": "attention.o", "mlp": "mlp.down"}
        return closing.get(place or ("mlp" if is_output else ""), "other")
    return place or "other"


def _has(parts: list[str], words: tuple[str, ...]) -> bool:
    return any(word in part for part in parts for word in words)
