"""neupims/machine/hugging_face.py: models from the config.json of Hugging Face.

The files that the tests write have the fields of published ones (numbers as published).
"""

import contextlib
import json

import pytest

from neupims import load_model, load_parallel
from neupims.__main__ import main
from neupims.machine.config import read_model
from neupims.machine.model_files import own_fields, parse_model
from neupims.machine.model_size import parameters, weight_bytes
from neupims.machine.quantization import METHODS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
MIXTRAL = MISTRAL | {
    "model_type": "mixtral",
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN2 = LLAMA | {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 20,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = LLAMA | {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
}
QWEN2_MOE = LLAMA | {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "vocab_size": 151936,
}
GEMMA = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
GEMMA3 = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
    },
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_LITE = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": None,
    "q_lora_rank": None,
    "quantization_config": None,
    "vocab_size": 102400,
}
LLAMA4 = {
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama4_text",
        "attention_chunk_size": 8192,
        "head_dim": 128,
        "hidden_size": 5120,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "vocab_size": 202048,
    },
}
GPT2 = {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "vocab_size": 50257}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 50432,
}
OPT = {
    "model_type": "opt",
    "ffn_dim": 20480,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "torch_dtype": "float16",
    "vocab_size": 50272,
    "word_embed_proj_dim": 5120,
}


def write(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def read(folder, values):
    return read_model(write(folder, values))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (LLAMA, "llama3-8b"),
        (MISTRAL, "mistral-7b-v0.1"),
        (MIXTRAL, "mixtral-8x7b"),
        (QWEN2, "qwen2.5-7b"),
        (QWEN3, "qwen3-32b"),
        (QWEN3_MOE, "qwen3-30b-a3b"),
        (QWEN2_MOE, "qwen1.5-moe-a2.7b"),
        (GEMMA, "gemma-7b"),
        (GEMMA2, "gemma2-9b"),
        (GEMMA3, "gemma3-12b"),
        (GPT_OSS, "gpt-oss-20b"),
        (DEEPSEEK, "deepseek-v3"),
        (DEEPSEEK_LITE, "deepseek-v2-lite"),
        (GPT2, "gpt2-xl"),
        (NEOX, "gpt-neox-20b"),
        (OPT, "opt-13b"),
    ],
)
def test_a_config_is_the_named_model(tmp_path, values, name):
    """The files that ship, written from the same sources by their own fields, agree."""
    assert load_model(write(tmp_path, values)) == load_model(name)


PLAIN = {
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("kind", "numbers", "billions"),
    [
        # layers, width, heads, key and value heads, MLP, vocabulary
        ("starcoder2", (32, 4608, 36, 4, 18432, 49152), 7.17),
        ("internlm2", (32, 4096, 32, 8, 14336, 92544), 7.74),
        ("stablelm", (32, 2560, 32, 32, 6912, 50304), 2.795),
        ("cohere", (32, 4096, 32, 8, 14336, 256000), 8.03),
        ("phi", (32, 2560, 32, 32, 10240, 51200), 2.78),
        ("olmo2", (32, 4096, 32, 32, 11008, 100352), 7.30),
        ("granite", (40, 4096, 32, 8, 12800, 49155), 8.17),
        ("olmoe", (16, 2048, 16, 16, 1024, 50304), 6.92),
    ],
)
def test_other_architectures_have_their_published_size(tmp_path, kind, numbers, billions):
    """Starcoder2 7B, InternLM2.5 7B, StableLM 3B 4E1T, Aya 23 8B, Phi-2, OLMo 2 7B, Granite 3.0 8B
    and OLMoE 1B-7B by their config.json; sizes of their checkpoints.
    """
    layers, width, heads, kv_heads, mlp, vocabulary = numbers
    values = PLAIN | {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }
    if kind == "granite":
        values["tie_word_embeddings"] = True
    if kind == "olmoe":
        values |= {"num_experts": 64, "num_experts_per_tok": 8}
    size = parameters(load_model(write(tmp_path, values)))
    assert size.total / 1e9 == pytest.approx(billions, rel=0.002)


def test_llama_4_has_chunks_and_dense_layers(tmp_path):
    """Maverick: 24 of 48 layers have 128 experts, 36 have chunks of 8192; 400.7 billion."""
    found = read(tmp_path, LLAMA4)
    assert found.model == load_model("llama4-maverick")
    assert "chunks of 8192 tokens is taken as a window" in found.notes[1]


def test_a_config_of_ours_still_works(tmp_path):
    ours = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp_width": 128, "tp": 2}
    path = write(tmp_path, ours)
    assert load_model(path).kv_heads == 2
    assert load_parallel(path).tp == 2


