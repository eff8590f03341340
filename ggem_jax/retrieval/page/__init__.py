"""An index in the browser: `make_app` returns the page with its JSON API, `serve` runs it.

Needs the extra `serve`: starlette, uvicorn, python-multipart and jinja2.
"""

from importlib.util import find_spec

_NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
if missing := [name for module, name in _NEEDED.items() if find_spec(module) is None]:
    raise ModuleNotFoundError(
        f"the page needs the package {missing[0]}: pip install 'ggem-jax[serve]'"
    )

from ggem_jax.retrieval.page.app import make_app  # noqa: E402
from ggem_jax.retrieval.page.server import serve  # noqa: E402

__all__ = ["make_app", "serve"]
