"""Rerankers by name, as flags, files and `Index.search` use them. JAX is loaded when one runs."""

import functools
import numbers
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
    """A reranker and its options. `choose_method` fills in the defaults.

    Raises:
        ValueError: There is no such method, it does not have an option, or candidates are no whole
            number of at least 1.
    """

    name: str  # one of `METHODS`
    candidates: int  # results of the first search that are reranked
    options: dict[str, Any]  # values of options in `METHODS[name]`; those left out: the defaults

    def __post_init__(self) -> None:
        _check_name(self.name)
        candidates = check_count("candidates", self.candidates)
        object.__setattr__(self, "candidates", candidates)
        if not isinstance(self.options, dict):
            raise ValueError(f"options must be a dictionary of values, not {self.options!r}")
        _check_options(self.name, self.options)

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

    def search(self, queries: Any, database: "Database", *, k: int) -> tuple["Arrays", "Arrays"]:
        """Returns scores and ids of a search, `(q, depth(k))`, and the first k after reranking.

        The candidates are reranked together, however small k is.

        Args:
            queries: Unit vectors `(q, d)`.
            database: `(n, d)`, as `ggem_jax.retrieval.search` takes it.
            k: Results of each query after reranking; n if it is larger. n bounds the depth too.

        Raises:
            ValueError: As in `rerank`, k is no whole number of at least 1, or some scores are not
                finite.
        """
        from ggem_jax.retrieval.exact_search import search

        depth = self.depth(check_count("k", k))
        first = search(queries, database, k=min(depth, database.shape[0]))  # type: ignore[union-attr]
        before, (scores, ids) = self.reorder(queries, database, first)
        return before, (scores[:, :k], ids[:, :k])

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
        ValueError: There is no such method, it does not have an option, or candidates are no whole
            number of at least 1.
    """
    _check_name(name)
    values = {option: value for option, value in given.items() if value is not None}
    if name == "none" and candidates is not None:
        check_count("candidates", candidates)
        _check_options(name, {"candidates": candidates})
    count = CANDIDATES if candidates is None else candidates
    return Method(name, count, METHODS[name] | values)


def as_method(rerank: "Method | str | None") -> Method:
    """Returns the method of a name with its default options.

    Args:
        rerank: One of `METHODS`, or a `Method`, which is returned unchanged; None is "none".

    Raises:
        ValueError: There is no such method.
    """
    if isinstance(rerank, Method):
        return rerank
    return choose_method("none" if rerank is None else rerank)


def check_count(name: str, value: Any) -> int:
    """Returns a whole number of at least 1, and raises for anything else.

    Args:
        name: Name of the value for the error message.
        value: The number, of Python or NumPy.

    Raises:
        ValueError: The value is no whole number, or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"rerank must be one of {', '.join(METHODS)}, not {name!r}")


def _check_options(name: str, given: dict[str, Any]) -> None:
    unknown = [option for option in given if option not in METHODS[name]]
    if unknown:
        takes = ", ".join(f"--{option}" for option in ("candidates", *METHODS[name]))
        has = f"it takes {takes}" if METHODS[name] else "nothing is reranked"
        raise ValueError(f"--{unknown[0]} is no option of {name}: {has}")


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
