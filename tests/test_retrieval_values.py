"""ggem_jax/retrieval/tool/values.py: the texts of flags, and what is refused."""

import argparse

import pytest

from ggem_jax.retrieval.tool import values


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (values.counts, "1,5,10", (1, 5, 10)),
        (values.number, "0", 0.0),
        (values.number, "1.5", 1.5),
        (values.box, "1,2,3,4.5", (1.0, 2.0, 3.0, 4.5)),
    ],
)
def test_a_text_is_read(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (values.counts, "1,0", "must be a whole number of at least 1, not '0'"),
        (values.counts, "1,,2", "must be a whole number of at least 1, not ''"),
        (values.number, "-1", "must be a number from 0 to"),
        (values.number, "inf", "must be a number from 0 to"),
        (values.number, "nan", "must be a number from 0 to"),
        (values.box, "1,2,1,4", "must be"),
        (values.box, "1,2,3", "must be"),
    ],
)
def test_another_text_is_refused(read, text, sentence):
    with pytest.raises(argparse.ArgumentTypeError, match=sentence):
        read(text)
