"""The model of a workload: the dimensions of a decoder-only language model, as numbers.

A model without experts, window, latent attention or narrow numbers leaves those fields at their
defaults. What follows from the dimensions (parameters, bytes, operations) is in
`neupims.machine.model_size`.
"""

import numbers
from dataclasses import field, fields
from typing import Any

from neupims.machine.record import COUNT_MOST, instead, real, record

BITS = (16, 8, 4)  # widths of numbers that a machine stores and multiplies
EXPERT_FIELDS = (
    "active_experts",
    "shared_experts",
    "expert_width",
    "dense_layers",
    "expert_skew",
    "expert_bits",
)
SKEW_MOST = 8  # with a larger exponent nearly every token goes to the same experts


def _count(meaning: str, least: int = 0, most: int = COUNT_MOST) -> dict[str, Any]:
    """Returns the metadata of a field that is a whole number."""
    return {"meaning": meaning, "least": least, "most": most, "whole": True}


def _bits(meaning: str) -> dict[str, Any]:
    return _count(f"bits (16, 8 or 4) of {meaning}", 4, 16)


def _switch(meaning: str) -> dict[str, Any]:
    return _count(f"1 if {meaning}, else 0", 0, 1)


@record
class Decoder:
    """A decoder-only transformer.

    A field whose 0 stands for another value ("0 is width / heads") gets that value when the record
    is made, so that a record holds the numbers it means. A batch of models is the same record with
    a leading axis on every field.

    Raises:
        ValueError: A number is not whole or out of range, or two fields contradict each other; the
            sentence names the field.
    """

    layers: int = field(metadata=_count("decoder layers", 1))
    width: int = field(metadata=_count("channels of a token (hidden size)", 1))
    heads: int = field(metadata=_count("query heads", 1))
    kv_heads: int = field(
        metadata=_count("key and value heads; fewer than heads is grouped-query attention", 1)
    )
    mlp_width: int = field(metadata=_count("hidden channels of a dense MLP", 1))
    mlp_matrices: int = field(
        default=2, metadata=_count("matrices of an MLP: 2, or 3 with a gate (Llama)", 1)
    )
    head_dim: int = field(default=0, metadata=_count("channels of a head; 0 is width / heads"))
    # Mixture of experts
    experts: int = field(default=0, metadata=_count("routed experts of a layer; 0 is a dense MLP"))
    active_experts: int = field(default=0, metadata=_count("routed experts that a token visits"))
    shared_experts: int = field(default=0, metadata=_count("experts that every token visits"))
    expert_width: int = field(
        default=0, metadata=_count("hidden channels of an expert; 0 is mlp_width")
    )
    dense_layers: int = field(
        default=0, metadata=_count("layers with a dense MLP instead of experts (the first ones)")
    )
    expert_skew: float = field(
        default=0,
        metadata={
            "meaning": "exponent s of the routing: expert e of 1, 2, ... gets a share of tokens"
            " proportional to e^-s; 0 is uniform",
            "least": 0,
            "most": SKEW_MOST,
            "whole": False,
        },
    )
    # Sliding-window attention
    window: int = field(
        default=0, metadata=_count("tokens that a layer with a window attends to; 0 is no window")
    )
    window_layers: int = field(
        default=0, metadata=_count("layers with the window; 0 is all of them")
    )
    # Multi-head latent attention (DeepSeek)
    kv_rank: int = field(
        default=0, metadata=_count("channels of the latent of keys and values; 0 is no latent")
    )
    rope_dim: int = field(
        default=0,
        metadata=_count("rotary channels of a query head beside head_dim; the heads share the key"),
    )
    query_rank: int = field(
        default=0, metadata=_count("channels of the latent of queries; 0 is one full matrix")
    )
    value_dim: int = field(default=0, metadata=_count("channels of a head's value; 0 is head_dim"))
    # Number formats
    weight_bits: int = field(
        default=16, metadata=_bits("a weight; embeddings and LM head stay at 16")
    )
    expert_bits: int = field(
        default=0, metadata=_bits("a weight of a routed expert; 0 is weight_bits") | {"least": 0}
    )
    kv_bits: int = field(default=16, metadata=_bits("a number of the key-value cache"))
    activation_bits: int = field(default=16, metadata=_bits("an input of a matrix product"))
    # Embeddings
    vocabulary: int = field(
        default=0, metadata=_count("tokens of the vocabulary; 0 leaves embeddings and LM head out")
    )
    tied_embeddings: int = field(
        default=0, metadata=_switch("the LM head shares the matrix of the embeddings")
    )
    lm_head: int = field(
        default=0, metadata=_switch("each step computes the LM head after the last layer")
    )

    def __post_init__(self):
        for each in fields(self):
            _check(each.name, getattr(self, each.name), **each.metadata)
        self._fill("head_dim", self.width // self.heads)
        self._fill("value_dim", self.head_dim)
        if self.experts:
            self._fill("expert_width", self.mlp_width)
            self._fill("expert_bits", self.weight_bits)
        if self.window:
            self._fill("window_layers", self.layers)
        _check_attention(self)
        _check_experts(self)
        _check_window(self)
        if self.lm_head and not self.vocabulary:
            raise ValueError("lm_head is 1, but the model has no vocabulary; give vocabulary")

    def _fill(self, name: str, value: int) -> None:
        """Sets a field that was left out."""
        if getattr(self, name):
            return
        if name == "head_dim" and self.width % self.heads:
            raise ValueError(
                f"heads must divide the width, {self.width}, but is {self.heads}; give head_dim,"
                " the channels of a head, if it is not width / heads"
            )
        object.__setattr__(self, name, value)

    @property
    def query_width(self) -> int:
        """The channels of the queries of a token over all heads."""
        return self.heads * (self.head_dim + self.rope_dim)

    @property
    def kv_width(self) -> int:
        """The channels of a key over all heads, and of a value, before a latent compresses them."""
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """The channels that attention gives to the output projection, over all query heads."""
        return self.heads * self.value_dim

    @property
    def cache_width(self) -> int:
        """The numbers that one token leaves in the key-value cache of one layer."""
        heads = self.kv_heads * (self.head_dim + self.value_dim)
        latent = self.kv_rank + self.rope_dim
        return (self.kv_rank > 0) * latent + (self.kv_rank <= 0) * heads

    @property
    def key_dim(self) -> int:
        """The channels that a query meets: of a key, or of the latent with the rotary key."""
        head = (self.kv_rank > 0) * self.kv_rank + (self.kv_rank <= 0) * self.head_dim
        return head + self.rope_dim

    @property
    def attended_dim(self) -> int:
        """The channels that the weights of a query meet: of a value, or of the latent."""
        return (self.kv_rank > 0) * self.kv_rank + (self.kv_rank <= 0) * self.value_dim

    @property
    def moe_layers(self) -> int:
        """The layers whose MLP is a mixture of experts."""
        return (self.experts > 0) * (self.layers - self.dense_layers)


def _check(name: str, value: Any, meaning: str, least: int, most: int, whole: bool) -> None:
    """Raises unless a field is a number within its limits."""
    kind = numbers.Integral if whole else numbers.Real
    number = isinstance(value, kind) and not isinstance(value, bool)
    if name.endswith("_bits"):
        if not number or value not in (*BITS, *((0,) if not least else ())):
            said = f"{', '.join(map(str, BITS[:-1]))} or {BITS[-1]}"
            raise ValueError(f"{name} must be {said}, not {value!r}")
    elif not number or not least <= real(value) <= most:
        raise ValueError(f"{name} must be {instead(value, least, most, whole)}")


def _check_attention(model: Decoder) -> None:
    if model.heads % model.kv_heads:
        raise ValueError(f"kv_heads must divide the heads, {model.heads}, but is {model.kv_heads}")
    if model.kv_rank:
        if model.kv_heads != model.heads:
            raise ValueError(
                f"kv_heads must be the heads, {model.heads}, with kv_rank, because every query head"
                f" has its own key and value made from the latent, but is {model.kv_heads}"
            )
        if model.window:
            raise ValueError(f"window must be 0 with kv_rank, but is {model.window}")
        return
    for name, least in (("rope_dim", 0), ("query_rank", 0), ("value_dim", model.head_dim)):
        if getattr(model, name) != least:
            raise ValueError(
                f"{name} belongs to latent attention, so kv_rank must be given with it, or"
                f" {name} left out; it is {getattr(model, name)}"
            )


def _check_experts(model: Decoder) -> None:
    if model.experts:
        if not 1 <= model.active_experts <= model.experts:
            raise ValueError(
                f"active_experts must be from 1 to the experts, {model.experts}, but is"
                f" {model.active_experts}"
            )
        if model.dense_layers >= model.layers:
            raise ValueError(
                f"dense_layers must be below the layers, {model.layers}, with experts, but is"
                f" {model.dense_layers}"
            )
        return
    for name in EXPERT_FIELDS:
        if getattr(model, name):
            raise ValueError(
                f"{name} is {getattr(model, name)}, but the model has no experts; give experts, or"
                f" leave {name} out"
            )


def _check_window(model: Decoder) -> None:
    if model.window_layers > model.layers:
        raise ValueError(
            f"window_layers must be at most the layers, {model.layers}, but is"
            f" {model.window_layers}"
        )
    if model.window_layers and not model.window:
        raise ValueError(
            f"window_layers is {model.window_layers}, but the model has no window; give window, or"
            " leave window_layers out"
        )
