"""Any configuration of transformers made small: known fields are shrunk by name, the others keep defaults."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 99
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE = 32, 4, 2, 8, 40
WINDOW = 8
SPECIAL_TOKENS = range(60, VOCAB)
"""Ids of placeholders (image, video, begin of image ...); prompts are drawn below them."""

_TOKEN = re.compile(r"(token_id|token_index|token_idx|tok_id|_token|_id)s?$")

# Field name (whole) -> value, in a decoder and wherever the same name appears.
_TEXT = [
    (r"vocab_size|vocab_size_per_layer_input|padded_vocab_size|n_vocab|embedding_size_vocab", VOCAB),
    (r"hidden_size|n_embd|d_model|dim|embed_dim|word_embed_proj_dim|embedding_size|embedding_dim", HIDDEN),
    (r"emb_dim|hidden_dim|backbone_hidden_size|lru_width|input_embedding_size|hidden_size_in", HIDDEN),
    (r"(\w*_)?moe_intermediate_size|expert_dim|moe_ffn_hidden_size|expert_ffn_hidden_size", 24),
    (r"\w*intermediate_size\w*|(\w+_)?ffn_dim|n_inner|d_ff|ffn_hidden_size|\w*ffn_hidden_size", WIDE),
    (r"dim_ff|mlp_hidden_size|feed_forward_size|inner_dim|ffn_intermediate|block_ff_dim", WIDE),
    (r"num_hidden_layers|n_layers?|num_layers|num_decoder_layers|(encoder|decoder)_layers", 2),
    (r"num_attention_heads|n_heads?|(encoder|decoder)_attention_heads|num_heads|attention_heads", HEADS),
    (r"num_swa_attention_heads|swa_num_attention_heads|num_(en|de)coder_attention_heads", HEADS),
    (r"(\w+_)?head_dim|attention_head_size|d_kv|head_size|kv_channels|attention_head_dim", HEAD_DIM),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|\w+_lora_rank|\w*lora_dim", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim|v_head_dim|index_head_dim|rope_head_dim", HEAD_DIM),
    (r"index_n_heads|index_topk|index_block_size", 4),
    (r"n_routed_experts|num_(local_|routed_)?experts|moe_num_experts|num_moe_experts|n_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|num_selected_experts|moe_k|experts_per_token", 2),
    (r"num_experts_per_topk|top_k_experts|router_topk|moe_router_topk|num_zero_experts|zero_expert_num", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r"moe_layer_start_index|num_dense_layers|dense_layers|decoder_sparse_step", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length", 256),
    (r"max_length_positions|max_target_positions|max_source_positions|original_max_position_embeddings", 256),
    (r"sliding_window|sliding_window_size|attention_chunk_size|window_size|local_window_size", WINDOW),
    (r"local_attention|attention_window_size|local_attention_window", WINDOW),
    (r"linear_num_value_heads|linear_num_key_heads|linear_num_heads", 2),
    (r"linear_(key|value)_head_dim|linear_head_dim|mamba_d_head|mamba_head_dim|mamba_headdim", HEAD_DIM),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_state_size|d_state", 8),
    (r"mamba_chunk_size|chunk_size|mamba_dt_rank|time_step_rank", 8),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"mamba_d_ssm", 64),
    (r"hidden_size_per_layer_input|altup_dim|laurel_rank", HEAD_DIM),
    (r"num_global_key_value_heads|num_kv_shared_layers", 1),
    (r"num_nextn_predict_layers|mtp_num_layers|num_mtp_layers|mtp_num_hidden_layers", 0),
    (
        r"projection_dim|\w*out_hidden_size|out_dim|output_dim|projector_hidden_size|projector_hidden_dim",
        HIDDEN,
    ),
    (r"mm_hidden_size|text_hidden_size|\w*output_hidden_size|llm_hidden_size|vision_hidden_size", HIDDEN),
]
_SEEING = [
    (r"image_size|img_size|input_size|target_size|default_image_size", 32),
    (r"patch_size", 8),
    (r"window_size", 16),
    (r"hidden_size|embed_dim|d_model|width|dim|hidden_dim|embed_size", HIDDEN),
    (r"depth|num_hidden_layers|num_layers|layers|encoder_layers|num_global_layers", 2),
    (r"num_heads|num_attention_heads|heads|attention_heads|encoder_attention_heads", HEADS),
    (r"num_key_value_heads|num_query_groups", HEADS),
    (r"num_position_embeddings", 16),
    (r"position_embedding_size|init_pos_emb_\w+|pos_emb_\w+", 16),
    (r"num_mel_bins|n_mels|input_feat_size|feat_dim|input_dim|mel_bins|feature_size", 8),
    (r"num_query_tokens|num_queries|query_length|num_latents|resampler_n_latents", 4),
]
_SEEING_KEY = re.compile(
    r"vision|visual|image|vit|audio|speech|codec|qformer|encoder_config|projector|sam|dpt"
)


def role_of(key: str, role: str) -> str:
    """Whether a sub-configuration is a decoder's ("text") or of a tower ("seeing")."""
    return "seeing" if role == "seeing" or _SEEING_KEY.search(key) else "text"


