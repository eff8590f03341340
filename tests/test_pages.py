"""ggem_jax/files/pages.py: values in a page are escaped, and a missing value is an error."""

import sys

import jinja2
import pytest

from ggem_jax.files.pages import TEMPLATES, render_page

HOSTILE = "</style><script>&\"'"


def test_values_of_html_are_escaped(tmp_path):
    (tmp_path / "own.html").write_text(
        '{% extends "base.html" %}'
        '{% block body %}<p class="{{ text }}">{{ text }}</p>{% endblock %}'
    )
    page = "".join(
        render_page(tmp_path / "own.html", title=HOSTILE, facts={HOSTILE: HOSTILE}, text=HOSTILE)
    )
    assert HOSTILE not in page
    assert page.count("&lt;/style&gt;&lt;script&gt;&amp;&#34;&#39;") == 2 + 2 + 2
    assert page.startswith("<!DOCTYPE html>")
    assert page.endswith("</html>\n")


def test_values_of_markdown_are_left_as_they_are(tmp_path):
    (tmp_path / "own.md").write_text("# {{ text }}\n")
    assert "".join(render_page(tmp_path / "own.md", text=HOSTILE)) == f"# {HOSTILE}\n"


def test_a_value_that_is_not_given_is_an_error(tmp_path):
    (tmp_path / "own.md").write_text("{{ text }}")
    with pytest.raises(jinja2.UndefinedError, match="text"):
        list(render_page(tmp_path / "own.md"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ggem-jax\[retrieval\]'"):
        list(render_page(TEMPLATES / "search.html"))
