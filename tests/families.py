"""A tiny random model of any causal-LM family that transformers has, built from its config class alone."""

from typing import Any

import torch
from tiny import VOCABULARY_SIZE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# No tiny model can be made of these by changing sizes alone, it is not tiny, or its feed-forward blocks start at zero.
UNBUILDABLE = frozenset(
    {
        "blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "gemma3n", "gemma4_assistant",
        "gemma4_unified_assistant", "gpt_neo", "lfm2_moe", "longcat_flash", "mamba2", "musicgen", "musicgen_melody",
        "qwen4_exp", "qwen4_exp_text", "reformer", "xlm", "xlstm", "zaya",
    }
)  # fmt: skip

LAYERS = 4

# What every family calls by one of these names gets this value, in the config and in the configs inside it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff", "encoder_ffn_dim",
                     "decoder_ffn_dim", "shared_intermediate_size", "prefix_dense_intermediate_size",
                     "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
                     "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_group", "num_expert_group", "n_shared_experts",
                     "num_shared_experts"), 1),
    "num_nextn_predict_layers": 0,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.1, "init_std": 0.1, "sliding_window": 64,
    "rotary_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_dt_rank": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "n_groups": 1,
    "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_mem_heads": 4, "mamba_d_ssm": 64, "chunk_size": 16, "mamba_chunk_size": 16, "use_mamba_kernels": False,
    "vocab_size_per_layer_input": VOCABULARY_SIZE, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "lru_width": 32, "attention_window_size": 64, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64,
    "query_pre_attn_scalar": 8, "use_cache": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 0,
    "vocab_size": VOCABULARY_SIZE, "is_decoder": True, "moe_layer_start_index": 0, "patch_size": 8, "image_size": 16,
}  # fmt: skip
# Where the general rule isn't enough: how layers of different kinds follow one another, and multipliers that matter.
EXTRAS: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.25},
    "granitemoeshared": {"residual_multiplier": 0.5},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
}  # fmt: skip


def family_config(model_type: str) -> PreTrainedConfig:
    """The config of a tiny model of this type."""
    return AutoConfig.for_model(model_type, **_shrunk(AutoConfig.for_model(model_type)), **EXTRAS.get(model_type, {}))


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Replacements for the values of `config` that make a model large, by the names that it uses itself."""
    names = {name for name in config.to_dict() if name in SIZES}
    changes = {name: SIZES[name] for name in names}
    if "qk_rope_head_dim" in names and "num_key_value_heads" in names:  # latent attention: no shared heads
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = {"model_type": value.model_type, **_shrunk(value)}
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            changes[name] = (kinds * LAYERS)[:LAYERS]
    return changes


def runs(model: PreTrainedModel) -> bool:
    """Whether the model itself runs with these sizes; some families want sizes that fit each other."""
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(8)[None] + 5, use_cache=False)
    except Exception:  # whatever a model of somebody else raises
        return False
    return True


def family_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in evaluation mode; the same type and seed give the same weights."""
    config = family_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()
