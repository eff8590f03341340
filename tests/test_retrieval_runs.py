"""An index whose images are described by a training run: its own pooling and projection, kept in
the index, so that it is searched alike.
"""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from small_run import SMALL, write_run

from ggem_jax.descriptors.backbones import PatchMap, load_network
from ggem_jax.descriptors.extract import Extractor
from ggem_jax.descriptors.settings import DescriptorSettings, digest
from ggem_jax.files.images import read_image
from ggem_jax.models.vit import ViT
from ggem_jax.pooling import avg_pool
from ggem_jax.retrieval.__main__ import main
from ggem_jax.retrieval.index import Index, IndexRefused, add_images, build_index, info, merge
from ggem_jax.weights import MismatchedWeights, UnreadableWeights
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.inference import make_infer
from ggem_jax.weights.load import LoadedViT, load_vit

SIZES = [(40, 30), (16, 16), (25, 90), (64, 20)]


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def describe(run, images):
    """The descriptors of a run, as its evaluations make them."""
    loaded = load_vit(run)
    infer, variables = make_infer(loaded)
    pixels = [loaded.preprocessing.square(read_image(path)) for path in sorted(images.iterdir())]
    return np.asarray(jax.jit(infer)(variables, np.stack(pixels))["descriptor"])


@pytest.mark.parametrize("dim", [0, 6])
def test_an_index_holds_the_descriptors_of_the_run_and_keeps_its_network(dim, images, tmp_path):
    run = write_run(tmp_path / "run", dim=dim)
    report = build_index(images, tmp_path / "index", DescriptorSettings(weights=str(run)))
    assert (report.added, report.notes) == (len(SIZES), ())
    index = Index.open(tmp_path / "index")
    want = describe(run, images)
    np.testing.assert_allclose(index.vectors().take(np.arange(4)), want, atol=1e-3)  # float16
    assert info(tmp_path / "index")["settings"]["pooling"] == "own"
    shutil.rmtree(run)  # the index needs neither the run nor its own place
    moved = (tmp_path / "index").rename(tmp_path / "moved")
    shutil.copy(images / "2.png", images / "new.png")
    assert add_images(moved).added == 1
    again = moved.rename(tmp_path / "again")
    query = tmp_path / "query.png"
    Image.open(images / "1.png").transpose(Image.Transpose.ROTATE_180).save(query)
    results = Index.open(again).search([query], k=5)
    assert results.paths.shape == (1, 5)


def test_a_file_that_is_written_from_a_run_is_the_same_network(images, tmp_path):
    run = write_run(tmp_path / "run", dim=6)
    file = export_vit(load_vit(run), tmp_path / "out").files[0]
    assert digest(run) == digest(file)
    of_run = DescriptorSettings(weights=str(run))
    of_file = DescriptorSettings(weights=str(file), pooling="own")
    assert of_run.record() == of_file.record()
    assert DescriptorSettings(weights=str(file)).pooling == "gem+"
    pixels = [read_image(path) for path in sorted(images.iterdir())]
    vectors = [list(Extractor(each, batch=2)(pixels)) for each in (of_run, of_file)]
    np.testing.assert_array_equal(*vectors)
    np.testing.assert_allclose(vectors[0], describe(run, images), atol=1e-5)


def test_an_index_of_a_run_that_has_gone_on_is_not_mixed(images, tmp_path):
    run = write_run(tmp_path / "run", dim=6)
    settings = DescriptorSettings(weights=str(run))
    build_index(images, tmp_path / "index", settings)
    assert build_index(images, tmp_path / "index", settings).unchanged == len(SIZES)
    write_run(run, dim=6, seed=1, step=9)
    with pytest.raises(IndexRefused, match="weights"):
        build_index(images, tmp_path / "index", settings)
    assert len(Index.open(tmp_path / "index").search([images / "0.png"]).paths)


def test_the_parts_of_an_index_are_merged_with_the_network(images, tmp_path):
    run = write_run(tmp_path / "run", dim=6)
    parts = [tmp_path / "1", tmp_path / "2"]
    for number, part in enumerate(parts, 1):
        settings = DescriptorSettings(weights=str(run))
        build_index(images, part, settings, shard=f"{number}/2")
    merge(tmp_path / "index", parts)
    for each in (run, *parts):
        shutil.rmtree(each)
    query = tmp_path / "query.png"
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(query)
    assert Index.open(tmp_path / "index").search([query], k=2).paths.shape == (1, 2)


def test_the_tool_indexes_with_a_run_and_searches(images, tmp_path, capsys):
    run = write_run(tmp_path / "run", dim=6)
    command = ["index", str(images), "-o", str(tmp_path / "index"), "--weights", str(run)]
    assert main(command) == 0
    assert main(["search", str(tmp_path / "index"), str(images / "2.png"), "-k", "1"]) == 0
    assert "2.png" in capsys.readouterr().out


def test_other_poolings_take_the_tokens_of_a_run(tmp_path):
    run = write_run(tmp_path / "run", dim=6)
    settings = DescriptorSettings(weights=str(run), pooling="gem+").resolve()
    assert (settings.backbone, settings.scales, settings.regional) == ("vit-flax", 3, True)
    network = load_network(weights=run)
    assert isinstance(network.model, PatchMap)
    assert network.model.vit.pooling == avg_pool
    assert (network.mean, network.preprocessing) == ((0.1, 0.2, 0.3), None)


def test_what_has_no_pooling_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the pooling own needs a file of weights, of a training"):
        DescriptorSettings(pooling="own")
    run = write_run(tmp_path / "run")
    bare = load_vit(run, num_classes=0, pooling=avg_pool)
    plain = LoadedViT(ViT(SMALL, avg_pool), bare.variables, None, None, "x")
    file = export_vit(plain, tmp_path / "plain").files[0]
    with pytest.raises(ValueError, match="nothing says how images become its inputs"):
        load_network(weights=file, own_head="own")
    with pytest.raises(MismatchedWeights, match="the pooling own needs the weights of a training"):
        load_network("efficientnet-lite0", own_head="own")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableWeights, match="is not the folder of a training run"):
        DescriptorSettings(weights=str(tmp_path / "empty"))
