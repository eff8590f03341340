"""What is run: decoder-only language models by their numbers. Weights and caches are float16, 2 bytes a number, unless said otherwise."""

import numbers

import jax

from neupims.record import record

FLOAT16_BYTES = 2


@record
class Decoder:
    """A decoder-only transformer. A batch of models is the same record with a leading axis on every field."""

    layers: int
    width: int  # channels of a token
    heads: int  # query heads
    kv_heads: int  # key and value heads; fewer than `heads` is grouped-query attention
    mlp_width: int  # hidden channels of the MLP
    mlp_matrices: int = 2  # of the MLP: 2 with one activation, 3 with a gate (Llama)

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width, {self.width}, but is {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide the heads, {self.heads}, but is {self.kv_heads}")

    @property
    def kv_width(self) -> int:
        """Channels of a key, and of a value, over all heads."""
        return self.width // self.heads * self.kv_heads


# Brown et al., "Language Models are Few-Shot Learners", 2020, arXiv:2005.14165, table 2.1: 6.7B, 13B (its width of 5140 read as 40 heads of 128)
# and 175B. 30B: the size that the NeuPIMs paper uses (Heo et al., 2024, arXiv:2403.00579), layers and heads from its public trace generator.
GPT3 = {
    "gpt3-7b": Decoder(layers=32, width=4096, heads=32, kv_heads=32, mlp_width=4 * 4096),
    "gpt3-13b": Decoder(layers=40, width=5120, heads=40, kv_heads=40, mlp_width=4 * 5120),
    "gpt3-30b": Decoder(layers=48, width=7168, heads=56, kv_heads=56, mlp_width=4 * 7168),
    "gpt3-175b": Decoder(layers=96, width=12288, heads=96, kv_heads=96, mlp_width=4 * 12288),
}


def weight_bytes(model: Decoder) -> float:
    """Bytes of the matrices of all blocks: query, key, value, output and the MLP; no biases, no embeddings."""
    model = _real(model)
    attention = 2 * model.width * model.width + 2 * model.width * model.kv_width
    mlp = model.mlp_matrices * model.width * model.mlp_width
    return FLOAT16_BYTES * model.layers * (attention + mlp)


def kv_cache_bytes(model: Decoder, tokens: int) -> float:
    """Bytes of the keys and values of a sequence of `tokens`."""
    model = _real(model)
    return FLOAT16_BYTES * model.layers * 2 * model.kv_width * tokens


def _real(model: Decoder) -> Decoder:
    """The same numbers as real ones: whole ones in 32 bits, which arrays hold, end at 2 GiB."""
    return jax.tree.map(lambda number: number * 1.0, model)
