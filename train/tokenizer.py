"""Captions -> ids: a byte-pair tokenizer of Hugging Face's `tokenizers`.

It comes from a tokenizer.json or is trained on the captions of the run. A text becomes its start
token, its pieces, its end token, and padding.

References: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016,
arXiv:1508.07909; over bytes as in Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019, section 2.2.
"""

import functools
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ggem_jax.files.atomic import write_text
from train.cli import Refused, first_line

LARGEST_VOCABULARY = 2**24  # far beyond those in use
SMALLEST_VOCABULARY = 258  # of a tokenizer over bytes: all of them, start and end
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's

# How tokenizers in use call them, the first that is there; a start may be missing. CLIP and GPT-2;
# Llama, T5 and RoBERTa; Gemma; BERT; Llama 3.
ENDS = (END, "</s>", "<eos>", "[SEP]", "<|end_of_text|>")
STARTS = (START, "<s>", "<bos>", "[CLS]", "<|begin_of_text|>")
PADS = ("<pad>", "[PAD]", "<|pad|>")


class Tokenizer:
    """Turns captions into ids; `text` is the tokenizer.json that it came from.

    Args:
        text: The contents of a tokenizer.json.
        name: How errors name the tokenizer.

    Raises:
        Refused: The text is not a tokenizer, has no end token, or has too many ids.
    """

    def __init__(self, text: str, name: str):
        """Reads a tokenizer.json."""
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # all its errors are plain Exceptions
            raise Refused(
                f"{name} is not a tokenizer that the package tokenizers reads:"
                f" {first_line(error, 'no reason given')}"
            ) from None
        end = self._first(ENDS)
        if end is None:
            raise Refused(
                f"{name} has no token that ends a text: one of {', '.join(ENDS)} is needed"
            )
        self.name, self.text, self.end, self.start = name, text, end, self._first(STARTS)
        if self.size > LARGEST_VOCABULARY:
            raise Refused(
                f"{name} has ids up to {self.size - 1:,}, where at most {LARGEST_VOCABULARY:,}"
                " pieces are taken"
            )
        pad = self._first(PADS)
        self.pad = self.end if pad is None else pad
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # a caption that spells out the end token does not end there
        self._tokenizer.encode_special_tokens = True
        self.row = functools.lru_cache(maxsize=1 << 16)(self._row)

    def __reduce__(self):
        return type(self), (self.text, self.name)  # for the processes that read images

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each piece."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        """The smallest number above all ids."""
        return max(self.vocabulary.values()) + 1

    def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
        """Returns the ids of texts: start, pieces, end and padding.

        A text that is too long loses its last pieces, but not its end token.

        Args:
            texts: The texts.
            context: Ids of each text.

        Returns:
            The ids, `(len(texts), context)` int32.

        Raises:
            Refused: The tokenizer has no pieces for a text.
        """
        return (
            np.stack([self.row(text, context) for text in texts])
            if texts
            else np.zeros((0, context), np.int32)
        )

    def _row(self, text: str, context: int) -> np.ndarray:
        before = [] if self.start is None else [self.start]
        try:
            pieces = self._tokenizer.encode(text, add_special_tokens=False).ids[
                : context - 1 - len(before)
            ]
        except Exception as error:
            # its errors are plain Exceptions, such as over a piece that it has no token for
            raise Refused(
                f"{self.name} cannot encode the text {text[:80]!r}:"
                f" {first_line(error, 'no reason given')}"
            ) from None
        ids = [*before, *pieces, self.end]
        row = np.array(ids + [self.pad] * (context - len(ids)), np.int32)
        row.flags.writeable = False  # many share it
        return row

    def _first(self, names: Sequence[str]) -> int | None:
        return next(
            (number for name in names if (number := self._tokenizer.token_to_id(name)) is not None),
            None,
        )


def read_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of a file.

    Args:
        path: A `tokenizer.json`; `~` is the home directory.

    Raises:
        Refused: The file cannot be read, or holds no tokenizer.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"the tokenizer {path} cannot be read:"
            f" {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from None
    return Tokenizer(text, f"{path}")


def save_run_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer of a run into its folder, with a checksum beside it.

    Args:
        run: Folder of the run.
        tokenizer: The tokenizer, written as `tokenizer.json`.
    """
    write_text(run / "tokenizer.crc32", f"{zlib.crc32(tokenizer.text.encode())}\n")
    write_text(run / "tokenizer.json", tokenizer.text)


def load_run_tokenizer(run: Path) -> Tokenizer:
    """Returns the tokenizer in the folder of a run.

    Args:
        run: Folder of the run.

    Raises:
        Refused: The tokenizer is missing, or is not the one that the run started with.
    """
    tokenizer = read_tokenizer(run / "tokenizer.json")
    try:
        same = int((run / "tokenizer.crc32").read_text()) == zlib.crc32(tokenizer.text.encode())
    except (OSError, ValueError):
        same = False
    if not same:
        raise Refused(
            f"{run}/tokenizer.json is not the one that the run began with: choose another --out"
        )
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    """Returns a byte-level BPE; the same captions in the same order give the same one.

    Args:
        captions: The texts.
        vocabulary: The most pieces it may have, at least `SMALLEST_VOCABULARY`.

    Raises:
        ValueError: `vocabulary` is below `SMALLEST_VOCABULARY`.

    Reference: Sennrich et al., 2016, arXiv:1508.07909.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary must be at least {SMALLEST_VOCABULARY}, all bytes, start and end, not"
            f" {vocabulary}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return Tokenizer(tokenizer.to_str(pretty=True), "the trained tokenizer")