def test_what_a_file_leaves_out_is_stated(tmp_path):
    (vision, *_, vocabulary, head) = read(tmp_path, GEMMA3).notes
    assert vision == "only the language model is read, not the rest of gemma3"
    assert vocabulary == "vocab_size is not in the file: 262208, the default of gemma3_text"
    assert head == "head_dim is not in the file: 256, the default of gemma3_text"
    assert read(tmp_path, LLAMA).notes == ()
    assert "no torch_dtype" in read(tmp_path, GPT2).notes[0]
    assert "float32" in read(tmp_path, GPT2 | {"torch_dtype": "float32"}).notes[0]
    missing = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert "sliding_window is not in the file: 4096" in read(tmp_path, missing).notes[0]
    assert "1 layers that predict" in read(tmp_path, DEEPSEEK).notes[0]


def test_windows(tmp_path):
    """One that no context exceeds is none; Qwen's first layers attend to everything."""
    assert read(tmp_path, MISTRAL | {"sliding_window": 32768}).model.window == 0
    assert read(tmp_path, MISTRAL | {"sliding_window": None}).model.window == 0
    windowed = read(tmp_path, QWEN2 | {"use_sliding_window": True}).model
    assert (windowed.window, windowed.window_layers) == (4096, 8)
    none = read(tmp_path, QWEN2 | {"use_sliding_window": True, "max_window_layers": 28}).model
    assert none.window == 0
    layers = ["full_attention"] * 40 + ["sliding_attention"] * 2
    assert read(tmp_path, GEMMA2 | {"layer_types": layers}).model.window_layers == 2


def test_dense_layers_among_experts(tmp_path):
    """Of 48 layers, every second one has experts, except layers 1 and 3."""
    sparse = QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}
    assert read(tmp_path, sparse).model.moe_layers == 22
    dense = read(tmp_path, DEEPSEEK | {"n_routed_experts": None}).model
    assert (dense.experts, dense.kv_rank) == (0, 512)


GROUP = {"weights": {"num_bits": 4}, "input_activations": None}


@pytest.mark.parametrize(
    ("plan", "bits"),
    [
        ({"quant_method": "fp8"}, (8, 16, 8)),
        ({"quant_method": "gptq", "bits": 4}, (4, 16, 16)),
        ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": None}, (4, 16, 16)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, (4, 16, 16)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, (8, 16, 8)),
        ({"quant_method": "mxfp4"}, (4, 16, 16)),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
            (8, 8, 8),
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, (4, 16, 4)),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
                },
                "kv_cache_scheme": {"num_bits": 8},
            },
            (8, 8, 8),
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}},
            (4, 16, 16),
        ),
    ],
)
def test_bits_of_quantized_files(tmp_path, plan, bits):
    found = read(tmp_path, LLAMA | {"quantization_config": plan})
    model = found.model
    assert (model.weight_bits, model.kv_bits, model.activation_bits) == bits
    assert "scales are not counted" in found.notes[0]
    assert any("keys and values" in note for note in found.notes) == (model.kv_bits == 16)


def test_experts_of_four_bits_beside_attention_of_sixteen(tmp_path):
    model = read(tmp_path, GPT_OSS).model
    assert (model.weight_bits, model.expert_bits) == (16, 4)
    size = parameters(model)
    assert weight_bytes(model) == 2 * (size.total - size.experts) + size.experts / 2


def test_modules_that_stay_wide_are_named(tmp_path):
    plan = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "layers.0.mlp.up_proj"]}
    (note, _) = read(tmp_path, LLAMA | {"quantization_config": plan}).notes
    assert "and 1 modules that stay at 16 bits, such as layers.0.mlp.up_proj" in note


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            LLAMA | {"model_type": "mamba"},
            "the model_type 'mamba' is not known; known are cohere, deepseek",
        ),
        ({"model_type": "llama"}, "num_attention_heads must be given for the model_type llama"),
        (LLAMA | {"num_hidden_layers": "32"}, "num_hidden_layers must be a whole number"),
        (LLAMA | {"num_hidden_layers": 0}, "layers must be a whole number of at least 1, not 0"),
        (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        (LLAMA | {"num_attention_heads": 48}, "heads must divide the width, 4096, but is 48"),
        (GEMMA2 | {"layer_types": ["chunked"]}, "layer_types must be a list of full_attention"),
        (OPT | {"word_embed_proj_dim": 512}, "word_embed_proj_dim must be the hidden_size, 5120"),
        (DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq must be 1, not 2"),
        (QWEN2_MOE | {"shared_expert_intermediate_size": 1000}, "must be a multiple of moe_interm"),
        (LLAMA | {"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm' is not"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "16, 8 or 4, not 3"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "bits or w_bit must be given"),
        (LLAMA | {"quantization_config": 8}, "quantization_config must be a table"),
        (
            LLAMA
            | {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {
                        "group_0": GROUP,
                        "group_1": {"weights": {"num_bits": 8}},
                    },
                }
            },
            "config_groups must agree on their bits, but have 2 kinds",
        ),
        (
            LLAMA | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W2"}},
            "quant_algo W2 is not known",
        ),
    ],
)
def test_what_is_wrong_with_a_config_is_one_sentence(tmp_path, values, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(write(tmp_path, values))
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


SMALL = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}


