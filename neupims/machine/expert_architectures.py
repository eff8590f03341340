"""The dimensions of architectures with experts, by the names of their `config.json`.

Each function takes the values of the file and returns fields of `Decoder`.

Source: as in `neupims.machine.architectures`.
"""

from collections.abc import Callable

from neupims.machine.architectures import Numbers, attention, qwen, sliding_window, windowed
from neupims.machine.config_json import Config


def _mixtral(config: Config) -> Numbers:
    numbers = windowed(config)
    return numbers | {
        "experts": config.need("num_local_experts"),
        "active_experts": config.need("num_experts_per_tok"),
        "expert_width": numbers["mlp_width"],
    }


def _qwen_experts(config: Config) -> Numbers:
    """Qwen2-MoE and Qwen3-MoE: each `decoder_sparse_step`-th layer has experts."""
    numbers = qwen(config)
    layers, step = numbers["layers"], config.get("decoder_sparse_step", 1, least=1)
    dense = {layer for layer in config.list("mlp_only_layers") if isinstance(layer, int)}
    sparse = layers // step - sum(layer < layers and (layer + 1) % step == 0 for layer in dense)
    width = config.need("moe_intermediate_size", least=1)
    shared = config.get("shared_expert_intermediate_size")
    if shared % width:
        raise ValueError(
            f"shared_expert_intermediate_size must be a multiple of moe_intermediate_size, {width},"
            f" but is {shared}"
        )
    numbers["mlp_width"] = numbers["mlp_width"] or width  # 0 where no layer is dense
    return numbers | {
        "experts": config.need("num_experts"),
        "active_experts": config.need("num_experts_per_tok"),
        "shared_experts": shared // width,
        "expert_width": width,
        "dense_layers": layers - sparse,
    }


def _gpt_oss(config: Config) -> Numbers:
    """gpt-oss: every other layer has the window, the first one too."""
    numbers = attention(config) | {"head_dim": config.assume("head_dim", 64)}
    window = config.assume("sliding_window", 128)
    return (
        numbers
        | sliding_window(config, window, (numbers["layers"] + 1) // 2)
        | {
            "experts": config.need("num_local_experts"),
            "active_experts": config.need("num_experts_per_tok", "experts_per_token"),
            "expert_width": numbers["mlp_width"],
        }
    )


def _shared_and_routed(config: Config, layers: int) -> Numbers:
    """Returns the experts of DeepSeek and GLM: first dense layers, shared experts, routed ones."""
    if not config.get("n_routed_experts"):
        return {}
    if config.get("moe_layer_freq", 1) != 1:
        raise ValueError(f"moe_layer_freq must be 1, not {config.get('moe_layer_freq')}")
    return {
        "experts": config.need("n_routed_experts"),
        "active_experts": config.need("num_experts_per_tok"),
        "shared_experts": config.get("n_shared_experts"),
        "expert_width": config.need("moe_intermediate_size", least=1),
        "dense_layers": min(config.get("first_k_dense_replace"), layers),
    }


def _glm_moe(config: Config) -> Numbers:
    numbers = attention(config)
    _note_prediction_layers(config)
    return numbers | _shared_and_routed(config, numbers["layers"])


def _deepseek(config: Config) -> Numbers:
    """DeepSeek-V2, V3, R1 and Kimi K2: latent attention and experts."""
    numbers = attention(config)
    _note_prediction_layers(config)
    return (
        numbers
        | {
            "kv_heads": numbers["heads"],
            "head_dim": config.need("qk_nope_head_dim"),
            "rope_dim": config.need("qk_rope_head_dim"),
            "value_dim": config.need("v_head_dim"),
            "kv_rank": config.need("kv_lora_rank"),
            "query_rank": config.get("q_lora_rank"),
        }
        | _shared_and_routed(config, numbers["layers"])
    )


def _note_prediction_layers(config: Config) -> None:
    count = config.get("num_nextn_predict_layers")
    if count:
        config.notes["layers"] = f"the {count} layers that predict further tokens are not counted"


def _olmoe(config: Config) -> Numbers:
    numbers = attention(config)
    return numbers | {
        "experts": config.need("num_experts"),
        "active_experts": config.need("num_experts_per_tok"),
        "expert_width": numbers["mlp_width"],
    }


def _llama4(config: Config) -> Numbers:
    """Llama 4: in three of four layers attention ends at chunks; a shared expert; dense layers."""
    numbers = attention(config)
    layers, step = numbers["layers"], config.get("interleave_moe_layer_step", 1, least=1)
    rotary = config.list("no_rope_layers")  # 1 where a layer has rotary positions, and chunks
    chunked = len([each for each in rotary if each]) if rotary else layers - layers // 4
    chunk = config.need("attention_chunk_size")
    config.notes["window"] = f"attention in chunks of {chunk} tokens is taken as a window"
    return numbers | {
        "window": chunk,
        "window_layers": chunked,
        "mlp_width": config.need("intermediate_size_mlp"),
        "experts": config.need("num_local_experts"),
        "active_experts": config.need("num_experts_per_tok"),
        "shared_experts": 1,
        "expert_width": config.need("intermediate_size", least=1),
        "dense_layers": layers - layers // step,
    }


EXPERTS: dict[str, Callable[[Config], Numbers]] = {
    "deepseek": _glm_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "glm4_moe": _glm_moe,
    "gpt_oss": _gpt_oss,
    "kimi_k2": _deepseek,
    "llama4_text": _llama4,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen_experts,
    "qwen3_moe": _qwen_experts,
}
