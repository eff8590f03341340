"""Parameters of a ViT by timm's names <-> the variables of our `ViT`: the table of both.

Positions and prefix tokens, which files keep in several ways, are folded into the one of our model
and unfolded on the way back.
"""

from typing import Literal, NamedTuple

import numpy as np

from ggem_jax.models.vit import ViTConfig
from ggem_jax.weights.convert import Parameter
from ggem_jax.weights.vit_layouts import Arrays

Trained = Literal["cls", "avg", "map"]


class Style(NamedTuple):
    """Where files store the same network in different ways; our model has one of them."""

    positions: int  # of prefix tokens, before those of the patches
    distilled: bool = False  # a second prefix token, which becomes the first register
    fc_norm: bool = False  # the final norm is called so, and comes after the pooling


def vit_table(
    config: ViTConfig, style: Style, pooling: Trained, num_classes: int
) -> dict[str, Parameter]:
    """Returns timm's names and where their parameters go.

    Queries, keys and values are apart, and positions are folded.

    Args:
        config: The network.
        style: Choices of the file.
        pooling: The pooling, whose parameters are in the file if it is attention pooling.
        num_classes: Channels of the head; 0: no head.
    """
    c, width = config, config.width
    table = {
        "patch_embed.proj.weight": Parameter(
            ("params", "patch_embedding", "kernel"), (width, 3, c.patch, c.patch), "conv"
        )
    }
    if c.patch_bias:
        table["patch_embed.proj.bias"] = Parameter(("params", "patch_embedding", "bias"), (width,))
    side = c.image // c.patch
    if c.position == "learned":
        table["pos_embed"] = _token("position", int(c.class_token) + side * side, width)
    if c.class_token:
        table["cls_token"] = _token("class_token", 1, width)
    if c.registers:
        table["reg_token"] = _token("registers", c.registers, width)
    if c.pre_norm:
        table |= _norm("norm_pre", ("norm_pre",), width)
    for i in range(c.depth):
        theirs, ours = f"blocks.{i}", f"blocks_{i}"
        table |= _norm(f"{theirs}.norm1", (ours, "norm_1"), width) | _norm(
            f"{theirs}.norm2", (ours, "norm_2"), width
        )
        table |= _attention(f"{theirs}.attn", (ours, "attention"), c) | _mlp(
            f"{theirs}.mlp", (ours, "mlp"), c
        )
        if c.layer_scale is not None:
            for n in (1, 2):
                table[f"{theirs}.ls{n}.gamma"] = Parameter(
                    ("params", ours, f"layer_scale_{n}"), (width,)
                )
    table |= _norm("fc_norm" if style.fc_norm else "norm", ("norm",), width)
    if pooling == "map":
        table["attn_pool.latent"] = Parameter(
            ("params", "pool", "query"), (1, 1, width), ours=(1, width)
        )
        table |= _attention("attn_pool", ("pool", "attention"), c) | _norm(
            "attn_pool.norm", ("pool", "norm"), width
        )
        table |= _mlp("attn_pool.mlp", ("pool", "mlp"), c)
    if num_classes:
        table |= _dense("head", ("head",), width, num_classes)
    return table


def _token(ours: str, count: int, width: int) -> Parameter:
    return Parameter(("params", ours), (1, count, width), ours=(count, width))


def _norm(theirs: str, ours: tuple[str, ...], width: int) -> dict[str, Parameter]:
    return {
        f"{theirs}.weight": Parameter(("params", *ours, "scale"), (width,)),
        f"{theirs}.bias": Parameter(("params", *ours, "bias"), (width,)),
    }


def _dense(theirs: str, ours: tuple[str, ...], inner: int, outer: int) -> dict[str, Parameter]:
    return {
        f"{theirs}.weight": Parameter(("params", *ours, "kernel"), (outer, inner), "dense"),
        f"{theirs}.bias": Parameter(("params", *ours, "bias"), (outer,)),
    }


def _mlp(theirs: str, ours: tuple[str, ...], c: ViTConfig) -> dict[str, Parameter]:
    hidden = c.mlp_width * (2 if c.mlp == "swiglu" else 1)
    return _dense(f"{theirs}.fc1", (*ours, "in"), c.width, hidden) | _dense(
        f"{theirs}.fc2", (*ours, "out"), c.mlp_width, c.width
    )


def _attention(theirs: str, ours: tuple[str, ...], c: ViTConfig) -> dict[str, Parameter]:
    """Head h owns the rows h d/heads ... (h+1) d/heads of each projection."""
    heads, width = (c.heads, c.width // c.heads), c.width
    table = {}
    for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
        table[f"{theirs}.{part}.weight"] = Parameter(
            ("params", *ours, name, "kernel"), (width, width), "dense", ours=(width, *heads)
        )
        if c.key_bias if part == "k" else c.qkv_bias:
            table[f"{theirs}.{part}.bias"] = Parameter(
                ("params", *ours, name, "bias"), (width,), ours=heads
            )
    table[f"{theirs}.proj.weight"] = Parameter(
        ("params", *ours, "out", "kernel"), (width, width), "dense", ours=(*heads, width)
    )
    table[f"{theirs}.proj.bias"] = Parameter(("params", *ours, "out", "bias"), (width,))
    return table


def fold_positions(arrays: Arrays, config: ViTConfig, style: Style) -> Arrays:
    """Returns the arrays with prefix tokens and positions as our model keeps them.

    The class token has one position. Registers have none: theirs are added to them.

    Args:
        arrays: Parameters by timm's names.
        config: The network.
        style: Choices of the file.
    """
    folded = {
        name: array for name, array in arrays.items() if name not in ("dist_token", "reg_token")
    }
    if config.position == "rope":
        return arrays
    table = np.asarray(arrays["pos_embed"])[0].astype(np.float32)
    grid = table[style.positions :]
    if config.class_token:
        own = table[:1] if style.positions else np.zeros_like(grid[:1])
        folded["pos_embed"] = np.concatenate([own, grid])[None]
    registers = []
    if style.distilled:
        registers.append(
            np.asarray(arrays["dist_token"])[0].astype(np.float32)
            + (table[1:2] if style.positions > 1 else 0)
        )
    if "reg_token" in arrays:
        registers.append(np.asarray(arrays["reg_token"])[0])
    if registers:
        folded["reg_token"] = np.concatenate(registers)[None]
    return folded


def unfold_positions(arrays: Arrays, config: ViTConfig, style: Style) -> Arrays:
    """Returns the arrays with prefix tokens and positions as the file keeps them.

    Where a file has no positions for prefix tokens, that of the class token is added to the token.

    Args:
        arrays: Parameters by timm's names, as `fold_positions` returns them.
        config: The network.
        style: Choices of the file.
    """
    unfolded = dict(arrays)
    table = arrays["pos_embed"][0]
    if config.class_token:
        own, grid = table[:1], table[1:]
        if style.positions == 0:
            unfolded["cls_token"] = arrays["cls_token"] + own
            unfolded["pos_embed"] = grid[None]
        else:
            unfolded["pos_embed"] = np.concatenate(
                [own, *[np.zeros_like(own)] * (style.positions - 1), grid]
            )[None]
    if style.distilled:
        registers = unfolded.pop("reg_token")
        unfolded["dist_token"] = registers[:, :1]
        if registers.shape[1] > 1:
            unfolded["reg_token"] = registers[:, 1:]
    return unfolded
