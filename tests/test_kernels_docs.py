"""The tables of docs/kernels.md hold the rows of benchmarks/results/kernel_code.csv."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
with (ROOT / "benchmarks" / "results" / "kernel_code.csv").open(newline="") as file:
    ROWS = list(csv.DictReader(file))

# An H100 at 1.755 GHz: 132 multiprocessors, each with 4 warp instructions and 16 special functions
# a cycle. Bytes a second that a copy reaches on an H100 and on an H200.
CYCLES = 132 * 1.755e9
COPY = 3.0e12, 4.3e12
IMAGES, TOKENS, CHANNELS = 256, 196, 768


def table_after(words: str) -> list[list[str]]:
    """The cells of the first table after some words of the page, without its header."""
    table = re.search(r"(?:^\|.*\n)+", PAGE[PAGE.index(words) :], re.MULTILINE)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return cells[2:]


def test_the_table_of_instructions_is_that_of_the_newest_rows():
    triton, ptxas, date = re.search(
        r"compiled by Triton ([\d.]+) and ptxas ([\d.]+)\s+on ([\d-]+)", PAGE
    ).groups()
    assert date == max(row["date"] for row in ROWS)
    newest = [row for row in ROWS if (row["triton"], row["ptxas"]) == (triton, ptxas)]
    columns = "function", "kernel", "shape", "dtype", "registers"
    counted = "instructions_per_element", "special_functions_per_element"
    known = {tuple(row[column] for column in (*columns, *counted)) for row in newest}
    table = table_after("compiled by Triton")
    assert len(table) >= 12
    assert [row for row in table if tuple(cell.strip("`") for cell in row) not in known] == []


def test_no_kernel_spills_registers():
    assert "None of these kernels spills registers." in PAGE
    assert {row["spilled_bytes"] for row in ROWS} == {"0"}


def test_the_bounds_follow_from_the_table_of_instructions():
    elements, per_image = IMAGES * TOKENS * CHANNELS, IMAGES * CHANNELS
    bytes_moved = {
        "pool_kernel": 2 * elements + 4 * per_image,
        "gradient_kernel": 4 * elements + 12 * per_image,
        "norm_pool_kernel": 2 * elements + 4 * per_image + 8 * IMAGES * TOKENS,
        "norm_gradient_kernel": 4 * elements + 20 * per_image + 8 * IMAGES * TOKENS,
    }
    (triton,) = re.findall(r"compiled by Triton ([\d.]+)", PAGE)
    rows = {
        row["kernel"]: row
        for row in ROWS
        if (row["triton"], row["shape"], row["dtype"]) == (triton, "B/16 at 224 px", "bfloat16")
        and row["function"] in ("ggem", "norm_ggem")
    }
    table = table_after("The next table shows")
    assert len(table) == 4
    for name, *cells in table:
        kernel = name.strip("`")
        instructions, special = (
            float(rows[kernel][f"{what}_per_element"]) * elements
            for what in ("instructions", "special_functions")
        )
        seconds = [bytes_moved[kernel] / rate for rate in COPY]
        seconds += [instructions / (4 * 32 * CYCLES), special / (16 * CYCLES)]
        assert cells == [f"{1e6 * s:.0f} us" for s in seconds]