def test_a_folder_is_the_config_in_it(tmp_path):
    write(tmp_path, LLAMA)
    assert load_model(tmp_path) == load_model("llama3-8b")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path.parent)


def test_a_base_holds_where_a_file_names_nothing(tmp_path):
    """Bits of a named model, and of a config.json beside the file; its notes go where answered."""
    own = tmp_path / "mine.toml"
    own.write_text('base = "mixtral-8x7b"\nweight_bits = 8\n')
    mixtral, mine = load_model("mixtral-8x7b"), read_model(own)
    assert (mine.model.weight_bits, mine.model.expert_bits) == (8, 8)
    assert mine.model.experts == mixtral.experts
    assert mine.parallel == load_parallel("mixtral-8x7b")
    write(tmp_path, LLAMA | {"quantization_config": {"quant_method": "fp8"}})
    own.write_text('base = "config.json"\nabout = "fp8, cache too"\nkv_bits = 8\ntp = 2\n')
    mine = read_model(own)
    assert (mine.model.weight_bits, mine.model.kv_bits, mine.parallel.tp) == (8, 8, 2)
    assert mine.about == "fp8, cache too"
    assert mine.notes == ("quantization fp8: scales are not counted",)
    assert load_parallel(own).tp == 2
    own.write_text('base = "other.toml"\n')
    (tmp_path / "other.toml").write_text('base = "llama3-8b"\n')
    with pytest.raises(ValueError, match=r"other\.toml: base must be a model without a base"):
        load_model(own)
    own.write_text('base = "llama9"\n')
    with pytest.raises(ValueError, match="there is no model 'llama9'; did you mean"):
        load_model(own)
    own.write_text('base = "llama3-8b"\nkv_heads = 5\n')
    with pytest.raises(ValueError, match=r"mine\.toml: kv_heads must divide the heads, 32"):
        load_model(own)


def test_the_tool_states_what_a_file_leaves_open(tmp_path, capsys):
    path, trace = write(tmp_path, SMALL), tmp_path / "trace.csv"
    trace.write_text("seq_len,ch_idx\n30,0\n40,1\n")
    note = "the file has no torch_dtype: numbers are taken as 16 bits"
    assert main(["simulate", "--model", str(path), "--trace", str(trace), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model_notes"] == [note]
    assert f"neupims: note: {path}: {note}" in err
    knobs = ["--knob", "npu.num_arrays=4,8", "--method", "grid", "--json"]
    assert main(["explore", "--models", str(path), "--trace", str(trace), *knobs]) == 0
    assert note in capsys.readouterr().err


def test_show_gives_the_sizes_of_a_file(tmp_path, capsys):
    path = write(tmp_path, MIXTRAL)
    assert main(["show", "models", "--model", str(path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["parameters"] == pytest.approx(46.7e9, rel=0.001)
    assert found["active_parameters"] == pytest.approx(12.9e9, rel=0.005)
    assert found["kv_bytes_per_token"] == 32 * 2 * 1024 * 2
    assert found["weight_bytes"] == 2 * found["parameters"]
    assert main(["show", "models", "--model", str(write(tmp_path, GPT2))]) == 0
    assert "no torch_dtype" in " ".join(capsys.readouterr().out.split())
    assert main(["show", "systems", "--model", "gpt3-7b"]) == 1
    assert "--model is for models" in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "windows"), [(24, 12), (25, 13)])
def test_every_other_layer_of_gpt_oss_has_the_window_where_the_file_does_not_say(
    tmp_path, layers, windows
):
    values = GPT_OSS | {"layer_types": None, "num_hidden_layers": layers}
    model = read(tmp_path, values).model
    assert (int(model.window), int(model.window_layers)) == (128, windows)


ODD = ("x", "", -1, 0, 1.5, [], [1], {}, {"a": 1}, None, True, 10**30)
ALL = [LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3_MOE, GEMMA2, GEMMA3, GPT_OSS, DEEPSEEK, OPT]
MORE = {
    "dtype": None,
    "interleave_moe_layer_step": 1,
    "layer_types": None,
    "mlp_only_layers": [],
    "no_rope_layers": [],
    "sliding_window_pattern": 6,
    "use_sliding_window": True,
}


@pytest.mark.parametrize("values", [*ALL, LLAMA4], ids=lambda values: values["model_type"])
def test_odd_values_give_a_model_or_one_sentence(values):
    inner = values.get("text_config", values)
    for name in (*inner, *MORE):
        for odd in ODD:
            changed = inner | {name: odd}
            with contextlib.suppress(ValueError):
                parse_model(*own_fields(changed))


def test_odd_quantizations_give_a_model_or_one_sentence():
    for name in ("quant_method", "bits", "config_groups", "kv_cache_scheme", "ignore"):
        for odd in ODD:
            for method in METHODS:
                plan = {"quant_method": method, "bits": 8, "quant_algo": "FP8", name: odd}
                with contextlib.suppress(ValueError):
                    parse_model(*own_fields(LLAMA | {"quantization_config": plan}))
