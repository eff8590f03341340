"""The columns that every benchmark writes, and the files of its rows."""

import csv
import importlib.metadata
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Returns device, versions and date, which are the same for all rows of a run."""
    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": (
            f"{jax.device_count()} x {_cpu() if device.platform == 'cpu' else device.device_kind}"
        ),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
    }


def _cpu() -> str:
    """Returns the name of the processor and the number of its cores, if the system gives them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def append(name: str, row: dict[str, Any], folder: Path = RESULTS) -> None:
    """Prints a row and appends it to `NAME.csv`, a new file with a header where there is none.

    Args:
        name: Name of the file without its ending.
        row: Cells by column. An existing file must have the same columns in the same order.
        folder: Folder of the file.
    """
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    path = folder / f"{name}.csv"
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)


def time_in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each call in each round, without the first round.

    The calls take turns, so that a slow moment of the machine affects all of them.

    Args:
        calls: Calls by name; each returns when its work is done.
        rounds: Rounds that are kept; the first one, which compiles, comes on top.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """Returns the median in milliseconds, and the interquartile range as a share of it.

    Args:
        times: At least two times, in seconds.
    """
    low, middle, high = statistics.quantiles(times, n=4)
    return 1e3 * middle, (high - low) / middle
