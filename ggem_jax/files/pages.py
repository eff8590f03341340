"""HTML pages in one file each, from Jinja templates that share `base.html`.

Values are escaped, except those that a template marks as `safe`. Needs the package jinja2, of the
extras `retrieval` and `train`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: Path, **values: Any) -> Iterator[str]:
    """Yields the pieces of a page, so that a page of many images is never whole in memory.

    Args:
        template: File of the template, which may extend `base.html`. A template whose name does not
            end in `.html` is not HTML, and its values are not escaped.
        **values: The variables of the template, by name.

    Yields:
        Parts of the text, in order.

    Raises:
        ModuleNotFoundError: The package jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ModuleNotFoundError(
            "writing pages needs the package jinja2: pip install 'ggem-jax[retrieval]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=template.suffix == ".html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    stream = environment.get_template(template.name).stream(values)
    stream.enable_buffering(64)
    yield from stream
