"""The tables of docs/kernels.md hold the rows of benchmarks/results/kernel_code.csv."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
with (ROOT / "benchmarks" / "results" / "kernel_code.csv").open(newline="") as file:
    ROWS = list(csv.DictReader(file))

GPUS = "H200", "A100", "RTX 4090", "B200"  # columns of the modelled times


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


def test_the_modelled_times_are_the_newest_rows():
    with (ROOT / "benchmarks" / "results" / "kernel_model.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {(r["kernel"], r["model"], r["images"], r["modelled_for"]): r for r in rows}
    assert f"Triton {rows[-1]['triton']}, {rows[-1]['date']}" in PAGE
    table = table_after("in brackets the speed")
    assert len(table) * len(GPUS) == len(newest)
    for kernel, model, images, *cells in table:
        for gpu, cell in zip(GPUS, cells, strict=True):
            row = newest[kernel.strip("`"), f"{model} at 224 px", images, gpu]
            assert cell == f"{float(row['modelled_us']):.0f} ({row['fraction_of_copy']})"


def newest(name: str, **wanted: str) -> dict[str, str]:
    """The last row of a file of results in which the columns have these values."""
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    return rows[-1]


def microseconds_of_norm_and_pool(gpu: str, model: str) -> tuple[float, float]:
    """Value and gradient: modelled, in one kernel each; and with XLA's norm, as fast as a copy."""
    fused, rate = 0.0, 0.0
    for kernel in ("norm_pool_kernel", "norm_gradient_kernel"):
        row = newest(
            "kernel_model.csv",
            modelled_for=gpu, model=f"{model} at 224 px", images="256", kernel=kernel,
        )  # fmt: skip
        fused += float(row["modelled_us"])
        rate = float(row["MB"]) / float(row["copy_us"])
    function = "norm_ggem, XLA's norm and the kernels of ggem"
    moved = newest("xla_traffic.csv", shape=f"{model}, 256 images", function=function)["MB"]
    return fused, float(moved) / rate


def test_norm_and_pooling_are_joined_in_training_where_the_model_is_for_it():
    for gpu in GPUS:
        for model in ("B/16", "L/16"):
            fused, apart = microseconds_of_norm_and_pool(gpu, model)
            assert fused < apart
