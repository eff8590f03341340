"""Constraints of a design space: comparisons of arithmetic on names, such as `npu.num_arrays *
npu.array_width <= 1024`.

They come from files and command lines, so they are read into a syntax tree of which only arithmetic
is accepted; nothing is evaluated as Python.
"""

import ast
import operator
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

LONGEST = 500  # characters: the tree is as deep at most, and walked by recursion
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _above(left, right):
    """By how much the left is above the right, relative to both."""
    return np.where(left <= right, 0.0, (left - right) / (np.abs(left) + np.abs(right)))


# By how much `left OPERATOR right` fails: 0 where it holds. A strict comparison of equals fails by
# the least that can be told from 0.
LEAST = 1e-9
FAILURE = {
    ast.LtE: _above,
    ast.GtE: lambda left, right: _above(right, left),
    ast.Lt: lambda left, right: np.where(left < right, 0.0, _above(left, right) + LEAST),
    ast.Gt: lambda left, right: np.where(left > right, 0.0, _above(right, left) + LEAST),
    ast.Eq: lambda left, right: _above(left, right) + _above(right, left),
    ast.NotEq: lambda left, right: np.where(left != right, 0.0, 1.0),
}


@dataclass(frozen=True)
class Constraint:
    """A comparison, or a chain of them."""

    text: str
    tree: ast.Compare

    def violation(self, columns: Mapping[str, np.ndarray | float]) -> np.ndarray:
        """By how much each design breaks it, relative to its sides; 0 where it is kept, infinite
        where it has no value.
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
    """The constraint that a text says about `names`.

    Raises:
        ValueError: it is no comparison of arithmetic, or uses another name.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a constraint may have {LONGEST} characters, not {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"constraint {text!r} is no expression") from None
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
                f"constraint {text!r} uses {name}, which is neither a field of the hardware nor a"
                " knob or metric"
            )
    elif not isinstance(node, ast.Constant) or not _finite(node.value):
        raise ValueError(
            f"constraint {text!r} may have names, numbers and + - * / // % **, not"
            f" {ast.unparse(node)!r}"
        )


def _finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _dotted(node: ast.expr) -> str:
    """The name that `a.b.c` stands for; "" where it is none."""
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
