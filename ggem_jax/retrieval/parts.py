"""Parts of a folder that are indexed on different hosts: each file belongs to one of them.

`ggem_jax.retrieval.index.merging` joins the parts.
"""

import hashlib
import os
import re
from typing import NamedTuple

MOST_PARTS = 65_536


class Part(NamedTuple):
    """The I-th of N parts of a folder."""

    number: int  # from 1
    total: int

    @classmethod
    def parse(cls, text: str | None) -> "Part | None":
        """Returns the part that "I/N" names, or None for None.

        Args:
            text: "I/N" with 1 <= I <= N.

        Raises:
            ValueError: The text names no part.
        """
        if text is None:
            return None
        found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text) if isinstance(text, str) else None
        part = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= part.number <= part.total <= MOST_PARTS:
            raise ValueError(
                f"a shard must be I/N with I from 1 to N and N at most {MOST_PARTS}, such as 2/8,"
                f" not {text!r}"
            )
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def holds(self, path: str) -> bool:
        """Returns whether a file belongs to this part, which its path alone decides.

        Args:
            path: Path of the file relative to the root.
        """
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.total == self.number - 1
