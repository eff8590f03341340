"""Networks that resemble our ViT but compute something else, and why they are not read.

Their names or shapes tell them apart. Without this check, some of them would be read in silence,
because their other parameters have the names of a network that is read.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.weights.declared import Declared


class Other(NamedTuple):
    """A kind of network that is not read."""

    about: str  # the kind, and what it computes that our ViT does not
    marks: tuple[str, ...]  # patterns of names after any prefix: such a file has one of each
    axes: int | None = None  # of the arrays of these names; None: any


# The first that fits is named. References: timm's beit.py, eva.py, vision_transformer_relpos.py
# and naflexvit.py; transformers, models beit, data2vec, siglip2 and dinov3_convnext;
# baaivision/EVA.
OTHERS = (
    Other(
        "BEiT or another network that adds a learned bias of every relative position to the logits"
        " of the attention",
        (
            r"(.*\.)?(relative_position|rel_pos)(_\w+)?|(.*\.)?(relative_position_bias|rel_pos"
            r"|rel_pos_bias|shared_rel_pos)\..*|encoder\.layer\.\d+\.lambda_[12]",
        ),
    ),
    Other(
        "EVA-02 or BEiT-3, which have norms inside the attention or the MLP, and EVA-02 other"
        " rotary positions beside learned ones",
        (
            r"blocks\.\d+\.(attn\.(inner_attn_ln|norm)|mlp\.(ffn_ln|norm))\.weight"
            r"|rope\.freqs_(cos|sin)",
        ),
    ),
    Other(
        "EVA or a small EVA-02, whose keys have no bias and which, if EVA-02, has other rotary"
        " positions beside learned ones",
        (r"blocks\.\d+\.attn\.q_bias", "pos_embed"),
    ),
    Other(
        "a Perception Encoder, which rotates queries and keys beside its learned positions",
        (r"norm_pre\.weight", r"attn_pool\.latent|blocks\.\d+\.gamma_1"),
    ),
    Other(
        "SigLIP 2 NaFlex, which resizes its positions to the aspect ratio of each image and pads"
        " the patches",
        (r"(vision_model\.)?embeddings\.patch_embedding\.weight|embedding/kernel",),
        axes=2,
    ),
    Other(
        "timm's NaFlexViT (SigLIP 2 NaFlex and others), which resizes its positions to the aspect"
        " ratio of each image and pads the patches",
        (r"embeds\.proj\.weight",),
    ),
    Other(
        "a DINOv3 with a norm of its own for the class token and the registers, where our ViT has"
        " one final norm",
        (r"cls_norm\.weight",),
    ),
    Other(
        "a DINOv3 ConvNeXt, which is no ViT",
        (r"(model\.)?(downsample_layers\.0\.0|stages\.0\.layers\.0\.depthwise_conv)\.weight",),
    ),
    Other(
        "a network with rotary positions of learned frequencies, where our ViT has those of DINOv3",
        (r"rope\.freqs",),
    ),
)


def refuse_others(arrays: Mapping[str, np.ndarray], *, source: str) -> None:
    """Raises `MismatchedWeights` for a network of `OTHERS`, with the reason and the telling names.

    Args:
        arrays: By the names of any publisher.
        source: The file, for messages.
    """
    for about, marks, axes in OTHERS:
        found = []
        for mark in marks:
            pattern = re.compile(rf"(?:.*[./])?(?:{mark})")
            names = [
                name
                for name, array in arrays.items()
                if pattern.fullmatch(name) and (axes is None or np.ndim(array) == axes)
            ]
            found.append(sorted(names)[:2])
        if all(found):
            raise MismatchedWeights(
                f"{source} is of {about}; it is not read, as its features would be wrong:"
                f" {', '.join(name for names in found for name in names)}"
            )


def refuse_architecture(declared: Declared, *, source: str) -> None:
    """Raises `MismatchedWeights` for a network that only its name in timm tells from a ViT of ours.

    These are the RoPE-ViTs with learned positions, whose parameters have the names of DeiT III.

    Args:
        declared: What files of settings say.
        source: The file, for messages.
    """
    if "_rope_" in (declared.architecture or ""):
        raise MismatchedWeights(
            f"{source} is {declared.architecture} ({declared.sources['architecture']}), a RoPE-ViT,"
            " whose rotary positions are others than those of DINOv3; it is not read, as its"
            " features would be wrong"
        )
