"""benchmarks/code_shape.py on a small tree whose figures can be counted by hand."""

from benchmarks import code_shape

MODULE = '''"""A module."""


def double(x):
    """Returns twice x.

    Args:
        x: a number.
    """
    y = 2 * x
    return y


class Box:
    def open(self):
        return self

    def _close(self):
        return None
'''


def test_figures_of_a_small_tree(tmp_path):
    (tmp_path / "README.md").write_text("four")
    (tmp_path / "ours" / "inner").mkdir(parents=True)
    (tmp_path / "ours" / "inner" / "box.py").write_text(MODULE)
    (tmp_path / "ours" / "wide.py").write_text(f"x = '{'w' * 95}'\n")
    (tmp_path / "ours" / "link").symlink_to(tmp_path / "ours" / "inner")
    lines = len(MODULE.splitlines())
    assert code_shape.measure(tmp_path, ["ours"]) == {
        "files": 2,
        "lines": lines + 1,
        "file length, median": (lines + 1) / 2,
        "file length, 90th percentile": 1 + 0.9 * (lines - 1),
        "body length, median": 1,
        "body length, 90th percentile": 1.8,
        "lines over 100 columns, %": 100 / (lines + 1),
        "public functions and classes": 3,  # double, Box and Box.open
        "with a docstring, %": 100 / 3,
        "words of a docstring, mean": 7,
        "docstrings with Args or Example, %": 100,
        "README, bytes": 4,
    }
