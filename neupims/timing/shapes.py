"""The shapes of a layer's matrix products with weights: inner channels and output features.

They are those of one of the devices that share the layer. With latent attention some operations are
several products: in a decode step the matrices that would make keys and values of heads are
multiplied with queries and with weighted latents instead ("absorbed"); in a prefill they make keys
and values.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from neupims.machine.division import divide
from neupims.machine.record import Number
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.layout import heads_of_device

# The inner channels and the output features of a product, on one device.
SidesFunction = Callable[[Decoder, Parallel], tuple[Number, Number]]


class Product(NamedTuple):
    """Matrix products of one shape on one device, one after another."""

    count: Number  # products; 0 where the model has none
    inner: Number  # inner channels of each
    features: Number  # output features of each


ProductsFunction = Callable[[Decoder, Parallel], tuple[Product, ...]]


def qkv_sides(model: Decoder, parallel: Parallel) -> tuple[Number, Number]:
    """Returns inner channels and output features of queries, keys and values together.

    With latent attention these are the latents of queries and of keys and values, which each device
    makes for itself; without a latent of queries, they are the queries.

    Args:
        model: The model.
        parallel: How many devices share a layer.
    """
    width = 1.0 * model.width
    _, kv_heads = heads_of_device(model, parallel)
    queries = divide(model.query_width, parallel.tp)
    keys = kv_heads * model.head_dim
    first = jnp.where(jnp.asarray(model.query_rank) > 0, model.query_rank, queries)
    latents = first + model.kv_rank + model.rope_dim
    return width, jnp.where(jnp.asarray(model.kv_rank) > 0, latents, queries + 2 * keys)


def latent_queries(model: Decoder, parallel: Parallel) -> tuple[Product, ...]:
    """Returns the products of a decode step that turn latents into queries of the latent.

    A key is a head's matrix times the latent, so that query · (matrix latent) is
    (query matrix) · latent: each query is multiplied with the matrix of its head ("absorbed").

    Args:
        model: A model with latent attention.
        parallel: How many devices share a layer.

    Reference:
        DeepSeek-AI, "DeepSeek-V2", 2024, arXiv:2405.04434, section 2.1.2.
    """
    heads = divide(model.heads, parallel.tp)
    return _queries(model, parallel), Product(heads, 1.0 * model.head_dim, 1.0 * model.kv_rank)


def latent_values(model: Decoder, parallel: Parallel) -> tuple[Product, ...]:
    """Returns the products of a decode step that turn weighted latents into the values of heads.

    Args:
        model: A model with latent attention.
        parallel: How many devices share a layer.
    """
    heads = divide(model.heads, parallel.tp)
    return (Product(heads, 1.0 * model.kv_rank, 1.0 * model.value_dim),)


def expanded_latents(model: Decoder, parallel: Parallel) -> tuple[Product, ...]:
    """Returns the products of a prefill that make queries, keys and values of heads from latents.

    Args:
        model: A model with latent attention.
        parallel: How many devices share a layer.
    """
    heads = divide(model.heads, parallel.tp)
    made = heads * (model.head_dim + model.value_dim)
    return _queries(model, parallel), Product(1.0, 1.0 * model.kv_rank, made)


def _queries(model: Decoder, parallel: Parallel) -> Product:
    """Returns the product that makes queries from their latent, where there is one."""
    rank = jnp.asarray(model.query_rank)
    return Product(1.0 * (rank > 0), 1.0 * rank, divide(model.query_width, parallel.tp))


def projection_sides(model: Decoder, parallel: Parallel) -> tuple[Number, Number]:
    """Returns inner channels and output features of the projection after attention.

    Args:
        model: The model.
        parallel: How many devices share a layer.
    """
    width = 1.0 * model.width
    return divide(model.value_width, parallel.tp), width


def fc1_sides(model: Decoder, parallel: Parallel) -> tuple[Number, Number]:
    """Returns inner channels and output features of the MLP's first matrix, with its gate.

    It is that of one expert where the model has experts.

    Args:
        model: The model.
        parallel: How many devices share a layer.
    """
    mlp = divide(mlp_channels(model), _sharers(model, parallel))
    return 1.0 * model.width, (model.mlp_matrices - 1.0) * mlp


def fc2_sides(model: Decoder, parallel: Parallel) -> tuple[Number, Number]:
    """Returns inner channels and output features of the MLP's (or an expert's) last matrix.

    Args:
        model: The model.
        parallel: How many devices share a layer.
    """
    return divide(mlp_channels(model), _sharers(model, parallel)), 1.0 * model.width


def _sharers(model: Decoder, parallel: Parallel) -> Number:
    """Returns the devices that share an MLP, or each of the experts."""
    return jnp.where(
        jnp.asarray(model.experts) > 0, divide(parallel.tp, parallel.ep), 1.0 * parallel.tp
    )


def head_sides(model: Decoder, parallel: Parallel) -> tuple[Number, Number]:
    """Returns inner channels and output features of the LM head; devices share the vocabulary.

    Args:
        model: The model.
        parallel: How many devices share a layer.
    """
    return 1.0 * model.width, divide(model.vocabulary, parallel.tp)


def mlp_channels(model: Decoder) -> Number:
    """Returns the hidden channels of the MLP, or of one expert where the model has experts.

    Args:
        model: The model.
    """
    return jnp.where(jnp.asarray(model.experts) > 0, model.expert_width, model.mlp_width)
