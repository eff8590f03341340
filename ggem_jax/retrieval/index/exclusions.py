"""Files and folders that an index leaves out, by patterns that it keeps.

A pattern is a glob. Without a slash it is compared with the name of every file and folder; with one
it is compared with the path relative to the root (`*` crosses folders), and a leading slash says
that a pattern with no other slash is such a path. A folder is left out with everything in it.
"""

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import cached_property

# Hidden files and folders, and what file servers, operating systems and photo programs keep beside
# photos: thumbnails, recycle bins, snapshots, previews.
DEFAULTS = (
    ".*", "@eaDir", "@tmp", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX",
    "System Volume Information", "lost+found", "node_modules", "*.lrdata",
)  # fmt: skip


@dataclass(frozen=True)
class Exclusions:
    """Patterns of what is left out, and of what is not left out although one of these matches."""

    exclude: tuple[str, ...] = DEFAULTS
    include: tuple[str, ...] = ()

    def find(self, path: str) -> str | None:
        """Returns the pattern that leaves out a path, or None; folders above it do not count.

        Args:
            path: Path relative to the root.
        """
        if not self._excluded.match(path) or self._included.match(path):
            return None
        return next(each for each in self.exclude if _Patterns((each,)).match(path))

    def find_above(self, path: str) -> str | None:
        """Returns the pattern that leaves out a path or a folder above it, or None.

        Args:
            path: Path relative to the root.
        """
        parts = path.split("/")
        above = ("/".join(parts[: end + 1]) for end in range(len(parts)))
        return next((found for each in above if (found := self.find(each)) is not None), None)

    def change(self, exclude: Iterable[str] = (), include: Iterable[str] = ()) -> "Exclusions":
        """Returns the exclusions with further patterns.

        Args:
            exclude: Patterns to leave out; the same patterns are dropped from `include`.
            include: Patterns not to leave out. If `exclude` has the same pattern, or the one that
                `remove` wrote for this path, that one is dropped; otherwise the new pattern is an
                exception.
        """
        changed = self
        for pattern in exclude:
            kept = tuple(each for each in changed.include if each != pattern)
            old = (*changed.exclude, *(() if pattern in changed.exclude else (pattern,)))
            changed = replace(changed, exclude=old, include=kept)
        for pattern in include:
            same = {pattern, f"/{pattern.strip('/')}", as_pattern(pattern.strip("/"))}
            left = tuple(each for each in changed.exclude if each not in same)
            new = () if left != changed.exclude or pattern in changed.include else (pattern,)
            changed = replace(changed, exclude=left, include=(*changed.include, *new))
        return changed

    @cached_property
    def _excluded(self) -> "_Patterns":
        return _Patterns(self.exclude)

    @cached_property
    def _included(self) -> "_Patterns":
        return _Patterns(self.include)


def as_pattern(path: str) -> str:
    """Returns the pattern that matches one path and nothing else.

    Args:
        path: Path relative to the root.
    """
    return f"/{glob.escape(path)}"


class _Patterns:
    """Patterns, compiled to one expression for names and one for paths."""

    def __init__(self, patterns: tuple[str, ...]):
        of_paths = [each for each in patterns if "/" in each.rstrip("/")]
        self.names = _compile([each for each in patterns if each not in of_paths])
        self.paths = _compile(of_paths)

    def match(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        return bool(self.names.match(name) or self.paths.match(path))


def _compile(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(each.strip("/")) for each in patterns) or r"(?!)")
