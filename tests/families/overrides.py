"""What the generic shrinker can not know: fields of single model types. Dots lead into sub-configurations."""

from __future__ import annotations

from typing import Any

from .shrink import REMOVE

FLOAT32 = {"kosmos-2", "xglm", "xlnet", "xlstm"}
"""Model types whose forward takes no float64."""


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}


def _under(prefix: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in fields.items()}


_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_INKLING = {"swa_num_key_value_heads": 2, "rel_extent": 16, "sliding_window_size": 8}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_QWEN4 |= {"indexer_compress_ratio": 2, "ple_embed_dim": 32, "ngram_vocab_size_base": 99, "hc_lowrank": 8}
_MROPE = {"text_config.rope_parameters": _mrope(2, 1, 1)}
_COMPASS_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
_COMPASS = {"rope_parameters": _COMPASS_ROPE, "num_hidden_layers": 2}
_COMPASS["layer_types"] = ["sliding_attention", "full_attention"]
_STEP = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": 8}
_STEP |= {"mlp_layer_types": ["dense", "sparse"], "rope_parameters": _COMPASS_ROPE, "share_expert_dim": 24}
_STEP |= {"num_sliding_attention_heads": 4}
_CODES = {"IMGIMG" + "ABCDEFGHIJ"[n // 10] + "ABCDEFGHIJ"[n % 10] + "Z": 60 + n for n in range(16)}
_EMU3 = {f"<|visual token {n:06d}|>": 60 + n for n in range(16)} | {"<image>": 98, "<|extra_200|>": 97}
_VQ = {"vq_config.base_channels": 32, "vq_config.latent_channels": 32}
_SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SHARED["num_kv_shared_layers"] = 2
_MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}

MODEL_TYPES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {**_HYBRID, "mamba_n_heads": 8, "shared_intermediate_size": 40},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": _under("text_config", _COMPASS),
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0, "ffn_config.moe_top_k": 2},
    "mllama": {
        "text_config.num_hidden_layers": 3,
        "text_config.cross_attention_layers": [1],
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 96,
        "vision_config.num_global_layers": 1,
    },
    "voxtral": {"default": {"audio_token_id": 300}, "audio_config.intermediate_size": 128},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 32, "codec_config.num_filters": 8},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "qwen2_5_omni_thinker": {**_MROPE, "vision_start_token_id": 61, "vision_end_token_id": 60},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 61, "vision_end_token_id": 60},
    "kosmos-2": {"latent_query_num": 4},
    "chameleon": {"vocabulary_map": _CODES | {"<image>": 98}, "vq_config.num_embeddings": 16, **_VQ},
    "emu3": {"vocabulary_map": _EMU3, "vq_config.codebook_size": 16, **_VQ},
    "janus": {"vq_config.num_embeddings": 16, "vision_config.num_image_tokens": 16, **_VQ},
    "florence2": {"vision_config.embed_dim": [8, 16, 16, 32], "vision_config.depths": [1, 1, 1, 1]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "qformer_config.cross_attention_frequency": 1,
        "downsample_rate": "1/2",
    },
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "muse_spark": {
        "audio_config.num_hidden_layers": 2,
        "audio_config.patch_sizes": [4, 2],
        "audio_config.hidden_sizes": [16, 32],
        "audio_config.depths": [1, 1],
    },
    "glm5_next": {"text_config.index_topk": 16, "text_config.index_kpool": 4},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "gemma4_text": _SHARED,
    "deepseek_v2": {**_MOE, "first_k_dense_replace": 1, "num_hidden_layers": 2},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "dots1": {**_MOE, "first_k_dense_replace": 1, "layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "longcat_flash": {"num_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "time_step_rank": 8},
    "mistral4": {"head_dim": REMOVE},
    "nemotron": {"num_key_value_heads": 2},
    "inkling_text": _INKLING,
    "inkling_mm_model": _under("text_config", _INKLING),
    "inkling2_text": {**_INKLING, "unpadded_vocab_size": 99},
    "inkling2": _under("text_config", {**_INKLING, "unpadded_vocab_size": 99}),
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": _under("text_config", _QWEN4),
    "step3p7": _under("text_config", _STEP),
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "xlstm": {"num_blocks": 2, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8},
    "qwen2_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
    "paddleocr_vl": _MROPE,
    "glm4v": _MROPE,
    "glm46v": _MROPE,
    "glm_ocr": _MROPE,
    "glm4v_moe": {"text_config.rope_parameters": _mrope(1, 1, 0, partial_rotary_factor=0.5)},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _mrope(1, 1, 2)},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"default": {"vision_config": {}}, **_under("text_config", _SHARED)},
    "gemma4_unified": {"default": {"vision_config": {}}},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "llama4": {
        "vision_config.intermediate_size": 128,
        "vision_config.projector_input_dim": 32,
        "vision_config.projector_output_dim": 32,
        "vision_config.vision_output_dim": 32,
    },
    "blip-2": {"default": {"image_token_index": 300}},
    "instructblip": {"default": {"image_token_index": 300}},
    "instructblipvideo": {"default": {"video_token_index": 300}},
    "hunyuan_vl": {"text_config.rope_parameters": _mrope(1, 1, 1, 1)},
}

_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

# Another configuration of a class, where its defaults leave out what others have.
VARIANTS: dict[str, dict[str, Any]] = {
    "BertLMHeadModel (encoder)": {"is_decoder": False},
    "FalconForCausalLM (alibi)": {"alibi": True},
    "FalconForCausalLM (new decoder)": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "Gemma3ForCausalLM (bidirectional)": {"use_bidirectional_attention": True},
    "GPTBigCodeForCausalLM (many heads)": {"multi_query": False},
    "LlamaForCausalLM (dynamic rope)": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "LlamaForCausalLM (longrope)": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16,
            "factor": 8.0,
        },
    },
    "LlamaForCausalLM (sliding_window in the config)": {"sliding_window": 8},
    "MixtralForCausalLM (window)": {"sliding_window": 8},
    "Phi3ForCausalLM (window)": {"sliding_window": 8},
    "Qwen2ForCausalLM (windows)": _WINDOWS,
    "Qwen2MoeForCausalLM (windows)": _WINDOWS,
    "Qwen3ForCausalLM (windows)": _WINDOWS,
}
"""Name of the class, and in brackets what is special -> fields."""
