"""Search by words: the head of CLIP as a descriptor, texts, weighted terms, the tool, the page."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from PIL import Image
from starlette.testclient import TestClient
from test_weights_vit import file_of, recorded, settings_of
from tokenizers import models, pre_tokenizers, processors

from ggem_jax.descriptors.backbones import load_network
from ggem_jax.descriptors.extract import DescriptorSettings, Extractor
from ggem_jax.descriptors.texts import TextEncoder
from ggem_jax.files.images import normalise, resize
from ggem_jax.retrieval.index import IndexRefused, build_index, info, search_by_words
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.text_search import (
    load_text_encoder,
    parse_words,
    takes_words,
    vector_of_words,
)
from ggem_jax.retrieval.page import make_app
from ggem_jax.weights import MismatchedWeights, write_safetensors
from ggem_jax.weights.text import read_text

START, END, PAD = 27, 29, 26
WORDS = {"red": 3, "lighthouse": 4, "people": 5, "sea": 6, "boat": 7, "[UNK]": 0}


def write_tokenizer(folder, *, start=True):
    """A tokenizer.json of whole words, which adds start and end as the published ones do."""
    words = WORDS | {"<start>": START, "<end>": END, "<pad>": PAD}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>" if start else "$A <end>",
        special_tokens=[("<start>", START), ("<end>", END)],
    )
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture
def clip(tmp_path):
    """A small CLIP of random weights, with both towers and a tokenizer."""
    (tmp_path / "clip").mkdir()
    path, found = file_of("text-open_clip", tmp_path / "clip")
    write_tokenizer(tmp_path / "clip")
    return path, found


@pytest.fixture
def index(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = np.kron(rng.integers(0, 256, (2, 2, 3), np.uint8), np.ones((20, 30, 1), np.uint8))
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    settings = DescriptorSettings(weights=str(clip[0]), pooling="clip")
    build_index(tmp_path / "photos", tmp_path / "my.index", settings, dtype="float32")
    return Index.open(tmp_path / "my.index")


# The head as a descriptor


def test_the_descriptor_is_the_projection_of_pytorch(clip):
    path, found = clip
    network = load_network("clip", path, own_head=True)
    assert (network.stride, network.pads) == (16, False)
    places = network.model.apply(network.variables, jnp.asarray(found["images"]))
    assert places.shape == (2, 1, 1, 5)
    np.testing.assert_allclose(places[:, 0, 0], found["logits"], rtol=1e-4, atol=1e-4)


def test_an_image_is_described_as_the_square_that_the_network_takes(clip):
    path, _ = clip
    extractor = Extractor(DescriptorSettings(weights=str(path), pooling="clip").resolve())
    image = np.random.default_rng(1).integers(0, 256, (40, 90, 3), np.uint8)
    assert extractor.fit(40, 90) == (16, 16)
    network = extractor.network
    pixels = normalise(resize(image, 16, 16), mean=network.mean, std=network.std)
    expected = network.model.apply(network.variables, jnp.asarray(pixels[None]))[0, 0, 0]
    np.testing.assert_allclose(
        extractor.describe(image), expected / jnp.linalg.norm(expected), atol=1e-5
    )


def test_siglip_has_its_attention_pooling(tmp_path):
    path, found = file_of("text-open_clip-siglip", tmp_path)
    given = DescriptorSettings(weights=str(path), pooling="clip", gelu="exact")
    network = load_network("siglip", path, given=given.given(), own_head=True)
    places = network.model.apply(network.variables, jnp.asarray(found["images"]))
    np.testing.assert_allclose(places[:, 0, 0], found["descriptor"], rtol=1e-4, atol=1e-4)


def test_the_settings_are_recorded_without_what_does_not_apply(index):
    settings = info(index.folder)["settings"]
    assert {name: settings[name] for name in ("pooling", "backbone", "regional", "scales")} == {
        "pooling": "clip", "backbone": "clip", "regional": False, "scales": 1,
    }  # fmt: skip
    assert index.dim == 5


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the pooling clip needs a file of weights, of CLIP or"):
        DescriptorSettings(pooling="clip")
    weights, _ = file_of("text-open_clip", tmp_path)
    with pytest.raises(MismatchedWeights, match="is not a ViT-S/16: patch 8 where 16 is needed"):
        load_network("vit-S/16", weights, own_head=True)
    weights, _ = file_of("timm-vit", tmp_path)
    settings = DescriptorSettings(weights=str(weights), pooling="clip").resolve()
    with pytest.raises(MismatchedWeights, match="needs the weights of CLIP or SigLIP, not"):
        Extractor(settings)


def test_an_image_tower_without_its_projection_is_refused(tmp_path):
    weights, _ = recorded("text-open_clip")
    del weights["visual.proj"]
    (tmp_path / "config.json").write_text(json.dumps(settings_of("text-open_clip")))
    write_safetensors(tmp_path / "weights.safetensors", weights)
    settings = DescriptorSettings(weights=str(tmp_path / "weights.safetensors"), pooling="clip")
    with pytest.raises(MismatchedWeights, match="lacks: name the file of both towers"):
        Extractor(settings.resolve())


# Texts


def test_texts_are_those_of_the_tower(clip):
    path, _ = clip
    tower = read_text(path)
    ids = [[START, 3, 4, END, 0, 0, 0, 0], [START, 5, END, 0, 0, 0, 0, 0],
           [START, 3, 3, 3, 3, 3, 3, END]]  # fmt: skip
    expected = np.asarray(tower.model().apply(tower.variables, jnp.asarray(ids)).projected)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = TextEncoder(path)(["red lighthouse", "people", "red " * 20])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_siglip_is_padded_as_its_publisher_says(tmp_path):
    path, _ = file_of("text-hf-siglip", tmp_path)
    write_tokenizer(tmp_path, start=False)
    with pytest.raises(ValueError, match=r"put the tokenizer_config\.json of the network beside"):
        TextEncoder(path)(["red"])
    for padding in ("<pad>", {"content": "<pad>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": padding}))
        tower = read_text(path)
        ids = jnp.array([[3, END] + [PAD] * 6])
        expected = tower.model().apply(tower.variables, ids).projected[0]
        found = TextEncoder(path)(["red"])[0]
        np.testing.assert_allclose(found, expected / jnp.linalg.norm(expected), atol=1e-5)


def test_missing_and_foreign_tokenizers_are_told(clip, monkeypatch):
    path, _ = clip
    file = Path(path).parent / "tokenizer.json"
    text = file.read_text()
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        TextEncoder(path)
    file.write_text(text.replace('"<end>": 29', '"<end>": 31').replace('"red": 3', '"red": 99'))
    with pytest.raises(ValueError, match=r"100 ids where .* has 30: it belongs to another network"):
        TextEncoder(path)
    made = tokenizers.Tokenizer.from_str(text)
    made.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    made.save(str(file))
    with pytest.raises(ValueError, match="does not end texts with the id 29"):
        TextEncoder(path)(["red"])
    file.unlink()
    with pytest.raises(ValueError, match=r"needs the tokenizer\.json of the network beside"):
        TextEncoder(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ggem-jax\[text\]'"):
        TextEncoder(path)


# Terms


@pytest.mark.parametrize(
    ("words", "terms"),
    [
        ("red lighthouse", [(1, "red lighthouse")]),
        ("lighthouse + red", [(1, "lighthouse"), (1, "red")]),
        ("lighthouse + 0.5:red - people", [(1, "lighthouse"), (0.5, "red"), (-1, "people")]),
        ("2: golden retriever - .5:pool", [(2, "golden retriever"), (-0.5, "pool")]),
        ("- people", [(-1, "people")]),
        ("+ sea", [(1, "sea")]),
        ("black-and-white t-shirt c++", [(1, "black-and-white t-shirt c++")]),
        ("  red  ", [(1, "red")]),
    ],
)
def test_terms_have_signs_and_weights(words, terms):
    assert [tuple(term) for term in parse_words(words)] == terms


@pytest.mark.parametrize("words", ["", "  ", "red +", "+", "red - + sea", "2:", "red + 3:  "])
def test_a_term_without_text_is_refused(words):
    with pytest.raises(ValueError, match="has no text"):
        parse_words(words)


def test_terms_are_added_by_their_weights():
    axes = {"a": 0, "b": 1}
    found = vector_of_words("3:a - 4:b", lambda texts: np.eye(2)[[axes[text] for text in texts]])
    np.testing.assert_allclose(found, [0.6, -0.8], rtol=1e-6)
    with pytest.raises(ValueError, match="cancel each other"):
        vector_of_words("a - a", lambda texts: np.eye(2)[[axes[text] for text in texts]])


# The index


def test_words_find_the_images_of_the_largest_products(index, clip):
    results = search_by_words(index, ["red lighthouse", "sea - boat"], 8, rerank="superglobal")
    encode = TextEncoder(clip[0])
    vectors = index.vectors().take(np.arange(8))
    for row, words in enumerate(results.queries):
        expected = vectors @ vector_of_words(words, encode)
        first = results.scores_before[row][np.argsort(results.ranks_before[row])]
        np.testing.assert_allclose(first, np.sort(expected)[::-1], atol=1e-5)
    assert results.queries == ("red lighthouse", "sea - boat")
    assert load_text_encoder(index)(["red"]).shape == (1, 5)


def test_the_tool_searches_by_words(index, run, monkeypatch):
    monkeypatch.setattr("ggem_jax.retrieval.tool.commands.keep_compiled_programs", lambda: None)
    expected = search_by_words(index, ["red - people"], 3).record()
    flags = ["search", index.folder, "--text", "red - people", "-k", 3]
    code, said, told = run(*flags, "--json")
    assert (code, told) == (0, "")
    assert json.loads(said) == json.loads(json.dumps(expected))
    assert expected["queries"][0]["query"] == "red - people"
    assert run(*flags)[1].startswith("red - people: the first 3 under ")
    moved = index.folder.parent / "clip" / "moved"
    moved.mkdir()
    for file in list(moved.parent.glob("*.*")):
        file.rename(moved / file.name)
    code, _, told = run(*flags)
    assert (code, "name it with --weights FILE" in told) == (1, True)
    assert run(*flags, "--weights", moved / "weights.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        ([], 2, "name images, QUERY, or words, --text"),
        (["photos/0.png", "--text", "red"], 2, "one of them is needed, not both"),
        (["--text", "red", "--html", "sheet.html"], 2, "--html and --whitening are for images"),
        (["--text", "red", "--box", "0,0,9,9"], 2, "--box belongs to one query"),
        (["--text", "red +"], 1, "a term of 'red \\+' has no text"),
    ],
)
def test_mistakes_are_one_sentence(index, run, flags, code, sentence):
    found, said, told = run("search", "my.index", *flags)
    assert (found, said, told.count("\n")) == (code, "", 1)
    assert sentence.replace("\\", "") in told


def test_an_index_of_another_pooling_says_what_to_bring(index, clip, tmp_path):
    settings = DescriptorSettings(weights=str(clip[0]), scales=1, regional=False)
    build_index(tmp_path / "photos", tmp_path / "other.index", settings)
    other = Index.open(tmp_path / "other.index")
    assert (takes_words(index), takes_words(other)) == (True, False)
    sentence = "index the images with --pooling clip and --weights FILE, a file of CLIP or SigLIP"
    with pytest.raises(IndexRefused, match=sentence):
        search_by_words(other, ["red"])
    client = TestClient(make_app(other), base_url="http://127.0.0.1")
    assert 'id="words"' not in client.get("/").text
    assert sentence in client.get("/words?text=red").json()["error"]


def test_the_page_searches_by_words(index):
    client = TestClient(make_app(index), base_url="http://127.0.0.1")
    assert 'id="words"' in client.get("/").text
    found = client.get("/words", params={"text": "red + 2:sea", "k": 4}).json()
    expected = search_by_words(index, ["red + 2:sea"], 4)
    assert [hit["id"] for hit in found["results"]] == expected.ids[0].tolist()
    assert found["query"]["name"] == "red + 2:sea"
    for text in ("", "red +", "x" * 1001):
        assert client.get("/words", params={"text": text}).status_code == 400
    upload = {"image": ("0.png", (index.root / "0.png").read_bytes())}
    assert client.post("/search", files=upload).json()["results"][0]["path"] == "0.png"
