"""The dimensions of each architecture, by the names of its `config.json` of Hugging Face.

Each function takes the values of the file and returns fields of `Decoder`.

Source: the configuration classes in src/transformers/models of github.com/huggingface/transformers
    (`configuration_*.py`), for names and defaults.
"""

from collections.abc import Callable

from neupims.machine.config_json import Config

Numbers = dict[str, int]


def _attention(config: Config, *, matrices: int = 3, tied: bool = False) -> Numbers:
    """Returns the dimensions that most architectures name alike."""
    heads = config.need("num_attention_heads")
    return {
        "layers": config.need("num_hidden_layers"),
        "width": config.need("hidden_size"),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "mlp_width": config.need("intermediate_size"),
        "mlp_matrices": matrices,
        "head_dim": config.get("head_dim"),
        "vocabulary": config.need("vocab_size"),
        "tied_embeddings": int(config.flag("tie_word_embeddings", tied)),
    }


def _window(config: Config, window: int, layers: int) -> Numbers:
    """Returns the window, unless the context that the model takes never exceeds it.

    Args:
        config: The file; its `layer_types` say which layers have a window, if it names them.
        window: The tokens of the window, 0 if there is none.
        layers: The layers that have a window where the file does not name them.
    """
    kinds = config.values.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention", "full_attention"}
        if not isinstance(kinds, list) or not known >= set(map(str, kinds)):
            raise ValueError(f"layer_types must be a list of {' and '.join(sorted(known))}")
        layers = kinds.count("sliding_attention")
    context = config.get("max_position_embeddings")
    if not window or not layers or (context and window >= context):
        return {}
    return {"window": window, "window_layers": layers}


def _llama(config: Config) -> Numbers:
    return _attention(config)


def _mistral(config: Config) -> Numbers:
    numbers = _attention(config)
    window = config.assume("sliding_window", 4096)
    return numbers | _window(config, window, numbers["layers"])


def _windowed(config: Config) -> Numbers:
    numbers = _attention(config)
    return numbers | _window(config, config.get("sliding_window"), numbers["layers"])


def _mixtral(config: Config) -> Numbers:
    numbers = _windowed(config)
    return numbers | {
        "experts": config.need("num_local_experts"),
        "active_experts": config.need("num_experts_per_tok"),
        "expert_width": numbers["mlp_width"],
    }


def _qwen(config: Config) -> Numbers:
    """Qwen2 and Qwen3: the first `max_window_layers` layers attend to all tokens."""
    numbers = _attention(config)
    if config.kind.startswith("qwen3"):
        numbers["head_dim"] = config.assume("head_dim", 128)
    if not config.flag("use_sliding_window", False):
        return numbers
    full = min(config.need("max_window_layers"), numbers["layers"])
    return numbers | _window(config, config.need("sliding_window"), numbers["layers"] - full)


def _qwen_experts(config: Config) -> Numbers:
    """Qwen2-MoE and Qwen3-MoE: each `decoder_sparse_step`-th layer has experts."""
    numbers = _qwen(config)
    step, dense = config.get("decoder_sparse_step", 1), config.values.get("mlp_only_layers") or []
    sparse = [
        layer
        for layer in range(numbers["layers"])
        if layer not in dense and step and (layer + 1) % step == 0
    ]
    width = config.need("moe_intermediate_size")
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
        "dense_layers": numbers["layers"] - len(sparse),
    }


def _gemma(config: Config) -> Numbers:
    numbers = _attention(config, tied=True)
    return numbers | {"head_dim": config.assume("head_dim", 256)}


def _gemma2(config: Config) -> Numbers:
    """Gemma 2: every other layer has the window, the first one too."""
    numbers = _gemma(config)
    window = config.assume("sliding_window", 4096)
    return numbers | _window(config, window, (numbers["layers"] + 1) // 2)


def _gemma3(config: Config) -> Numbers:
    """Gemma 3: every sixth layer attends to all tokens. Its files leave many numbers out."""
    defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}
    filled = {name: config.assume(name, number) for name, number in defaults.items()}
    config.values = {**config.values, **filled}
    numbers = _gemma(config)
    full = numbers["layers"] // config.get("sliding_window_pattern", 6)
    window = config.assume("sliding_window", 4096)
    return numbers | _window(config, window, numbers["layers"] - full)


def _gpt_oss(config: Config) -> Numbers:
    """gpt-oss: every other layer has the window, the first one too."""
    numbers = _attention(config) | {"head_dim": config.assume("head_dim", 64)}
    window = config.assume("sliding_window", 128)
    return (
        numbers
        | _window(config, window, (numbers["layers"] + 1) // 2)
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
        "expert_width": config.need("moe_intermediate_size"),
        "dense_layers": min(config.get("first_k_dense_replace"), layers),
    }


def _glm_moe(config: Config) -> Numbers:
    numbers = _attention(config)
    _note_prediction_layers(config)
    return numbers | _shared_and_routed(config, numbers["layers"])


def _deepseek(config: Config) -> Numbers:
    """DeepSeek-V2, V3, R1 and Kimi K2: latent attention and experts."""
    numbers = _attention(config)
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
        config.notes.append(f"the {count} layers that predict further tokens are not counted")


def _gpt2(config: Config) -> Numbers:
    """GPT-2 and GPT-J, with names of their own."""
    width, heads = config.need("n_embd"), config.need("n_head")
    return {
        "layers": config.need("n_layer"),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "mlp_width": config.get("n_inner", 4 * width),
        "mlp_matrices": 2,
        "vocabulary": config.need("vocab_size"),
        "tied_embeddings": int(config.flag("tie_word_embeddings", config.kind == "gpt2")),
    }


def _gpt_neox(config: Config) -> Numbers:
    return _attention(config, matrices=2)


def _opt(config: Config) -> Numbers:
    width = config.need("hidden_size")
    if config.get("word_embed_proj_dim", width) != width:
        raise ValueError(
            f"word_embed_proj_dim must be the hidden_size, {width}, but is"
            f" {config.need('word_embed_proj_dim')}: projected embeddings are not described"
        )
    config.values = {**config.values, "intermediate_size": config.need("ffn_dim")}
    return _attention(config, matrices=2, tied=True)


READERS: dict[str, Callable[[Config], Numbers]] = {
    "deepseek": _glm_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "glm4_moe": _glm_moe,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "gptj": _gpt2,
    "granite": _llama,
    "kimi_k2": _deepseek,
    "llama": _llama,
    "ministral3": _windowed,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _llama,
    "opt": _opt,
    "phi3": _windowed,
    "qwen2": _qwen,
    "qwen2_moe": _qwen_experts,
    "qwen3": _qwen,
    "qwen3_moe": _qwen_experts,
}
