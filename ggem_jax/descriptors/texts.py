"""Texts -> unit vectors in the space that the text tower of CLIP or SigLIP shares with images.

Needs the package tokenizers, of the extra `text`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.weights.text import read_text

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class TextEncoder:
    """Makes vectors of texts.

    Args:
        weights: File of the weights of both towers. `tokenizer.json` is beside it, and for SigLIP
            `tokenizer_config.json`, which names the padding.

    Raises:
        UnreadableWeights: The file cannot be read.
        MismatchedWeights: The file has no text tower, or no projection.
        ValueError: There is no tokenizer beside it, or it does not fit.
        ModuleNotFoundError: The package tokenizers is not installed.
    """

    def __init__(self, weights: str | Path):
        self._tower = read_text(weights)
        if not self._tower.outputs:
            raise MismatchedWeights(
                f"{weights} lacks the projection of texts: name the file of both towers"
            )
        self._tokenizer = _Tokenizer(Path(weights).parent, self._tower.config.context)
        if self._tokenizer.size > self._tower.config.vocabulary:
            raise ValueError(
                f"{self._tokenizer.file} has {self._tokenizer.size} ids where {weights} has"
                f" {self._tower.config.vocabulary}: it belongs to another network"
            )
        self._apply = jax.jit(self._tower.model().apply)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "m d"]:
        """Returns the vectors of texts, of length 1.

        Args:
            texts: At least one text. What is longer than the context of the network is cut off.

        Returns:
            The vectors, `(m, d)` in float32.

        Raises:
            ValueError: The tokenizer does not end or pad texts as the network requires.
        """
        config = self._tower.config
        ids = self._tokenizer.encode(texts, needs_padding=config.pooled == "last")
        end = config.vocabulary - 1 if config.end_id is None else config.end_id
        if config.pooled == "end" and not (ids == end).any(axis=1).all():
            raise ValueError(
                f"{self._tokenizer.file} does not end texts with the id {end}, whose token the"
                " network reads: it belongs to another network"
            )
        output: Any = self._apply(self._tower.variables, ids)
        vectors = np.asarray(output.projected, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class _Tokenizer:
    """The tokenizer in a folder, with rows as long as the context."""

    def __init__(self, folder: Path, context: int):
        try:
            import tokenizers
        except ImportError:
            raise ModuleNotFoundError(
                "a search by words needs the package tokenizers: pip install 'ggem-jax[text]'"
            ) from None
        self.file, self.context = folder / TOKENIZER, context
        if not self.file.is_file():
            raise ValueError(
                f"{self.file} is not there: a search by words needs the {TOKENIZER} of the network"
                " beside its weights"
            )
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # all its errors are plain Exceptions
            raise ValueError(f"{self.file} is no tokenizer: {error}") from None
        padding = (self._tokenizer.padding or {}).get("pad_token")
        self._pad = _pad_of(folder / TOKENIZER_CONFIG) or padding
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(context)

    @property
    def size(self) -> int:
        """The smallest number above all ids."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], *, needs_padding: bool) -> Int[np.ndarray, "m n"]:
        """Returns ids with start and end tokens, as the tokenizer adds them, and padding.

        A causal tower (CLIP) does not see what follows the end, so that any id is padding.
        """
        pad = None if self._pad is None else self._tokenizer.token_to_id(self._pad)
        if pad is None and needs_padding:
            raise ValueError(
                f"the padding of {self.file} is not known: put the {TOKENIZER_CONFIG} of the"
                " network beside it"
            )
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        ids = np.full((len(rows), self.context), 0 if pad is None else pad, np.int32)
        for row, own in zip(ids, rows, strict=True):
            row[: len(own)] = own
        return ids


def _pad_of(file: Path) -> str | None:
    """The text of the padding token in the publisher's settings."""
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token
