"""Which features of a model a computation has to be told of, and which it refuses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from neupims.machine.layer_kinds import EVERYTHING, Mix, find_mix, has_narrow_products
from neupims.machine.model import Decoder
from neupims.machine.record import Number
from neupims.machine.systems import Fidelity, System


def _mixed(model: Decoder) -> dict[str, Number]:
    """Returns, by field of `Mix`, whether the model has it."""
    return {
        "shared": model.shared_experts > 0,
        "dense": (model.experts > 0) & (model.dense_layers > 0),
        "windows": model.window > 0,
        "narrow": has_narrow_products(model),
        "lm_head": model.lm_head > 0,
        "latent": model.kv_rank > 0,
        "skewed": model.expert_skew > 0,
    }


def is_timed(model: Decoder, mix: Mix = EVERYTHING) -> Bool[Array, "..."]:
    """Returns whether all that a model has is computed.

    Args:
        model: The model; its numbers may be traced, or have a leading axis.
        mix: What is computed beside one kind of layer (default: everything).
    """
    found = jnp.bool_(True)
    for name, present in _mixed(model).items():
        if not getattr(mix, name):
            found = found & ~jnp.asarray(present)
    return found


def check_latent(mix: Mix, *, system: System, fidelity: Fidelity) -> None:
    """Raises if latent attention is to be timed as the public simulator would.

    Args:
        mix: What the model has.
        system: The system; a GPU is the same in both fidelities.
        fidelity: "simulator" or "intended".

    Raises:
        ValueError: The model has latent attention, and the public simulator would have to run it.
    """
    if mix.latent and fidelity == "simulator" and system != "gpu":
        raise ValueError(
            "latent attention (kv_rank) needs the fidelity intended, because the public simulator"
            " keeps the keys and values of each head: --fidelity intended"
        )


def check_alike(model: Decoder) -> None:
    """Raises unless all layers of a model are alike, with one MLP or experts that are routed to.

    Args:
        model: The model.

    Raises:
        ValueError: The model has shared experts, dense layers beside experts, or windows.
    """
    mix = find_mix(model)
    names = {
        "shared": "shared_experts",
        "dense": "dense_layers beside experts",
        "windows": "a window",
    }
    found = [name for which, name in names.items() if getattr(mix, which)]
    if found:
        raise ValueError(
            f"the model has {' and '.join(found)}, for which schedules are not searched yet;"
            " `neupims simulate` times a given schedule"
        )
