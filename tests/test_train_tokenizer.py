"""train/tokenizer.py: ids of captions, tokenizers of others, what is no tokenizer."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from train.cli import Refused
from train.tokenizer import Tokenizer, read_tokenizer, train_tokenizer

CAPTIONS = [
    "a photo of a cat.",
    "a photo of a dog.",
    "two dogs, ünder a tree",
    "the cat and the dog",
]


def test_ids_are_start_pieces_end_and_padding():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    assert 258 < tokenizer.size <= 300
    ids = tokenizer.encode([*CAPTIONS, "", "x" * 99], 20)
    assert (ids.shape, ids.dtype) == ((6, 20), np.int32)
    assert (ids[:, 0] == tokenizer.start).all()
    for row in ids:
        end = row.tolist().index(tokenizer.end)
        assert (row[end:] == tokenizer.pad).all()
        assert not np.isin(row[1:end], (tokenizer.start, tokenizer.end)).any()
    assert ids[4].tolist() == [tokenizer.start] + 19 * [tokenizer.end]
    assert ids[5, -1] == tokenizer.end
    assert len({row.tobytes() for row in ids}) == 6
    spelt = tokenizer.encode(["a <|endoftext|> b"], 40)[0].tolist()
    assert spelt.index(tokenizer.end) > 10, "a caption that spells the end token does not end there"


def test_a_tokenizer_is_the_same_from_its_file_and_trained_again(tmp_path):
    """Also in another process, where hashes have another order."""
    captions = [
        f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "stuvwxyz"
    ]  # many pairs that are equally frequent
    tokenizer = train_tokenizer(captions, 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
    again = read_tokenizer(tmp_path / "tokenizer.json")
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(other.encode(captions, 12), tokenizer.encode(captions, 12))
    assert train_tokenizer(iter(captions), 300).text == tokenizer.text
    code = (
        "from train.tokenizer import train_tokenizer; import sys;"
        f" sys.stdout.buffer.write(train_tokenizer({captions}, 300).text.encode())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=120, check=True
    )
    assert found.stdout.decode() == tokenizer.text


def hugging_face(tokens, **more):
    """A tokenizer.json of whole words."""
    added = [
        {
            "id": i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(tokens)
        if not token.isalpha()
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Whitespace"},
            "model": model,
            **more,
        }
    )


def test_other_tokenizers_keep_their_own_tokens():
    truncation = {
        "truncation": {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    }
    bert = Tokenizer(
        hugging_face(["[PAD]", "<unk>", "[CLS]", "[SEP]", "cat", "dog"], **truncation), "bert"
    )
    assert bert.encode(["cat dog cat"], 7).tolist() == [[2, 4, 5, 4, 3, 0, 0]]
    t5 = Tokenizer(hugging_face(["<pad>", "</s>", "<unk>", "cat"]), "t5")
    assert t5.encode(["cat", "cat cat cat cat"], 4).tolist() == [[3, 1, 0, 0], [3, 3, 3, 1]]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for text, sentence in (
        ("{", r"t.json is not a tokenizer that the package tokenizers reads"),
        ("{}", "is not a tokenizer"),
        (
            hugging_face(["<unk>", "cat"]),
            r"t.json has no token that ends a text: one of <\|endoftext\|>, </s>",
        ),
    ):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(Refused, match=sentence) as caught:
            read_tokenizer(tmp_path / "t.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(Refused, match=r"the tokenizer .*none.json cannot be read: No such file"):
        read_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(CAPTIONS, 257)


def test_a_tokenizer_without_a_piece_for_what_it_does_not_know_says_so(tmp_path):
    from tokenizers import Tokenizer as Published
    from tokenizers import models

    known = Published(models.WordLevel({"</s>": 0, "cat": 1}, unk_token="[UNK]"))
    with pytest.raises(Refused, match="cannot encode the text 'dog'"):
        Tokenizer(known.to_str(), "the file").encode(["dog"], 5)
    far = Published(models.WordLevel({"</s>": 0, "cat": 2**24}, unk_token="</s>"))
    with pytest.raises(Refused, match="at most 16,777,216 pieces"):
        Tokenizer(far.to_str(), "the file")
