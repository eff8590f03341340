"""Settings, sizes, batches and whitening of descriptors: with a network of a few parameters, and a
ViT and a ResNet from files.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from flax import traverse_util

from ggem_jax.descriptors.backbones import Network, PatchMap, load_network
from ggem_jax.descriptors.extract import Extractor, fitted_size
from ggem_jax.descriptors.scales import SCALES
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.descriptors.superglobal import superglobal_descriptors
from ggem_jax.descriptors.whitening import learn_whitening, load_whitening, save_whitening, whiten
from ggem_jax.files.images import UnreadableImage, crop, normalise, resize
from ggem_jax.models.resnet import ResNet, ResNetConfig
from ggem_jax.models.vit import ViT, ViTConfig
from ggem_jax.pooling import avg_pool
from ggem_jax.weights import MismatchedWeights, UnreadableWeights, own, write_safetensors


class Tiny(nn.Module):
    """One convolution over whole places of 32 x 32 pixels."""

    @nn.compact
    def __call__(self, images):
        return nn.relu(nn.Conv(12, (32, 32), (32, 32), padding="SAME")(images))


@pytest.fixture(scope="module")
def network():
    variables = draw_variables(Tiny(), jnp.zeros((1, 96, 96, 3)))
    return Network(Tiny(), variables, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32)


def images_of(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for height, width in sizes]


def test_a_descriptor_is_that_of_the_resized_image(network):
    settings = DescriptorSettings(longest_side=192)
    (image,) = images_of((150, 200))
    got = Extractor(settings, network=network).describe(image)
    images = normalise(resize(image, 160, 192), mean=network.mean, std=network.std)[
        None
    ]  # 144 rounded to a multiple of 32
    want = superglobal_descriptors(
        network.model, network.variables, jnp.asarray(images), scales=SCALES[3]
    ).descriptor[0]
    np.testing.assert_array_equal(got, want)
    assert np.linalg.norm(got) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_vectors_come_in_order_whatever_the_sizes_and_batches(network, batch):
    extractor = Extractor(DescriptorSettings(longest_side=160), network=network, batch=batch)
    mixed = images_of(
        (100, 160), (160, 100), (100, 160), (1, 200), (90, 160), (160, 160), (160, 100)
    )
    together = list(extractor(iter(mixed)))
    assert isinstance(together[3], UnreadableImage)
    for image, vector in zip(mixed[:3] + mixed[4:], together[:3] + together[4:], strict=True):
        np.testing.assert_allclose(
            vector, Extractor(extractor.settings, network=network).describe(image), atol=1e-6
        )
    assert list(extractor([])) == []


def test_a_box_is_cut_out_first(network):
    extractor = Extractor(DescriptorSettings(longest_side=160, scales=1), network=network)
    (image,) = images_of((200, 300))
    np.testing.assert_array_equal(
        extractor.describe(image, (10.7, 20.2, 150, 190)),
        extractor.describe(crop(image, (10, 20, 150, 190))),
    )


def test_every_setting_changes_the_descriptor(network):
    (image,) = images_of((200, 300))
    base = DescriptorSettings(longest_side=192)
    changes = [
        {"pooling": "average"}, {"pooling": "max"}, {"pooling": "gem"}, {"regional": False},
        {"scales": 1}, {"scales": 5}, {"scale_gem": False},
        {"antialias": True}, {"sizes": "exact"}, {"longest_side": 160},
    ]  # fmt: skip
    vectors = [
        Extractor(dataclasses.replace(base, **change), network=network).describe(image)
        for change in [{}, *changes]
    ]
    cosines = np.stack(vectors) @ np.stack(vectors).T
    assert np.max(cosines - np.eye(len(vectors))) < 1 - 1e-7


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((768, 1024), {}, (256, 320)),  # 240 is nearer to 256 than to 224
        ((1024, 683), {}, (320, 224)),
        ((50, 60), {}, (256, 320)),  # small images are enlarged
        ((100, 1600), {}, (160, 320)),  # the shorter side needs 3 places at 0.7071: 136, so 160
        ((100, 1600), {"scales": 1, "regional": False}, (32, 320)),
        ((768, 1024), {"sizes": "exact"}, (240, 320)),
        ((768, 1024), {"sizes": "exact", "longest_side": 0}, (768, 1024)),
        ((50, 60), {"sizes": "exact"}, (136, 163)),
        ((200, 240), {"sizes": "exact"}, (200, 240)),
    ],
)
def test_sizes(size, settings, expected):
    assert fitted_size(*size, DescriptorSettings(**settings), 32) == expected


def test_a_thousand_sizes_are_a_few_shapes():
    rng = np.random.default_rng(0)
    sizes = {
        fitted_size(*rng.integers(200, 4000, 2).tolist(), DescriptorSettings(), 32)
        for _ in range(1000)
    }
    assert len(sizes) <= 11  # 160 to 320 in steps of 32, in both directions
    with pytest.raises(UnreadableImage, match="an image of 5000 x 1 pixels is too thin"):
        fitted_size(1, 5000, DescriptorSettings(), 32)


def test_a_vit_is_read_from_a_file_and_gives_patch_maps(tmp_path, monkeypatch):
    config = ViTConfig(patch=16, width=24, depth=1, heads=3, mlp_width=32, image=64, registers=2)
    monkeypatch.setattr(
        own,
        "vit_config",
        lambda variant, **changes: dataclasses.replace(
            config, **{"registers": 0, "image": 224} | changes
        ),
    )
    vit = ViT(config, pooling=avg_pool, num_classes=5)
    params = draw_variables(vit, jnp.zeros((1, 64, 64, 3)))["params"]
    flat = traverse_util.flatten_dict({"params": params}, sep="/")
    write_safetensors(tmp_path / "vit.safetensors", flat)
    network = load_network("vit-S/16", tmp_path / "vit.safetensors")
    assert isinstance(network.model, PatchMap)
    assert network.model.vit.config == config
    images = jax.random.normal(jax.random.key(1), (2, 50, 70, 3))
    tokens = jax.jit(vit.apply)({"params": params}, images[:, :48, :64]).tokens
    np.testing.assert_allclose(
        jax.jit(network.model.apply)(network.variables, images),
        tokens[:, 3:].reshape(2, 3, 4, 24),
        atol=1e-6,
    )
    (image,) = images_of((100, 130))
    assert Extractor(
        DescriptorSettings("vit-S/16", "x", longest_side=160, scales=1), network=network
    ).describe(image).shape == (24,)
    write_safetensors(
        tmp_path / "less.safetensors",
        {name: value for name, value in flat.items() if "norm/scale" not in name},
    )
    with pytest.raises(MismatchedWeights, match=r"1 missing: params/norm/scale \(24,\)"):
        load_network("vit-S/16", tmp_path / "less.safetensors")


def test_a_resnet_has_its_head(network):
    config = ResNetConfig((1, 1, 1, 1), widths=(8, 8, 8, 16), stem=4, descriptor=6)
    model = ResNet(config)
    variables = draw_variables(model, jnp.zeros((1, 96, 96, 3)))
    (image,) = images_of((100, 130))
    extractor = Extractor(
        DescriptorSettings(longest_side=160),
        network=Network(model, variables, network.mean, network.std, 32),
    )
    assert extractor.describe(image).shape == (6,)


def test_whitened_descriptors_are_uncorrelated_and_survive_their_file(tmp_path, network):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) + 3
    whitening = learn_whitening(x, dim=5)
    projected = (x - whitening.mean) @ whitening.projection
    np.testing.assert_allclose(np.cov(projected.T), np.eye(5), atol=1e-4)
    variances = np.linalg.eigvalsh(np.cov(x.T))[::-1][:5]
    np.testing.assert_allclose(
        1 / np.linalg.norm(whitening.projection, axis=0) ** 2, variances, rtol=1e-4
    )  # the largest, in order
    np.testing.assert_allclose(np.linalg.norm(whiten(x, whitening), axis=1), 1, atol=1e-6)
    path = tmp_path / "white.npz"
    save_whitening(path, whitening)
    for one, other in zip(load_whitening(path), whitening, strict=True):
        np.testing.assert_array_equal(one, other)
    settings = DescriptorSettings(longest_side=160, scales=1, whitening=str(path))
    (image,) = images_of((100, 160))
    plain = Extractor(dataclasses.replace(settings, whitening=None), network=network).describe(
        image
    )
    np.testing.assert_allclose(
        Extractor(settings, network=network).describe(image), whiten(plain, whitening), atol=1e-6
    )


def test_a_record_tells_files_apart_by_their_contents(tmp_path):
    path = tmp_path / "weights"
    records = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        records.append(DescriptorSettings("resnet50", str(path)).record())
    assert records[0] == records[2] != records[1]
    assert str(tmp_path) not in str(records)


REFUSED = {
    "backbone": (
        lambda: DescriptorSettings("alexnet"),
        "backbone must be one of efficientnet-lite0, resnet101, .*dinov2, .* sizes of a ViT such as"
        " vit-S/16, not 'alexnet'",
    ),
    "no weights": (lambda: DescriptorSettings("resnet50"), "resnet50 needs a file of weights"),
    "half a normalisation": (
        lambda: DescriptorSettings(mean=(0.5, 0.5, 0.5)),
        "mean and std go together",
    ),
    "a deviation of 0": (
        lambda: DescriptorSettings(mean=(0.5, 0.5, 0.5), std=(1, 1, 0)),
        "std must be positive",
    ),
    "pooling": (
        lambda: DescriptorSettings(pooling="mean"),
        r"pooling must be one of gem\+, gem, average, max, clip, own, not 'mean'",
    ),
    "scales": (lambda: DescriptorSettings(scales=2), "scales must be one of 1, 3, 5, not 2"),
    "true as a number": (
        lambda: DescriptorSettings(scales=True),
        "scales must be one of 1, 3, 5, not True",
    ),
    "a number as true": (
        lambda: DescriptorSettings(regional=1),
        "regional must be one of False, True, not 1",
    ),
    "small": (lambda: DescriptorSettings(longest_side=100), "at least 160 pixels, not 100"),
    "zero in buckets": (lambda: DescriptorSettings(longest_side=0), "at least 160 pixels, not 0"),
    "small though exact": (
        lambda: DescriptorSettings(sizes="exact", longest_side=5),
        "at least 160 pixels, or 0, not 5",
    ),
    "absent weights": (
        lambda: DescriptorSettings("resnet50", "/nowhere").record(),
        "/nowhere cannot be read: No such file",
    ),
    "few descriptors": (
        lambda: learn_whitening(np.eye(3, 8)),
        "3 descriptors span 2 dimensions, and 8 are asked for",
    ),
    "dimensions": (
        lambda: learn_whitening(np.eye(8), dim=9),
        "dim must be a whole number from 1 to 8, not 9",
    ),
    "not finite": (lambda: learn_whitening(np.full((4, 2), np.nan)), "finite"),
    "no network": (lambda: load_network("resnet50"), "needs a file of weights"),
    "batch": (lambda: Extractor(batch=0), "batch must be at least 1"),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_what_is_no_whitening_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", mean=np.ones(3))
    np.savez(tmp_path / "odd.npz", mean=np.ones(3), projection=np.ones((2, 2)))
    for name in ("text", "other", "odd", "absent"):
        with pytest.raises(ValueError, match="is no file of a whitening"):
            load_whitening(tmp_path / f"{name}.npz")
    with pytest.raises(UnreadableWeights):
        load_network("resnet50", tmp_path / "text.npz")
