"""Configuration fields that set a model's size, by name, and the value each has in a twin.

The names are those of transformers' configurations. A field that is not listed keeps its value, and so does one
whose value is smaller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from graftkit.surveying.structure import EXPERT_COUNTS

HIDDEN = 64
INTERMEDIATE = 128
SMALL_INTERMEDIATE = 32
HEADS = 4
HEAD_DIM = 16
VOCAB = 512
# Ids from here to the end of the vocabulary are for special tokens.
SPECIAL_IDS = VOCAB - 64

# One width for every tower keeps all projections between towers consistent.
_TO_HIDDEN = (
    "hidden_size d_model n_embd dim embed_dim embedding_size embedding_dim emb_dim hidden_dim model_dim "
    "out_hidden_size output_proj_dims projection_dim projector_hidden_size text_hidden_size "
    "decoder_hidden_size encoder_hidden_size word_embed_proj_dim output_dim pooler_output_size "
    "text_embed_dim vision_embed_dim llm_hidden_size adapter_out_dim attention_hidden_size cross_hidden_size "
    "audio_hidden_size cross_attention_hidden_size backbone_hidden_size encoder_dim decoder_dim width "
    "projector_output_dim mm_hidden_size hidden_size_global text_config_hidden_size d_embed n_state "
    "audio_output_size projection_size conv_dim tdnn_dim xvector_output_dim classifier_proj_size "
    "codevector_dim fpn_hidden_size proj_codevector_dim upsample_groups d_latents pred_hidden_size"
)
_TO_INTERMEDIATE = (
    "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim mlp_dim ffn_hidden_size d_inner "
    "intermediate_size_mlp dense_intermediate_size projector_intermediate_size mamba_d_ssm "
    "feedforward_dim feed_forward_size block_ff_dim hidden_size_ff mlp_hidden_size vision_output_dim "
    "projector_input_dim linear_units"
)
_TO_SMALL_INTERMEDIATE = (
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_dim moe_latent_size moe_ffn_hidden_size ffn_dim_expert "
    "expert_hidden_size adapter_rank lm_head_adapter_rank"
)
_TO_HEADS = (
    "num_attention_heads num_heads n_head n_heads heads encoder_attention_heads decoder_attention_heads "
    "attention_heads num_query_heads linear_num_value_heads linear_num_heads index_n_heads "
    "decoder_num_attention_heads encoder_num_attention_heads swa_num_attention_heads "
    "audio_num_attention_heads resampler_n_heads num_query_groups n_heads_text "
    "num_self_attention_heads num_cross_attention_heads pred_num_attention_heads"
)
_TO_HEAD_DIM = (
    "d_kv linear_key_head_dim linear_value_head_dim linear_head_dim qk_nope_head_dim v_head_dim "
    "index_head_dim dim_head kv_channels attention_head_dim swa_head_dim resampler_head_dim mamba_headdim "
    "mamba_d_head mamba_head_dim state_size mamba_d_state ssm_state_size rotary_dim q_lora_rank kv_lora_rank "
    "o_lora_rank d_state hidden_size_per_layer_input laurel_rank "
    "gate_low_rank_dim decay_low_rank_dim a_low_rank_dim v_low_rank_dim"
)
# Everything else that counts something, by what it becomes.
_TO_COUNT = {
    1: "topk_group num_limited_groups",
    2: (
        "zero_expert_num num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_k moe_top_k "
        "num_selected_experts n_shared_experts num_shared_experts moe_num_shared_experts n_group "
        "num_expert_group index_kpool n_groups mamba_n_groups mamba_ngroups num_mem_blocks mask_time_length"
    ),
    3: "conv_L_cache",
    4: (
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts time_step_rank "
        "mamba_dt_rank index_topk num_codebooks n_codebooks num_quantizers mm_tokens_per_image "
        "num_image_tokens query_length resampler_n_latents num_conv_pos_embedding_groups"
    ),
    8: (
        "qk_rope_head_dim mamba_chunk_size mamba_num_heads mamba_n_heads n_mamba_heads sliding_window "
        "local_attention num_queries num_filters num_latents"
    ),
    12: "attention_chunk_size",
    16: "num_conv_pos_embeddings",
    32: "max_source_positions",
    64: "audio_vocab_size codebook_size position_embedding_size num_position_embeddings max_target_positions",
    128: "n_positions max_2d_position_embeddings",
}
_TO_VOCAB = "vocab_size text_vocab_size decoder_vocab_size n_vocab vocab_size_or_config vocab_size_per_layer_input"
_NAMES_BY_TARGET = (
    (HIDDEN, _TO_HIDDEN),
    (INTERMEDIATE, _TO_INTERMEDIATE),
    (SMALL_INTERMEDIATE, _TO_SMALL_INTERMEDIATE),
    (HEADS, _TO_HEADS),
    (HEAD_DIM, _TO_HEAD_DIM),
    (VOCAB, _TO_VOCAB),
    *_TO_COUNT.items(),
)
TARGETS = {name: target for target, names in _NAMES_BY_TARGET for name in names.split()}
HEAD_COUNTS = frozenset(_TO_HEADS.split())
EXPERTS = (*EXPERT_COUNTS, "num_routed_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "num_selected_experts",
)
# What only repeats one structure, and decides no width. Groups of experts are among them: there are no more than
# experts.
REPEATS = frozenset({*_TO_VOCAB.split(), *EXPERTS, *TOP_K, "n_group", "num_expert_group", "topk_group"})

WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
EMBEDDING_WIDTHS = ("embedding_size", "word_embed_proj_dim")
LAYER_COUNTS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
    "num_global_layers",
    "depth_encoder",
    "resampler_depth",
    "num_self_attends_per_block",
    "num_spatial_layers",
    "num_temporal_layers",
    "num_auxiliary_layers",
    "num_pooler_layers",
    "pred_num_hidden_layers",
]

_TOKEN_FIELD = re.compile(r"(_token_(ids?|index|idx)|_patch_id)$")


def is_count(value: Any) -> TypeGuard[int]:
    """Check whether a value is a positive integer, which a size rule may replace."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def first_count(fields: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return the first of these names whose field is a positive integer, or None."""
    return next((name for name in names if is_count(fields.get(name))), None)


def is_token_field(name: str) -> bool:
    """Check whether a field holds the id of a special token, or a list of such ids."""
    return bool(_TOKEN_FIELD.search(name))
