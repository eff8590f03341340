"""Docstrings of public functions: every argument is described, and what is returned and raised.

A public function is one that takes arguments and whose name, and whose class's name, have no
leading underscore; `main` of a script and functions of a flax module's `setup` are left out.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = [
    *(f"ggem_jax/{room}" for room in ("pooling", "models", "losses", "files", "weights")),
    *(f"ggem_jax/{room}" for room in ("descriptors", "retrieval")),
    "kernels",
    "neupims",
    "train",
    "eval",
]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(body: list[ast.stmt]) -> Iterator[Function]:
    """Yields the public functions of a module's body, and the public methods of its classes."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body)
            elif node.name not in ("main", "setup"):
                yield node


def arguments(function: Function) -> list[str]:
    """Returns the names of a function's arguments without self and cls."""
    a = function.args
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [arg.arg for arg in found if arg.arg not in ("self", "cls") and arg.arg[0] != "_"]


def described(doc: str) -> dict[str, str]:
    """Returns what the section Args says of each argument."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    entries = re.findall(
        r"^    (\*{0,2}\w[\w, *]*?)(?: \([^)]*\))?: *(.*)", section[1] if section else "", re.M
    )
    return {name.strip(" *"): text for names, text in entries for name in names.split(",")}


def faults(function: Function) -> list[str]:
    """Returns what the docstring of a function lacks."""
    doc = ast.get_docstring(function) or ""
    found = []
    told = described(doc)
    if missing := [name for name in arguments(function) if name not in told]:
        found.append(f"Args lacks {', '.join(missing)}")
    if unknown := [name for name in told if name not in arguments(function)]:
        found.append(f"Args describes {', '.join(unknown)}, which it does not take")
    if small := [name for name, text in told.items() if text[:1].islower()]:
        found.append(f"starts with a small letter: {', '.join(small)}")
    returns = ast.unparse(function.returns) if function.returns else "None"
    result = returns not in ("None", "NoReturn")
    if arguments(function) and result and not re.search("[Rr]eturns|Yields|Whether|Context", doc):
        found.append("does not say what it returns")
    raises = any(isinstance(node, ast.Raise) and node.exc for node in own_nodes(function))
    if arguments(function) and raises and not re.search("[Rr]aises", doc):
        found.append("does not say what it raises")
    return found


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """Yields the nodes of a function without those of the functions inside."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, Function | ast.Lambda):
            yield node
            yield from own_nodes(node)  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_functions_are_described(folder):
    lacking = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for function in public_functions(ast.parse(path.read_text()).body):
            lacking += [
                f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {fault}"
                for fault in faults(function)
            ]
    assert not lacking, f"{len(lacking)}\n" + "\n".join(lacking)


def test_faults_are_found():
    def of(text: str) -> list[str]:
        return faults(next(public_functions(ast.parse(text).body)))

    args = "Args:\n        x: A number.\n"
    assert of(f'def f(x) -> int:\n    """Returns x.\n\n    {args}    """\n') == []
    assert of('def f(x) -> int:\n    """Returns x."""\n') == ["Args lacks x"]
    assert of(f'def f() -> int:\n    """Returns x.\n\n    {args}    """\n') == [
        "Args describes x, which it does not take"
    ]
    assert of(f'def f(x) -> int:\n    """A function.\n\n    {args}    """\n') == [
        "does not say what it returns"
    ]
    assert of(
        f'def f(x) -> int:\n    """Returns x.\n\n    {args.replace("A n", "a n")}    """\n'
    ) == ["starts with a small letter: x"]
    assert of(
        f'def f(x) -> int:\n    """Returns x.\n\n    {args}    """\n    raise ValueError(x)\n'
    ) == ["does not say what it raises"]
