"""Rerankers by name, as flags, files and `Index.search` use them. JAX is loaded when one runs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ggem_jax.retrieval.vectors import Database, Ranking

    Arrays = tuple[np.ndarray, np.ndarray]  # scores and ids, each (q, k)

# name -> its options, with the defaults of `superglobal_rerank` and of
# `ggem_jax.retrieval.expansion`
METHODS: dict[str, dict[str, Any]] = {
    "superglobal": {"neighbors": 9, "beta": 0.15, "variant": "code"},
    "aqe": {"neighbors": 10},
    "alpha-qe": {"neighbors": 10, "alpha": 3.0},
    "dba": {"neighbors": 10, "alpha": 3.0},
    "none": {},
}
OPTIONS = ("neighbors", "beta", "variant", "alpha")
CANDIDATES = 400  # results of the first search that are reranked, as in SuperGlobal


@dataclass(frozen=True)
class Method:
    """A reranker and its options. `choose_method` fills in the defaults."""

    name: str  # one of `METHODS`
    candidates: int  # results of the first search that are reranked
    options: dict[str, Any]  # values of the options in `METHODS[name]`

    def record(self) -> dict[str, Any]:
        """Returns the method and its options as JSON values."""
        if self.name == "none":
            return {"method": self.name}
        return {"method": self.name, "candidates": self.candidates, **self.options}

    def __str__(self) -> str:
        given = [f"{name} {value}" for name, value in self.record().items() if name != "method"]
        return f"{self.name} ({', '.join(given)})" if given else self.name

    def depth(self, k: int) -> int:
        """Returns how many results of the first search are needed for k results after reranking.

        Args:
            k: Results after reranking.
        """
        return k if self.name == "none" else max(k, self.candidates)

    def rerank(self, queries: Any, database: "Database", ranking: "Ranking") -> "Ranking":
        """Returns the ranking in its new order, `(q, k)` as it was; "none" returns it unchanged.

        Args:
            queries: Unit vectors `(q, d)`.
            database: As `ggem_jax.retrieval.superglobal_rerank` takes it. If it is an array of JAX,
                the reranking is compiled as a whole.
            ranking: Scores and ids of the first search, each `(q, k)`, best first.

        Raises:
            ValueError: Shapes, dtypes or values do not fit.
            TypeError: "dba" was given a callback, or the database is of an unknown kind.
        """
        if self.name == "none":
            return ranking
        options = {
            ("num_neighbors" if name == "neighbors" else name): value
            for name, value in self.options.items()
        }
        if self.name == "superglobal":
            options["num_candidates"] = self.candidates
        return _find_function(self.name, database)(queries, database, ranking, **options)

    def search(
        self, queries: Any, database: "Database", *, depth: int
    ) -> tuple["Arrays", "Arrays"]:
        """Returns scores and ids `(q, depth)` of a search, and those after reranking.

        Args:
            queries: Unit vectors `(q, d)`.
            database: `(n, d)`, as `ggem_jax.retrieval.search` takes it.
            depth: Results of each query; n if it is larger.

        Raises:
            ValueError: As in `rerank`, or some scores are not finite.
        """
        from ggem_jax.retrieval.exact_search import search

        before = search(queries, database, k=min(depth, database.shape[0]))  # type: ignore[union-attr]
        return self.reorder(queries, database, before)

    def reorder(
        self, queries: Any, database: "Database", before: "Ranking"
    ) -> tuple["Arrays", "Arrays"]:
        """Returns scores and ids of a ranking, and those after reranking, as NumPy arrays `(q, k)`.

        Args:
            queries, database: As in `rerank`.
            before: Scores and ids of the first search, each `(q, k)`, best first.

        Raises:
            ValueError: As in `rerank`, or some scores are not finite.
        """
        return _to_arrays(before), _to_arrays(self.rerank(queries, database, before))


def choose_method(name: str, *, candidates: int | None = None, **given: Any) -> Method:
    """Returns a method with the given options over its defaults.

    Args:
        name: One of `METHODS`.
        candidates: Results of the first search that are reranked; None takes 400.
        **given: Options of this method, of `METHODS[name]`; None takes the default of each.

    Raises:
        ValueError: There is no such method, it does not have an option, or candidates are below 1.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"rerank must be one of {', '.join(METHODS)}, not {name!r}")
    if candidates is not None and candidates < 1:
        raise ValueError(f"candidates must be a whole number of at least 1, not {candidates!r}")
    options = METHODS[name]
    unknown = [
        option for option, value in given.items() if value is not None and option not in options
    ]
    if name == "none" and candidates is not None:
        unknown = ["candidates", *unknown]
    if unknown:
        takes = ", ".join(f"--{option}" for option in ("candidates", *options))
        has = f"it takes {takes}" if options else "nothing is reranked"
        raise ValueError(f"--{unknown[0]} is no option of {name}: {has}")
    values = {option: value for option, value in given.items() if value is not None}
    return Method(name, CANDIDATES if candidates is None else candidates, options | values)


def as_method(rerank: "Method | str | None") -> Method:
    """Returns the method of a name with its default options.

    Args:
        rerank: One of `METHODS`, or a `Method`, which is returned unchanged; None is "none".

    Raises:
        ValueError: There is no such method.
    """
    if isinstance(rerank, Method):
        choose_method(rerank.name)  # raises for an unknown name
        return rerank
    return choose_method("none" if rerank is None else rerank)


def _to_arrays(ranking: Any) -> "Arrays":
    import numpy as np

    scores = np.asarray(ranking.scores)
    if not np.isfinite(scores).all():
        raise ValueError("some scores are not finite: the vectors, beta or alpha are too large")
    return scores, np.asarray(ranking.ids)


def _find_function(name: str, database: Any) -> Callable[..., "Ranking"]:
    from ggem_jax.retrieval.rerank import superglobal_rerank
    from ggem_jax.retrieval.vectors import on_device

    if name == "superglobal":
        return superglobal_rerank
    return _compile(name) if on_device(database) else _expansions()[name]


@functools.cache
def _compile(name: str) -> Callable[..., "Ranking"]:
    import jax

    names = {"num_neighbors", "alpha"} if "alpha" in METHODS[name] else {"num_neighbors"}
    return jax.jit(_expansions()[name], static_argnames=names)


def _expansions() -> dict[str, Callable[..., "Ranking"]]:
    from ggem_jax.retrieval import expansion

    return {
        "aqe": expansion.average_query_expansion,
        "alpha-qe": expansion.alpha_query_expansion,
        "dba": expansion.database_augmentation,
    }
