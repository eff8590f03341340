"""Our docstrings in the words of Griffe: an extension of the documentation build.

Griffe knows `Examples:` but not `Example:`, takes a `Reference:` of two lines for a titled box, has
one name for each entry of `Args:`, and looks for the fields of a record under `Attributes:`.
Most fields of our records are explained by comments, which it does not read.
"""

import io
import re
import tokenize
from typing import Any

import griffe

_REFERENCE = re.compile(r"^(References?):[ \n]*((?:.+\n?)(?:[ ]+.*\n?)*)", flags=re.MULTILINE)
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if not obj.docstring:
            return
        text = _REFERENCE.sub(_paragraph, obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        text = re.sub(r"(?s)(?<=^Args:\n).*?(?=^\S|\Z)", _split, text, flags=re.MULTILINE)
        obj.docstring.value = text

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Lists the fields of a record that have a comment, unless the docstring lists them."""
        if cls.docstring and "__init__" not in cls.members:
            value = cls.docstring.value
            cls.docstring.value = re.sub("^Args:$", "Attributes:", value, flags=re.MULTILINE)
        if cls.docstring and not re.search(
            "^(Args|Attributes):$", cls.docstring.value, re.MULTILINE
        ):
            comments = _comments(cls.lines_collection[cls.filepath])
            fields = {
                name: text
                for name, field in cls.members.items()
                if field.is_attribute and field.annotation and not name.startswith("_")
                if (text := _comment_of(field, comments))
            }
            if fields:
                lines = "".join(f"\n    {name}: {text}" for name, text in fields.items())
                cls.docstring.value += f"\n\nAttributes:{lines}\n"


def _comments(lines: list[str]) -> dict[int, tuple[bool, str]]:
    """By line: whether the comment has the line for itself, and its text."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline)
    return {
        token.start[0]: (not token.line[: token.start[1]].strip(), token.string[1:].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _comment_of(field: griffe.Attribute, comments: dict[int, tuple[bool, str]]) -> str:
    """The comments on the lines of a field, or else the block right above it; or its unit."""
    if isinstance(field.value, griffe.ExprCall) and str(field.value.function) == "quantity":
        default, unit = (str(argument) for argument in field.value.arguments[:2])
        return f"{unit[1:-1]}; {default} by default"
    beside = range(field.lineno, field.endlineno + 1)
    if found := [comments[line][1] for line in beside if line in comments]:
        return " ".join(found)
    above, line = [], field.lineno - 1
    while line in comments and comments[line][0]:
        above.insert(0, comments[line][1])
        line -= 1
    return " ".join(above)


def _paragraph(match: re.Match[str]) -> str:
    """The lines of a reference as one paragraph, its first word in italics."""
    return f"\n*{match[1]}:* {' '.join(match[2].split())}\n"


def _split(arguments: re.Match[str]) -> str:
    """An entry for each of several names that share one, with the same text."""

    def entries(match: re.Match[str]) -> str:
        return "\n".join(match[1] + name + match[3] for name in match[2].split(", "))

    return _SHARED.sub(entries, arguments[0])
