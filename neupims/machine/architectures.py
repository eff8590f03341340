"""The dimensions of each architecture, by the names of its `config.json` of Hugging Face.

Each function takes the values of the file and returns fields of `Decoder`.

Source: the configuration classes in src/transformers/models of github.com/huggingface/transformers
    (`configuration_*.py`), for names and defaults.
"""

from collections.abc import Callable

from neupims.machine.config_json import Config

Numbers = dict[str, int]


def attention(config: Config, *, matrices: int = 3, tied: bool = False) -> Numbers:
    """Returns the dimensions that most architectures name alike.

    Args:
        config: The file.
        matrices: The matrices of an MLP.
        tied: Whether the LM head shares the embeddings where the file does not say.

    Raises:
        ValueError: A dimension is missing or not a whole number.
    """
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


def sliding_window(config: Config, tokens: int, layers: int) -> Numbers:
    """Returns the window, unless the context that the model takes never exceeds it.

    Args:
        config: The file; its `layer_types` say which layers have a window, if it names them.
        tokens: The tokens of the window, 0 if there is none.
        layers: The layers that have a window where the file does not name them.

    Raises:
        ValueError: `layer_types` has layers of another kind.
    """
    kinds = config.list("layer_types")
    if kinds:
        known = {"sliding_attention", "full_attention"}
        if not known >= set(map(str, kinds)):
            raise ValueError(f"layer_types must be a list of {' and '.join(sorted(known))}")
        layers = kinds.count("sliding_attention")
    context = config.get("max_position_embeddings")
    if not tokens or not layers or (context and tokens >= context):
        return {}
    return {"window": tokens, "window_layers": layers}


def _llama(config: Config) -> Numbers:
    return attention(config)


def _mistral(config: Config) -> Numbers:
    numbers = attention(config)
    window = config.assume("sliding_window", 4096)
    return numbers | sliding_window(config, window, numbers["layers"])


def windowed(config: Config) -> Numbers:
    """Returns the dimensions of an architecture whose layers all have the window, if there is one.

    Args:
        config: The file.

    Raises:
        ValueError: As for `attention`.
    """
    numbers = attention(config)
    return numbers | sliding_window(config, config.get("sliding_window"), numbers["layers"])


def qwen(config: Config) -> Numbers:
    """Returns the dimensions of Qwen: the first `max_window_layers` layers attend to all tokens.

    Args:
        config: The file.

    Raises:
        ValueError: As for `attention`.
    """
    numbers = attention(config)
    if config.kind.startswith("qwen3"):
        numbers["head_dim"] = config.assume("head_dim", 128)
    if not config.flag("use_sliding_window", False):
        return numbers
    full = min(config.need("max_window_layers"), numbers["layers"])
    return numbers | sliding_window(config, config.need("sliding_window"), numbers["layers"] - full)


def _gemma(config: Config) -> Numbers:
    numbers = attention(config, tied=True)
    return numbers | {"head_dim": config.assume("head_dim", 256)}


def _gemma2(config: Config) -> Numbers:
    """Gemma 2: every other layer has the window, the first one too."""
    numbers = _gemma(config)
    window = config.assume("sliding_window", 4096)
    return numbers | sliding_window(config, window, (numbers["layers"] + 1) // 2)


def _gemma3(config: Config) -> Numbers:
    """Gemma 3: every sixth layer attends to all tokens. Its files leave many numbers out."""
    defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}
    filled = {name: config.assume(name, number) for name, number in defaults.items()}
    config.values = {**config.values, **filled}
    numbers = _gemma(config)
    full = numbers["layers"] // config.get("sliding_window_pattern", 6, least=1)
    window = config.assume("sliding_window", 4096)
    return numbers | sliding_window(config, window, numbers["layers"] - full)


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
    return attention(config, matrices=2)


def _opt(config: Config) -> Numbers:
    width = config.need("hidden_size")
    if config.get("word_embed_proj_dim", width) != width:
        raise ValueError(
            f"word_embed_proj_dim must be the hidden_size, {width}, but is"
            f" {config.need('word_embed_proj_dim')}: projected embeddings are not described"
        )
    config.values = {**config.values, "intermediate_size": config.need("ffn_dim")}
    return attention(config, matrices=2, tied=True)


def _starcoder2(config: Config) -> Numbers:
    numbers = attention(config, matrices=2, tied=True)
    return numbers | sliding_window(config, config.get("sliding_window"), numbers["layers"])


def _phi(config: Config) -> Numbers:
    return attention(config, matrices=2)


def _cohere(config: Config) -> Numbers:
    return attention(config, tied=True)


DENSE: dict[str, Callable[[Config], Numbers]] = {
    "cohere": _cohere,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _gpt2,
    "granite": _llama,
    "internlm2": _llama,
    "llama": _llama,
    "ministral3": windowed,
    "mistral": _mistral,
    "olmo2": _llama,
    "opt": _opt,
    "phi": _phi,
    "phi3": windowed,
    "qwen2": qwen,
    "qwen3": qwen,
    "stablelm": _llama,
    "starcoder2": _starcoder2,
}