class Shrinker:
    """Shrinks one configuration with all that hang below it; ids of placeholders are never given twice."""

    def __init__(self, overrides: dict[str, Any]):
        self.overrides, self.used = overrides, 0

    def shrink(self, config: PreTrainedConfig, path: str = "", role: str = "text") -> PreTrainedConfig:
        """A small configuration of the same class as a default one."""
        rules = (_SEEING if role == "seeing" else []) + _TEXT
        given: dict[str, Any] = {}
        fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
        layers = _layer_count(config)
        for name, value in fields.items():
            if isinstance(value, PreTrainedConfig):
                given[name] = self.shrink(value, f"{path}{name}.", role_of(name, role))
            elif isinstance(value, bool) or value is None or name == "qk_head_dim":
                continue
            elif isinstance(value, int):
                new = self._integer(name, value, rules)
                if new != value:
                    given[name] = new
        kinds = _kinds(fields, layers)
        if kinds:
            given |= kinds
            for name in ("num_hidden_layers", "n_layer", "num_layers"):
                if name in given:
                    given[name] = len(next(iter(kinds.values())))
        if role == "text" and fields.get("head_dim", 0) is None:
            given["head_dim"] = HEAD_DIM
        if "is_decoder" in fields:
            given["is_decoder"] = True
        given |= _key_value_heads(config, fields, role)
        given |= _rope(fields, given)
        own = {k[len(path) :]: v for k, v in self.overrides.items() if k.startswith(path)}
        given |= {k: v for k, v in own.items() if "." not in k}
        given = {k: v for k, v in given.items() if v is not REMOVE}
        return type(config)(**given)

    def _integer(self, name: str, value: int, rules: list[tuple[str, int]]) -> int:
        if name == "pad_token_id" or name.startswith("pad_token"):
            return 0
        if name.startswith("bos_token") or name == "decoder_start_token_id":
            return 1
        if name.startswith("eos_token") or name == "sep_token_id":
            return 2
        if _TOKEN.search(name):
            self.used += 1
            return SPECIAL_TOKENS[-self.used]
        for pattern, small in rules:
            if re.fullmatch(pattern, name):
                return min(small, value) if value > 0 else value
        return value


REMOVE = object()
"""In overrides: leave the field at its default."""


def _layer_count(config: PreTrainedConfig) -> int:
    try:
        return int(getattr(config, "num_hidden_layers", 0) or 0)
    except TypeError:
        return 0


def _kinds(fields: dict[str, Any], layers: int) -> dict[str, list[Any]]:
    """Per-layer lists cut to layers that show every combination of kinds, two at least, in their order."""
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == layers and layers > 2}
    if not lists:
        return {}
    rows = list(zip(*lists.values(), strict=True))
    firsts = sorted({repr(row): at for at, row in reversed(list(enumerate(rows)))}.values())[:4]
    while len(firsts) < 2:
        firsts.append(firsts[-1] + 1)
    return {name: [value[at] for at in firsts] for name, value in lists.items()}


def _key_value_heads(config: PreTrainedConfig, fields: dict[str, Any], role: str) -> dict[str, int]:
    """Two key-value heads where the default has fewer than query heads, as many as these where it has not."""
    given = {}
    # Where heads differ from layer to layer, asking for the attribute raises.
    heads = fields.get("num_attention_heads") or getattr(config, "num_attention_heads", None)
    for name in ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "n_kv_heads"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and role == "text":
            few = isinstance(heads, int) and value < heads
            given[name] = 1 if value == 1 else KV_HEADS if few else HEADS
    return given


def _rope(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Sections of M-RoPE that add up to half a head."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    sections = rope.get("mrope_section")
    if not sections:
        return {}
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    small = [max(1, half // 4)] * len(sections)
    small[-1] += half - sum(small)
    return {"rope_parameters": {**rope, "mrope_section": small}}
