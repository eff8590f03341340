"""benchmarks/record.py: rows are appended to files with the same columns."""

import csv

import pytest

from benchmarks.record import append


def test_rows_are_appended_below_one_header(tmp_path):
    for cycles in (3, 5):
        append("cycles", {"date": "2026-01-01", "cycles": cycles}, tmp_path)
    with (tmp_path / "cycles.csv").open(newline="") as file:
        assert [row["cycles"] for row in csv.DictReader(file)] == ["3", "5"]


@pytest.mark.parametrize(
    "row", [{"cycles": 3, "date": "x"}, {"date": "x"}, {"date": "x", "cycles": 3, "seconds": 1}]
)
def test_a_file_with_other_columns_stays_as_it_is(tmp_path, row):
    append("cycles", {"date": "2026-01-01", "cycles": 3}, tmp_path)
    before = (tmp_path / "cycles.csv").read_text()
    with pytest.raises(ValueError, match=r"cycles.csv has the columns date, cycles, and the new"):
        append("cycles", row, tmp_path)
    assert (tmp_path / "cycles.csv").read_text() == before
