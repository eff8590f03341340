"""Constraints of a design space: comparisons of arithmetic on names.

An example is `npu.num_arrays * npu.array_width <= 1024`.

Constraints come from files and command lines. They are parsed into a syntax tree in which only
arithmetic is accepted; nothing is evaluated as Python.
"""

import ast
import operator
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

LONGEST = 500  # characters; bounds the depth of the tree, which is walked by recursion
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _excess(left, right):
    """How far the left side is above the right one, relative to both; 0 where it is not above."""
    return np.where(left <= right, 0.0, (left - right) / (np.abs(left) + np.abs(right)))


LEAST = 1e-9  # violation of a strict comparison of equal sides

# The violation of `left OPERATOR right`: 0 where it holds.
FAILURE = {
    ast.LtE: _excess,
    ast.GtE: lambda left, right: _excess(right, left),
    ast.Lt: lambda left, right: np.where(left < right, 0.0, _excess(left, right) + LEAST),
    ast.Gt: lambda left, right: np.where(left > right, 0.0, _excess(right, left) + LEAST),
    ast.Eq: lambda left, right: _excess(left, right) + _excess(right, left),
    ast.NotEq: lambda left, right: np.where(left != right, 0.0, 1.0),
}


@dataclass(frozen=True)
class Constraint:
    """A comparison, or a chain of them."""

    text: str  # as it was given
    tree: ast.Compare  # of arithmetic on names and numbers

    @property
    def names(self) -> set[str]:
        """The names that it uses."""
        return _names(self.tree)

    def violation(self, columns: Mapping[str, np.ndarray | float]) -> np.ndarray:
        """Returns how far each design is from meeting the constraint, relative to its sides.

        Args:
            columns: Values by name: `(n,)`, or one number for all designs.

        Returns:
            `(n,)` violations: 0 where the constraint holds, infinite where it cannot be computed.
        """
        with np.errstate(all="ignore"):
            sides = [_value(side, columns) for side in (self.tree.left, *self.tree.comparators)]
            failed = sum(
                FAILURE[type(each)](left, right)
                for each, left, right in zip(self.tree.ops, sides[:-1], sides[1:], strict=True)
            )
            wrong = sum(np.isnan(side) for side in sides) > 0
        return np.where(wrong | np.isnan(failed), np.inf, failed)


def parse_constraint(text: str, names: Collection[str]) -> Constraint:
    """Returns the constraint that a text states.

    Args:
        text: A comparison of arithmetic expressions, or a chain of comparisons.
        names: Names that the text may use.

    Raises:
        ValueError: The text is too long, is not such a comparison, or uses another name.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a constraint can have at most {LONGEST} characters, not {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"constraint {text!r} is not an expression") from None
    if not isinstance(tree, ast.Compare) or not all(type(each) in FAILURE for each in tree.ops):
        raise ValueError(f"constraint {text!r} must compare two sides by <=, <, >=, >, == or !=")
    for side in (tree.left, *tree.comparators):
        _check(side, text, names)
    return Constraint(text, tree)


def _check(node: ast.expr, text: str, names: Collection[str]) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        _check(node.left, text, names)
        _check(node.right, text, names)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check(node.operand, text, names)
    elif name := _dotted(node):
        if name not in names:
            raise ValueError(
                f"constraint {text!r} uses {name}, which is not a field of the hardware, a knob or"
                " a metric"
            )
    elif not isinstance(node, ast.Constant) or not _finite(node.value):
        raise ValueError(
            f"constraint {text!r} can use names, numbers and + - * / // % **, but not"
            f" {ast.unparse(node)!r}"
        )


def _finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _names(node: ast.AST) -> set[str]:
    if name := _dotted(node):
        return {name}
    return set().union(*map(_names, ast.iter_child_nodes(node)))


def _dotted(node: ast.AST) -> str:
    """The dotted name of a node such as `a.b.c`; "" for other nodes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _value(node: ast.expr, columns: Mapping[str, np.ndarray | float]) -> np.ndarray:
    if isinstance(node, ast.BinOp):
        return ARITHMETIC[type(node.op)](_value(node.left, columns), _value(node.right, columns))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, columns)
    if isinstance(node, ast.Constant):
        return np.float64(node.value)  # type: ignore[arg-type, return-value]
    return np.asarray(columns[_dotted(node)], np.float64)
