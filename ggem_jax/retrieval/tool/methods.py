"""Reranking by name, as flags and files name it. Loads no JAX before there is something to
rerank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggem_jax.retrieval.vectors import Database, Ranking

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
    """A way of reranking and its options."""

    name: str
    candidates: int
    options: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return (
            {"method": self.name}
            if self.name == "none"
            else {"method": self.name, "candidates": self.candidates, **self.options}
        )

    def __str__(self) -> str:
        options = ", ".join(
            f"{name} {value}" for name, value in self.record().items() if name != "method"
        )
        return f"{self.name} ({options})" if options else self.name

    def depth(self, k: int) -> int:
        """Results of the first search that `k` results after reranking need."""
        return k if self.name == "none" else max(k, self.candidates)


def method_of(name: str, *, candidates: int | None = None, **given: Any) -> Method:
    """A method with the options that are given (not None) over its defaults. Raises `ValueError`
    for one that it does not have.
    """
    options = METHODS[name]
    unknown = [
        option for option, value in given.items() if value is not None and option not in options
    ]
    if name == "none" and candidates is not None:
        unknown = ["candidates", *unknown]
    if unknown:
        has = (
            f"it takes {', '.join(f'--{option}' for option in ('candidates', *options))}"
            if options
            else "nothing is reranked"
        )
        raise ValueError(f"--{unknown[0]} is no option of {name}: {has}")
    return Method(
        name,
        candidates or CANDIDATES,
        options | {option: value for option, value in given.items() if value is not None},
    )


def rerank(method: Method, queries: Any, database: "Database", ranking: "Ranking") -> "Ranking":
    """The ranking in its new order, of the same length; `none` gives it back."""
    from ggem_jax import retrieval

    options: Mapping[str, Any] = {
        ("num_neighbors" if name == "neighbors" else name): value
        for name, value in method.options.items()
    }
    match method.name:
        case "superglobal":
            return retrieval.superglobal_rerank(
                queries, database, ranking, num_candidates=method.candidates, **options
            )
        case "aqe":
            return retrieval.average_query_expansion(queries, database, ranking, **options)
        case "alpha-qe":
            return retrieval.alpha_query_expansion(queries, database, ranking, **options)
        case "dba":
            return retrieval.database_augmentation(queries, database, ranking, **options)
        case "none":
            return ranking
    raise ValueError(f"rerank must be one of {', '.join(METHODS)}, not {method.name!r}")
