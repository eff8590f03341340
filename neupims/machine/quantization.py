"""Bits of weights, keys and values, and activations, from a `config.json` of Hugging Face.

Source: src/transformers/utils/quantization_config.py of github.com/huggingface/transformers, and
    github.com/vllm-project/compressed-tensors.
"""

from collections.abc import Mapping
from typing import Any

SIXTEEN = ("bfloat16", "float16", "half")
METHODS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "modelopt",
    "mxfp4",
)
NO_CACHE = "the file does not say how keys and values are kept: 16 bits"
KEPT_AT_16 = ("lm_head", "embed", "norm", "router", "gate")  # never, or hardly, of any size
Bits = dict[str, int]
Notes = dict[str, str]  # by field


def read_bits(values: Mapping[str, Any], *, experts: bool) -> tuple[Bits, Notes]:
    """Returns the fields of `Decoder` that end in _bits, and notes on what the file leaves open.

    Each note has the name of the field that it is about.

    Args:
        values: The values of a `config.json`.
        experts: Whether the model has experts.

    Raises:
        ValueError: The quantization is unknown, or parts of the model have different bits.
    """
    plan = values.get("quantization_config")
    if plan is not None and not isinstance(plan, Mapping):
        raise ValueError(f"quantization_config must be a table of fields, not {plan!r}")
    return _read_plan(plan, experts) if plan else _read_type(values)


def _read_type(values: Mapping[str, Any]) -> tuple[Bits, Notes]:
    """Returns the bits of a file without quantization, from its type of numbers."""
    name = next((values[key] for key in ("torch_dtype", "dtype") if values.get(key)), None)
    kind = str(name).removeprefix("torch.")
    if kind in SIXTEEN:
        return {}, {}
    if kind.startswith("float8"):
        return {"weight_bits": 8}, {
            "activation_bits": "the file does not say how many bits activations have: 16 bits",
            "kv_bits": NO_CACHE,
        }
    said = "no torch_dtype" if name is None else f"torch_dtype {kind}"
    return {}, {"weight_bits": f"the file has {said}: numbers are taken as 16 bits"}


def _read_plan(plan: Mapping[str, Any], experts: bool) -> tuple[Bits, Notes]:
    """Returns the bits of a quantization_config."""
    method = str(plan.get("quant_method", "none")).lower()
    notes = {"weight_bits": f"quantization {method}: scales are not counted"}
    if method in ("fp8", "fbgemm_fp8"):
        bits = {"weight_bits": 8, "activation_bits": 8}
    elif method in ("gptq", "awq"):
        bits = {"weight_bits": _number(plan, "bits", "w_bit")}
    elif method == "bitsandbytes":
        eight = bool(plan.get("load_in_8bit"))
        bits = {"weight_bits": 8, "activation_bits": 8} if eight else {"weight_bits": 4}
    elif method == "mxfp4":
        bits = {"expert_bits" if experts else "weight_bits": 4}
    elif method == "modelopt":
        bits = _read_modelopt(plan)
    elif method == "compressed-tensors":
        bits = _read_groups(plan)
    else:
        raise ValueError(
            f"quantization_config: the quant_method {method!r} is not known; known are"
            f" {', '.join(METHODS)}; remove quantization_config, and state weight_bits and the like"
            " in a file of our own fields"
        )
    if "kv_bits" not in bits:
        notes["kv_bits"] = NO_CACHE
    kept = plan.get("modules_to_not_convert") or plan.get("ignore") or []
    if not isinstance(kept, list):
        raise ValueError(f"quantization_config: ignore must be a list of names, not {kept!r}")
    large = [name for name in kept if not any(part in str(name) for part in KEPT_AT_16)]
    if large and method != "mxfp4":
        notes["weight_bits"] += (
            f", and {len(large)} modules that stay at 16 bits, such as {large[0]}, are counted like"
            " the others"
        )
    return bits, notes


def _read_modelopt(plan: Mapping[str, Any]) -> Bits:
    algorithms = {"FP8": (8, 8), "NVFP4": (4, 4), "W4A8_AWQ": (4, 8), "INT4_AWQ": (4, 16)}
    algorithm = str(plan.get("quant_algo")).upper()
    if algorithm not in algorithms:
        raise ValueError(
            f"quantization_config: the quant_algo {algorithm} is not known; known are"
            f" {', '.join(algorithms)}"
        )
    weights, activations = algorithms[algorithm]
    bits = {"weight_bits": weights, "activation_bits": activations}
    if plan.get("kv_cache_quant_algo"):
        return bits | {"kv_bits": 4 if "4" in str(plan["kv_cache_quant_algo"]) else 8}
    return bits | _read_cache(plan)


def _read_groups(plan: Mapping[str, Any]) -> Bits:
    """Returns the bits of compressed-tensors, whose groups of modules must agree."""
    groups = _table(plan, "config_groups")
    found = set()
    for name in groups:
        group = _table(groups, name)
        inputs = _table(group, "input_activations")
        weights = _number(_table(group, "weights"), "num_bits")
        found.add((weights, _number(inputs, "num_bits") if inputs else 16))
    if len(found) != 1:
        raise ValueError(
            f"quantization_config: config_groups must agree on their bits, but have {len(found)}"
            " kinds; state weight_bits and the like in a file of our own fields"
        )
    weights, activations = found.pop()
    return {"weight_bits": weights, "activation_bits": activations, **_read_cache(plan)}


def _read_cache(plan: Mapping[str, Any]) -> Bits:
    scheme = _table(plan, "kv_cache_scheme")
    return {"kv_bits": _number(scheme, "num_bits")} if scheme else {}


def _table(plan: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a table of fields, empty where it is left out or null."""
    value = plan.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"quantization_config: {name} must be a table of fields, not {value!r}")
    return value or {}


def _number(plan: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(plan.get(name), int):
            return plan[name]
    raise ValueError(f"quantization_config: {' or '.join(names)} must be given, a number of bits")
