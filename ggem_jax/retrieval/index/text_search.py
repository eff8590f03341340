"""Searches an index by words: weighted texts -> one vector -> results.

The index must have been made with the pooling "clip", so that its vectors share a space with texts.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ggem_jax.retrieval.index.describing import find_settings
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.search import Results
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.methods import Method

Encode = Callable[[Sequence[str]], Float[np.ndarray, "m d"]]  # texts -> unit vectors

_SIGN = re.compile(r"(?:^|(?<=\s))([+-])(?=\s|$)")
_WEIGHT = re.compile(r"(\d+(?:\.\d+)?|\.\d+):\s*")
_LEAST_LENGTH = 1e-3  # of a sum of unit vectors that still has a direction


class Term(NamedTuple):
    """A part of a query."""

    weight: float  # negative after a minus
    text: str


def parse_words(words: str) -> list[Term]:
    """Returns the terms of a query such as `lighthouse + 0.5:red - people`.

    Signs stand alone, between spaces; a number and a colon before a text weight it.

    Args:
        words: The query.

    Raises:
        ValueError: A term has no text.

    Example:
        >>> from ggem_jax.retrieval.index.text_search import parse_words
        >>> [tuple(term) for term in parse_words("2:red lighthouse - people")]
        [(2.0, 'red lighthouse'), (-1.0, 'people')]
    """
    first, *rest = _SIGN.split(words)
    signed = list(zip(rest[::2], rest[1::2], strict=True))
    if first.strip() or not signed:
        signed.insert(0, ("+", first))
    found = []
    for sign, part in signed:
        weight = _WEIGHT.match(text := part.strip())
        text = text[weight.end() :] if weight else text
        if not text:
            raise ValueError(f"a term of {words!r} has no text: write words beside + and -")
        value = float(weight[1]) if weight else 1.0
        found.append(Term(value if sign == "+" else -value, text))
    return found


def vector_of_words(words: str, encode: Encode) -> Float[np.ndarray, " d"]:
    """Returns the vector of a query: the weighted sum of the terms' unit vectors, of length 1.

    Args:
        words: The query, as `parse_words` takes it.
        encode: Function from texts to unit vectors `(m, d)`.

    Raises:
        ValueError: A term has no text, or the terms cancel each other.
    """
    terms = parse_words(words)
    weights = np.array([term.weight for term in terms], np.float32)
    total = weights @ encode([term.text for term in terms])
    length = np.linalg.norm(total)
    if length < _LEAST_LENGTH * max(np.abs(weights).sum(), 1e-30):
        raise ValueError(f"the terms of {words!r} cancel each other: nothing is left to search for")
    return total / length


def load_text_encoder(index: Index, *, weights: str | None = None) -> Encode:
    """Returns the text tower of the network that an index was made with.

    Args:
        index: The opened index.
        weights: Where the file of weights is now; None takes its old place.

    Raises:
        IndexRefused: The index was made without the pooling "clip", or the file is not there.
        UnreadableWeights: The file cannot be read.
        MismatchedWeights: The file has no text tower.
        ValueError: There is no tokenizer beside the file.
        ModuleNotFoundError: The package tokenizers is not installed.
    """
    if not takes_words(index):
        raise IndexRefused(
            f"{index.folder} cannot be searched by words: index the images with --pooling clip and"
            " --weights FILE, a file of CLIP or SigLIP with both towers and the tokenizer.json of"
            " the network beside it"
        )
    # a whitening is not applied to texts, so that an index of one is refused above
    settings = find_settings(index.folder, index.settings, weights=weights)
    from ggem_jax.descriptors.texts import TextEncoder  # loads JAX

    return TextEncoder(str(settings.weights))


def takes_words(index: Index) -> bool:
    """Returns whether the vectors of an index share a space with texts.

    Args:
        index: The opened index.
    """
    return index.settings.get("pooling") == "clip" and index.settings.get("whitening") is None


def search_by_words(
    index: Index,
    words: Sequence[str],
    k: int = 10,
    *,
    rerank: Method | str | None = None,
    weights: str | None = None,
    **options: Any,
) -> Results:
    """Returns the k images that are most like each query in words, best first.

    Args:
        index: The opened index.
        words: Queries, as `parse_words` takes them.
        k: Results of each query; the size of the index if it is larger.
        rerank: As in `Index.search`.
        weights: As in `load_text_encoder`.
        **options: `store` and `collection` of `Index.search`.

    Returns:
        The results; `queries` are the words.

    Raises:
        IndexRefused: As in `load_text_encoder`.
        ValueError: As in `load_text_encoder` and `vector_of_words`.
    """
    for each in words:
        parse_words(each)
    encode = load_text_encoder(index, weights=weights)
    vectors = np.stack([vector_of_words(each, encode) for each in words])
    return replace(index.search(vectors, k, rerank=rerank, **options), queries=tuple(words))
