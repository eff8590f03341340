"""Choices of a network that the shapes of its weights do not tell, and the evidence for each.

The order of evidence: what the user gives; a publisher's file of settings (`declared`); a row of
the tables here, each with its source. What none of them decides is not guessed: `AmbiguousWeights`
asks for it, and names the flag and the key of `config.json` that answer.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ggem_jax.files.errors import AmbiguousWeights, MismatchedWeights
from ggem_jax.models.transformer import GELU
from ggem_jax.weights.declared import (
    GELUS,
    Declared,
    Facts,
    Norms,
    is_name,
    other_kind_of_name,
    other_sizes_of_name,
)

TIMM = "timm 1.0.22, vision_transformer.py and deit.py"

# Heads by the channels of a token. In the networks of these publishers a width has one number.
HEADS: dict[int, tuple[int, str]] = {
    192: (3, "DeiT-Ti (arXiv:2012.12877, table 1)"),
    256: (4, TIMM),
    320: (5, TIMM),
    384: (6, "ViT-S of DeiT and DINO (arXiv:2012.12877, table 1)"),
    512: (8, TIMM),
    640: (10, TIMM),
    768: (12, "ViT-B (arXiv:2010.11929, table 1)"),
    832: (13, TIMM),
    896: (14, TIMM),
    1024: (16, "ViT-L (arXiv:2010.11929, table 1)"),
    1152: (16, "So400m (arXiv:2305.13035)"),
    1280: (16, "ViT-H (arXiv:2010.11929, table 1)"),
    1408: (16, "ViT-g (arXiv:2106.04560, table 2)"),
    1664: (16, "ViT-G (arXiv:2106.04560, table 2)"),
    1792: (16, "ViT-e (arXiv:2209.06794)"),
}
# Where a family has other heads than the table, or the width stands for several networks.
HEADS_OF_FAMILY: dict[tuple[str, int], tuple[int, str]] = {
    ("dinov2", 1536): (24, "DINOv2-g (facebookresearch/dinov2, vision_transformer.py)"),
    ("siglip", 1536): (16, "SigLIP 2 giant-opt (arXiv:2502.14786)"),
    ("dinov3", 1152): (18, "So400m of DINOv3 (facebookresearch/dinov3, vision_transformer.py)"),
    ("dinov3", 1280): (20, "DINOv3 H+ (facebookresearch/dinov3, hub/backbones.py)"),
    ("dinov3", 1536): (24, "g of DINOv3 (facebookresearch/dinov3, vision_transformer.py)"),
    ("dinov3", 4096): (32, "DINOv3 7B (facebookresearch/dinov3, hub/backbones.py)"),
}
# Heads of text towers: those of CLIP and of open_clip's configs have one for 64 channels.
OPEN_CLIP = "open_clip, model_configs"
TEXT_HEADS: dict[int, tuple[int, str]] = {
    **{width: (width // 64, OPEN_CLIP) for width in (256, 384, 512, 640, 768, 1024, 1280)},
    1152: (16, "So400m (arXiv:2305.13035)"),
}
# GELU of timm's SigLIP: (width, patch) -> GELU. Google trained all of them with tanh; timm runs
# some with the exact one. Of width 1024 the size of the images decides (`_known_gelu`).
SIGLIP_OF_TIMM: dict[tuple[int, int], tuple[GELU, str]] = {
    (768, 16): ("exact", TIMM),
    (768, 32): ("tanh", TIMM),
    (1152, 14): ("exact", TIMM),
    (1152, 16): ("tanh", TIMM),
    (1536, 16): ("tanh", TIMM),
}
# the same by timm's names
_TANH_IN_TIMM = "giantopt_|so400m_patch16_|base_patch32_|large_patch16_siglip_(gap_)?512"


# Buffers that OpenAI's own files of CLIP hold, and the files of others do not.
OPENAI_BUFFERS = frozenset({"input_resolution", "context_length", "vocab_size"})


class Settings(NamedTuple):
    """Where files of settings are looked for."""

    path: Path  # of the weights, beside which they are
    architecture: str | Path | None = None  # a file that the user names instead


class Given(NamedTuple):
    """Choices of the user; None leaves a choice to the evidence."""

    heads: int | None = None
    gelu: GELU | None = None
    norm_eps: float | None = None
    norm: Norms | None = None
    architecture: str | None = None  # the name of a model of timm
    which: str | None = None  # the network of a file with several (`read_checkpoint`)


NOTHING_GIVEN = Given()


def take_name(given: Given, architecture: str | Path | None) -> tuple[Given, str | Path | None]:
    """Returns the choices and the file of settings that an architecture, given as text, stands for.

    Args:
        given: Choices of the user.
        architecture: The name of a model of timm, a file of settings or its folder, or None.
            What reads like a name of timm and is no file is taken for a name.

    Returns:
        The choices with the name, and the file, which is None if it was a name.
    """
    name = str(architecture or "")
    if not is_name(name) or Path(name).exists():
        return given, architecture
    return given._replace(architecture=name), None


def add_name(
    declared: Declared,
    given: Given,
    sizes: Mapping[str, int],
    *,
    source: str,
    facts: Facts | None = None,
) -> Declared:
    """Returns what is declared, with the name of the model that the user gives, if any.

    Args:
        declared: What files of settings say.
        given: Choices of the user.
        sizes: `hidden_size` and `patch_size` of the weights.
        source: The file, for messages.
        facts: What names and shapes say; None: only sizes are compared.

    Raises:
        MismatchedWeights: The name is of a network of other sizes, or of another kind.
    """
    if given.architecture is None:
        return declared
    other = other_sizes_of_name(given.architecture, sizes)
    if not other and facts is not None:
        other = other_kind_of_name(given.architecture, facts)
    if other:
        raise MismatchedWeights(
            f"{source} is not {given.architecture}, which has {other}: name the model that it is"
        )
    sources = declared.sources | {"architecture": "given"}
    return replace(declared, architecture=given.architecture, sources=sources)


@dataclass
class Evidence:
    """The choices made so far, and where each came from."""

    given: Given
    declared: Declared
    source: str  # the file, for messages
    found: dict[str, str] = field(default_factory=dict)
    stated: set[str] = field(
        default_factory=set
    )  # choices that the user or a file of settings made

    def settle(self, name: str, known: tuple[Any, str] | None, question: str, answer: str) -> Any:
        """Returns the value of a choice and writes down where it came from.

        Args:
            name: The choice, a field of `Given` and of `Declared`.
            known: The value of a table and the row's source; None: no row decides.
            question: What is not known, for the message.
            answer: The flag, the argument and the key of `config.json` that settle it.

        Returns:
            The value.

        Raises:
            AmbiguousWeights: Nothing decides.
        """
        if (value := getattr(self.given, name)) is not None:
            self.found[name] = "given"
            self.stated.add(name)
        elif (value := getattr(self.declared, name, None)) is not None:
            self.found[name] = self.declared.sources[name]
            self.stated.add(name)
        elif known is not None:
            value, self.found[name] = known
            if known[1] in self.declared.sources.values():  # a row for the name of the model
                self.stated.add(name)
        else:
            ignored = "".join(f"; {each}" for each in self.declared.ignored)
            raise AmbiguousWeights(
                f"{self.source} does not say {question}: give {answer}, or put the publisher's"
                f" config.json beside the file{ignored}"
            )
        return value


def decide_heads(
    evidence: Evidence, facts: Facts, by_shape: int | None = None, told_by: str = "kernels"
) -> int:
    """Returns the attention heads of an image tower.

    Args:
        evidence: What was given and declared; the source of the choice is written into it.
        facts: What names and shapes say.
        by_shape: Heads of kernels that have an axis for them, as Flax's do, or of the periods of
            rotary positions; None: neither tells them.
        told_by: Which of the two it is, "kernels" or "periods".

    Returns:
        The number of heads.

    Raises:
        AmbiguousWeights: No published network has this width, or several with different heads have.
        MismatchedWeights: Other heads are given than the kernels have.
    """
    if by_shape is not None:
        return _heads_by_shape(evidence, by_shape, told_by)
    family = HEADS_OF_FAMILY.get((facts.family, facts.width))
    row = family or HEADS.get(facts.width)
    about = f"and no published network of width {facts.width} is known"
    name = evidence.declared.architecture or ""
    if facts.of_moco and facts.width == 384 and not name:
        row, about = None, "and ViT-S has 12 in MoCo v3, 6 elsewhere"
    elif not name and (doubt := _other_heads(facts)):
        row, about = None, doubt
    elif _is_gap(name, facts):
        row, about = (16, evidence.declared.sources["architecture"]), ""
    elif _may_be_gap(facts) and not name:
        row, about = None, "and ViT-B without a class token has 12 or 16 in timm"
    elif "_dinov2" in name and facts.width == 1536:
        row = HEADS_OF_FAMILY["dinov2", 1536]
    elif facts.width == 1536 and family is None:
        about = "and a network of width 1536 has 12, 16 or 24"
    return evidence.settle(
        "heads", row, f"how many attention heads it has, {about}", _ANSWERS["heads"]
    )


def _other_heads(facts: Facts) -> str:
    """Which published network of this width has other heads than the table, or ""."""
    if facts.layout == "timm" and facts.width == 384 and facts.fixed_positions:
        return "and ViT-S with fixed positions has 12 in MoCo v3, 6 elsewhere"
    if facts.layout == "timm" and facts.width == 384 and facts.of_visual:
        return "and ViT-S has 12 in SLIP, 6 elsewhere"
    if facts.family == "mae" and facts.width == 192:
        return "and ViT-Ti has 12 in MAE-Lite, 3 elsewhere"
    if (facts.width, facts.mlp_width, facts.depth) == (768, 2304, 8):
        return "and 8 blocks with MLPs of 2304 are timm's old vit_small_patch16_224, which has 8"
    return ""


def has_fixed_positions(table: np.ndarray | None) -> bool:
    """Returns whether positions are sines and cosines of the places, as MAE and MoCo v3 fix them.

    Args:
        table: The positions of patches, `(1, n, width)`, with a class token's before them or not;
            None: there are none.

    Returns:
        Whether they are, with a mean distance below 1e-3.
    """
    if table is None or table.ndim != 3 or table.shape[2] % 4:
        return False
    side, width = math.isqrt(table.shape[1]), table.shape[2]
    if side < 2 or table.shape[1] - side * side not in (0, 1):
        return False
    waves = np.arange(side)[:, None] / 10000 ** (np.arange(width // 4) * 4 / width)
    axis = np.concatenate([np.sin(waves), np.cos(waves)], axis=1)
    slow, fast = np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))
    own = table[0, -side * side :].astype(np.float64)
    orders = ((slow, fast), (fast, slow))  # of MoCo v3 and of MAE
    return any(np.abs(own - np.concatenate(each, axis=1)).mean() < 1e-3 for each in orders)


def decide_first_norm(declared: Declared, facts: Facts, *, source: str) -> None:
    """Raises if nothing tells a CLIP without the norm before its blocks from a CLIPA.

    Args:
        declared: What files of settings say.
        facts: What names and shapes say.
        source: The file, for messages.

    Raises:
        AmbiguousWeights: No file of open_clip describes the tower.

    Reference: Li et al., "An Inverse Scaling Law for CLIP Training", 2023, arXiv:2305.07017: its
        networks pool by average, and their last norm comes after it.
    """
    if facts.layout == "clip" and facts.family != "clip" and declared.open_clip is None:
        raise AmbiguousWeights(
            f"{source} has no ln_pre and may be a CLIPA, which pools by average before its last"
            " norm and is not read: put its open_clip_config.json beside the file, or give it as"
            ' --architecture (architecture="...")'
        )


def decide_text_heads(evidence: Evidence, width: int, by_shape: int | None = None) -> int:
    """Returns the attention heads of a text tower.

    Args:
        evidence: What was given and declared; the source of the choice is written into it.
        width: Channels of a token.
        by_shape: Heads of kernels that have an axis for them, as Flax's do; None: no such kernels.

    Returns:
        The number of heads.

    Raises:
        AmbiguousWeights: No published text tower has this width.
        MismatchedWeights: Other heads are given than the kernels have.
    """
    if by_shape is not None:
        return _heads_by_shape(evidence, by_shape)
    question = (
        "how many attention heads its text tower has, and no published one of width"
        f" {width} is known"
    )
    return evidence.settle("heads", TEXT_HEADS.get(width), question, _ANSWERS["heads"])


def _heads_by_shape(evidence: Evidence, heads: int, told_by: str = "kernels") -> int:
    if evidence.given.heads not in (None, heads):
        raise MismatchedWeights(
            f"{evidence.source} has {told_by} of {heads} heads, not {evidence.given.heads}"
        )
    evidence.found["heads"] = f"shape of the attention's {told_by}"
    return heads


def decide_gelu(evidence: Evidence, facts: Facts) -> GELU:
    """Returns the GELU of the MLPs; "exact" for gated ones, which have none.

    Args:
        evidence: What was given and declared; the source of the choice is written into it.
        facts: What names and shapes say.

    Returns:
        The GELU.

    Raises:
        AmbiguousWeights: Published networks of this kind differ: CLIP's is "quick" in the files of
            OpenAI, MetaCLIP and DFN, and "exact" in most others.
        MismatchedWeights: A file of settings declares an activation that is no GELU, or a gated MLP
            with another one than SiLU.
    """
    declared = evidence.declared
    if facts.gated:
        # of DINOv3 by Hugging Face, whose DINOv2 has SiLU whatever its file says
        gate = declared.activation if facts.family == "dinov3" else None
        if gate not in (None, "silu", "swish"):
            raise MismatchedWeights(
                f"{evidence.source} has gated MLPs with the activation {gate!r}"
                f" ({declared.sources['activation']}), where ours have silu"
            )
        evidence.found["gelu"] = "not used: the MLPs are gated (SwiGLU)"
        return "exact"
    if evidence.given.gelu is None and declared.activation is not None:
        evidence.found["gelu"] = declared.sources["activation"]
        evidence.stated.add("gelu")
        if declared.activation not in GELUS:
            raise MismatchedWeights(
                f"{evidence.source} has the activation {declared.activation!r}"
                f" ({declared.sources['activation']}), which is no GELU of ours: {', '.join(GELUS)}"
            )
        return GELUS[declared.activation]
    return evidence.settle("gelu", _known_gelu(facts, declared), *_GELU_QUESTION)


def decide_norms(evidence: Evidence, facts: Facts) -> Norms:
    """Returns whether the norms of a block stand before its branches or after them.

    Args:
        evidence: What was given and declared; the source of the choice is written into it.
        facts: What names and shapes say.

    Returns:
        "pre" or "post".

    Raises:
        AmbiguousWeights: The file has the parameters of timm's residual post-norm networks, which
            have the same names as pre-norm ones.
    """
    name = evidence.declared.architecture
    signature = (
        facts.layout == "timm"
        and facts.final_norm == "fc_norm"
        and not facts.class_token
        and not facts.qkv_bias
    )
    row: tuple[Norms, str] | None
    if name is not None:
        row = ("post" if "_rpn_" in name else "pre", evidence.declared.sources["architecture"])
    elif signature:
        row = None
    else:
        row = ("pre", f"its names are not those of post-norm networks ({TIMM})")
    return evidence.settle(
        "norm",
        row,
        "whether its norms come before or after the branches of a block",
        _ANSWERS["norm"],
    )


def decide_positions(declared: Declared, *, source: str) -> None:
    """Raises if nothing tells DeiT III from a RoPE-ViT, whose parameters have the same names.

    Args:
        declared: What files of settings say.
        source: The file, for messages.

    Raises:
        AmbiguousWeights: No file of settings names the network.

    Reference: Heo et al., "Rotary Position Embedding for Vision Transformer", 2024,
        arXiv:2403.13298: its networks are those of DeiT III, with rotary positions beside them.
    """
    if declared.architecture is None:
        raise AmbiguousWeights(
            f"{source} may be DeiT III or a RoPE-ViT, whose parameters have the same names: give"
            " its name in timm, such as --architecture deit3_small_patch16_224"
            ' (architecture="..."), or put timm\'s config.json beside the file'
        )


def decide_norm_eps(evidence: Evidence, facts: Facts, usual: float) -> float:
    """Returns the epsilon of the norms.

    Args:
        evidence: What was given and declared; the source of the choice is written into it.
        facts: What names and shapes say.
        usual: That of the family.

    Returns:
        The epsilon.
    """
    row = (1e-12, "default of Hugging Face's vit, deit and vit_mae")
    if facts.layout != "hf-vit":
        row = (usual, f"family {facts.family}")
    return evidence.settle("norm_eps", row, "the epsilon of its norms", "norm_eps=1e-6")


_ANSWERS: Mapping[str, str] = {
    "heads": '--heads N (heads=N; "num_attention_heads" in config.json)',
    "norm": '--norm pre or --norm post (norm="post"; "architecture" in timm\'s config.json)',
    "gelu": '--gelu exact, tanh or quick (gelu="exact"; "hidden_act" in config.json)',
}
_GELU_QUESTION = (
    "which GELU it was trained with, and published networks of its kind differ",
    _ANSWERS["gelu"],
)


def _known_gelu(facts: Facts, declared: Declared) -> tuple[GELU, str] | None:
    name = declared.architecture
    if facts.family == "clip":
        if name is not None:
            quick = "quickgelu" in name
            return ("quick" if quick else "exact"), declared.sources["architecture"]
        return ("quick", "buffers that only OpenAI's own files hold") if facts.of_openai else None
    if facts.layout in ("augreg", "big_vision"):
        return "tanh", "default of Flax, in which it was trained"
    if facts.family == "siglip" and facts.layout != "timm":
        return "tanh", "SigLIP (arXiv:2303.15343), as trained in Flax"
    if name is not None and "_siglip_" in name:
        tanh = re.search(_TANH_IN_TIMM, name) is not None
        return ("tanh" if tanh else "exact"), declared.sources["architecture"]
    of_timm = facts.family == "siglip" or _may_be_siglip(facts)
    if of_timm and (facts.width, facts.patch) in {*SIGLIP_OF_TIMM, (1024, 16)}:
        if (facts.width, facts.patch) == (1024, 16):
            return ("tanh" if facts.image >= 512 else "exact"), TIMM
        return SIGLIP_OF_TIMM[facts.width, facts.patch]
    if facts.family == "siglip":
        return None
    return "exact", f"family {facts.family}"


def _may_be_siglip(facts: Facts) -> bool:
    """Whether it has the names of timm's SigLIP without its pooling (`..._siglip_gap_...`)."""
    return (
        facts.layout == "timm"
        and facts.family == "vit"
        and not facts.class_token
        and facts.final_norm == "norm"
    )


def _may_be_gap(facts: Facts) -> bool:
    """Whether it has the names of timm's `vit_base_patch16_gap_224`, as its SigLIP has."""
    return facts.width == 768 and _may_be_siglip(facts)


def _is_gap(name: str, facts: Facts) -> bool:
    return name.startswith("vit_base_patch16_gap_") and facts.width == 768
