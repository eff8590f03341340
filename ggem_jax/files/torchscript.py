"""The tensors of a TorchScript archive, as `torch.jit.save` writes it. Its program is never read.

Such an archive is a checkpoint whose pickle holds the modules themselves: objects of classes
`__torch__...`, which the archive's own code defines. An object is made empty (`NEWOBJ`) and is
given its attributes (`BUILD`), so that it can be read as a bag of attributes, and the code, which
lies in the folder `code`, can stay unread. OpenAI's CLIP comes in such files.

Reference: "Serialization" in PyTorch's documentation of the JIT, torch/csrc/jit/docs, and
torch/jit/_pickle.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ggem_jax.files.plain_values import Bag, Budget, Class, Function

_MODULE = Class("__torch__", lambda: Bag())


class ProgramNames(dict):
    """Names that the pickle of such an archive may ask for: of any class of its program, too."""

    def __contains__(self, name: object) -> bool:
        """Returns whether the pickle may ask for a name."""
        return super().__contains__(name) or str(name).startswith("__torch__.")

    def __missing__(self, name: str) -> Class:
        """Returns the stand-in of a class of the program."""
        return _MODULE


def _typed(*kinds: type) -> Callable[..., Any]:
    """A function that returns its first argument, which must be of one of the types."""

    def call(value, *_):
        if not isinstance(value, kinds):
            raise ValueError(f"a list of TorchScript that is a {type(value).__name__}")
        return value

    return call


_FUNCTIONS = {
    "restore_type_tag": _typed(list, dict),
    **dict.fromkeys(
        ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"), _typed(list)
    ),
}
PROGRAM = {
    f"torch.jit._pickle.{name}": Function(f"torch.jit._pickle.{name}", call)
    for name, call in _FUNCTIONS.items()
}


def named_arrays(module: Any, budget: Budget) -> dict[str, np.ndarray]:
    """Returns the arrays of a module by the names that its `state_dict` gives them.

    Args:
        module: Attributes by name, among them arrays and other modules.
        budget: Is charged for the names: a module may stand in several places.

    Returns:
        The arrays, such as that of `visual.conv1.weight`.

    Raises:
        ValueError: The budget is exceeded.
    """

    def walk(module: Bag, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        for name, value in module.items():
            budget.spend(16 + len(prefix) + len(name))
            if isinstance(value, Bag):
                yield from walk(value, f"{prefix}{name}.")
            elif isinstance(value, np.ndarray):
                yield prefix + name, value

    return dict(walk(module, "")) if isinstance(module, Bag) else {}
