"""The values of a `config.json` of Hugging Face, read with care: nothing is guessed in silence."""

from collections.abc import Mapping
from typing import Any

# Ours of the fields that a file may leave out.
OURS = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "sliding_window": "window",
    "vocab_size": "vocabulary",
}


class Config:
    """The values of a `config.json`, and notes on what it leaves open.

    Attributes:
        values: The values by name.
        kind: Its `model_type`.
        notes: What the file leaves open, a sentence by the field of ours that it is about.
    """

    def __init__(self, values: Mapping[str, Any]):
        """Keeps the values.

        Args:
            values: The values of the file by name, with `model_type`.
        """
        self.values = values
        self.kind = str(values["model_type"])
        self.notes: dict[str, str] = {}

    def need(self, *names: str, least: int = 0) -> int:
        """Returns the first of these numbers that the file has.

        Args:
            names: Names of the same number.
            least: The smallest value that is allowed.

        Raises:
            ValueError: The file has none of them, or its value is not a whole number.
        """
        for name in names:
            if self.values.get(name) is not None:
                return self._check(name, self.values[name], least)
        raise ValueError(f"{' or '.join(names)} must be given for the model_type {self.kind}")

    def get(self, name: str, default: int = 0, *, least: int = 0) -> int:
        """Returns a number that may be left out or null.

        Args:
            name: Its name.
            default: Its value where it is left out or null.
            least: The smallest value that is allowed.

        Raises:
            ValueError: The value is not a whole number, or too small.
        """
        value = self.values.get(name)
        return default if value is None else self._check(name, value, least)

    def list(self, name: str) -> list[Any]:
        """Returns a list, empty where it is left out or null.

        Args:
            name: Its name.

        Raises:
            ValueError: The value is not a list.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{name} must be a list, not {value!r}")
        return value or []

    def assume(self, name: str, default: int) -> int:
        """Returns a number; where the file leaves it out, the architecture's default, with a note.

        A null is a statement of the file, "none", and gives 0.

        Args:
            name: Its name.
            default: The default of the architecture.

        Raises:
            ValueError: The value is not a whole number.
        """
        if name in self.values:
            return self.get(name)
        self.notes[OURS.get(name, name)] = (
            f"{name} is not in the file: {default}, the default of {self.kind}"
        )
        return default

    def flag(self, name: str, default: bool) -> bool:
        """Returns a switch that may be left out or null.

        Args:
            name: Its name.
            default: Its value where it is left out or null.

        Raises:
            ValueError: The value is neither true nor false.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return default if value is None else value

    @staticmethod
    def _check(name: str, value: Any, least: int = 0) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        return value
