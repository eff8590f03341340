"""What follows from the dimensions of a model: parameters, bytes and operations of a token.

Matrices count; biases, norms and learned positions do not (below 1 % of every model in
docs/accelerator/models.md). Each function takes a batch of models too.
"""

from typing import NamedTuple

import jax

from neupims.machine.model import Decoder
from neupims.machine.record import Number

EMBEDDING_BITS = 16  # checkpoints in 8 and 4 bits keep embeddings and LM head at 16


class Parameters(NamedTuple):
    """The numbers in the matrices of a model, by part, over all layers."""

    attention: Number  # queries, keys, values and output projection
    mlp: Number  # dense MLPs, shared experts and routers
    experts: Number  # all routed experts
    active_experts: Number  # the routed experts that one token visits, a part of `experts`
    embeddings: Number  # of tokens; 0 where the model names no vocabulary
    lm_head: Number  # 0 where it shares the matrix of the embeddings

    @property
    def total(self) -> Number:
        """All parameters."""
        return self.attention + self.mlp + self.experts + self.embeddings + self.lm_head

    @property
    def active(self) -> Number:
        """The parameters that one token uses; all of them where there are no experts."""
        return self.total - self.experts + self.active_experts

    @property
    def layers(self) -> Number:
        """The parameters of the layers, without embeddings and LM head."""
        return self.attention + self.mlp + self.experts


def parameters(model: Decoder) -> Parameters:
    """Returns the parameters of a model by part.

    Args:
        model: The model.

    Reference:
        Latent attention: DeepSeek-AI, "DeepSeek-V2", 2024, arXiv:2405.04434, equations 37 to 47.
    """
    model = _real(model)
    expert = model.mlp_matrices * model.width * model.expert_width
    dense_mlp = model.mlp_matrices * model.width * model.mlp_width
    moe, router = model.moe_layers, model.width * model.experts
    table = model.vocabulary * model.width
    return Parameters(
        attention=model.layers * _attention_parameters(model),
        mlp=(model.layers - moe) * dense_mlp + moe * (model.shared_experts * expert + router),
        experts=moe * model.experts * expert,
        active_experts=moe * model.active_experts * expert,
        embeddings=table,
        lm_head=(1 - model.tied_embeddings) * table,
    )


def _attention_parameters(model: Decoder) -> Number:
    """Returns the parameters of one layer's attention."""
    width, rank, latent = model.width, model.query_rank, model.kv_rank
    query = (rank > 0) * rank * (width + model.query_width)
    query = query + (rank <= 0) * width * model.query_width
    heads = model.kv_heads * (model.head_dim + model.value_dim)
    compressed = width * (latent + model.rope_dim) + latent * heads
    keys = (latent > 0) * compressed + (latent <= 0) * width * heads
    return query + keys + model.value_width * width


def latent_parameters(model: Decoder) -> Number:
    """Returns the parameters, of one layer, of the matrices that make latents of a token.

    Args:
        model: The model; without latent attention they are 0.
    """
    made = model.query_rank + model.kv_rank + model.rope_dim
    return (model.kv_rank > 0) * 1.0 * model.width * made


def weight_bytes(model: Decoder) -> Number:
    """Returns the bytes of a model's matrices: all layers, embeddings and LM head.

    Embeddings and LM head count where the model names its vocabulary; they stay at 16 bits.

    Args:
        model: The model.
    """
    size = parameters(model)
    return layer_weight_bytes(model) + EMBEDDING_BITS / 8 * (size.embeddings + size.lm_head)


def layer_weight_bytes(model: Decoder) -> Number:
    """Returns the bytes of the matrices of all layers: attention, MLPs and experts.

    Args:
        model: The model.
    """
    size = parameters(model)
    rest = size.attention + size.mlp
    return model.weight_bits / 8 * rest + model.expert_bits / 8 * size.experts


def kv_cache_bytes(model: Decoder, tokens: Number) -> Number:
    """Returns the bytes of the keys and values of one sequence in all layers.

    Layers with a window keep the last `window` tokens; a latent is kept instead of the keys and
    values that are made from it.

    Args:
        model: The model.
        tokens: The length of the sequence.
    """
    return model.kv_bits / 8 * _real(model).cache_width * _attended(model, tokens)


def flops_per_token(model: Decoder, tokens: Number = 0) -> Number:
    """Returns the operations to compute one token, of the LM head too where there is a vocabulary.

        2 * active matrix parameters + 2 * attended tokens * channels of queries and of values

    A multiply and an add are two operations. Latent attention multiplies queries with the latent
    itself, as decoding does.

    Args:
        model: The model.
        tokens: The tokens in the key-value cache that it attends to (default: the products with
            weights alone).

    Reference:
        Kaplan et al., "Scaling Laws for Neural Language Models", 2020, arXiv:2001.08361, table 1.
    """
    size, full = parameters(model), _real(model)
    head = full.vocabulary * full.width
    matrices = size.active - size.embeddings - size.lm_head + head
    latent = full.heads * (2 * full.kv_rank + full.rope_dim)
    channels = full.query_width + full.value_width
    channels = (full.kv_rank > 0) * latent + (full.kv_rank <= 0) * channels
    return 2 * (matrices + channels * _attended(model, tokens))


def _attended(model: Decoder, tokens: Number) -> Number:
    """Returns the tokens that all layers together attend to."""
    full = _real(model)
    seen = (tokens < full.window) * tokens + (tokens >= full.window) * full.window
    return (full.layers - full.window_layers) * tokens + full.window_layers * seen


def _real(model: Decoder) -> Decoder:
    """Returns the numbers as floats, because 32-bit whole numbers in arrays end at 2 GiB."""
    return jax.tree.map(lambda number: number * 1.0, model)
