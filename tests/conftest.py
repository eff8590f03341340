"""Shared by all tests: eight virtual CPU devices, a cache of compiled programs, shape checks, the
folder of the golden data, tools as processes of their own, and small data sets.
"""

import collections
import functools
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GGEM_SHARED", ROOT / ".." / "shared")).resolve()

# Compiled programs stay on disk for the other workers, for the tools that tests start, and for the
# next run. JAX reads these variables when it is imported.
COMPILATION_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / version("jaxlib")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
COMPILATION_CACHE |= {name: os.environ[name] for name in COMPILATION_CACHE if name in os.environ}
os.environ |= COMPILATION_CACHE

import chex  # noqa: E402
import jax  # noqa: E402
import shape_checks  # noqa: E402

CHECKED_MODULES = shape_checks.install(ROOT, ("ggem_jax", "neupims", "train", "eval"))
chex.set_n_cpu_devices(8)

# after the checks, which only later imports get
from retrieval_photos import colours, indexed, nine_photos, run, twelve_photos  # noqa: E402, F401
from small_index import built, photos, small  # noqa: E402, F401

# Mark -> the file of its cases, which need a run of their own, and how many of them must pass,
# without those marked `slow`.
LEAST_CASES = {
    "interpreter": ("test_kernels_interpreted.py", 75),
    "compiled": ("test_kernels_compiled.py", 25),
    "lowering": ("test_kernels_lowered.py", 30),
    "assembled": ("test_kernels_assembled.py", 11),
    "aot": ("test_kernels_partitioned.py", 7),
    "ptx": ("test_kernels_ptx.py", 36),
}

# Files that `--fast` leaves out, and that come first otherwise: their tests train, start processes,
# or compile whole networks.
COSTLY_FILES = {
    "test_bench_kernels.py",
    "test_compilation_cache.py",
    "test_docs.py",
    "test_docstring_examples.py",
    "test_efficientnet_lite.py",
    "test_eval_contrastive.py",
    "test_eval_demo.py",
    "test_eval_planted.py",
    "test_eval_pooling_study.py",
    "test_eval_retrieval.py",
    "test_eval_revisited.py",
    "test_examples.py",
    "test_load_vit.py",
    "test_neupims_evaluation.py",
    "test_neupims_examples.py",
    "test_neupims_explore.py",
    "test_neupims_explore_space.py",
    "test_neupims_gemv.py",
    "test_neupims_mistakes.py",
    "test_neupims_oracle.py",
    "test_neupims_prefill.py",
    "test_neupims_schedule.py",
    "test_neupims_search.py",
    "test_neupims_tool.py",
    "test_neupims_step.py",
    "test_neupims_your_own.py",
    "test_packaging.py",
    "test_pooling_maps.py",
    "test_resnet.py",
    "test_retrieval_backbones.py",
    "test_retrieval_descriptors.py",
    "test_retrieval_index.py",
    "test_retrieval_index_damage.py",
    "test_retrieval_index_kills.py",
    "test_retrieval_index_writers.py",
    "test_retrieval_instant.py",
    "test_retrieval_runs.py",
    "test_retrieval_processes.py",
    "test_retrieval_text.py",
    "test_runs.py",
    "test_text.py",
    "test_train_classify.py",
    "test_train_contrastive.py",
    "test_train_export.py",
    "test_train_metric.py",
    "test_train_predict.py",
    "test_train_published.py",
    "test_train_resume.py",
    "test_train_step.py",
    "test_vit.py",
    "test_weights_efficientnet_lite.py",
    "test_weights_vit.py",
    "test_your_own_images.py",
}

# The smallest training that uses everything: a second or two to compile.
TINY = [
    "--config", "digits", "--model.width", "16", "--model.depth", "2", "--model.heads", "2",
    "--model.mlp-width", "32", "--batch", "32",
]  # fmt: skip

# The same of train.contrastive.
TINY_PAIR = [
    "--config", "digits", "--model.width", "16", "--model.depth", "1", "--model.heads", "2",
    "--model.mlp-width", "32", "--batch", "32",
    "--embed", "16", "--text.width", "16", "--text.heads", "2", "--text.mlp-width", "32",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the compiled programs of a file: a worker would keep 8 GB of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The root of the golden and real data; a test skips only where its own folder is absent."""
    return SHARED


@pytest.fixture(scope="session")
def tool():
    """Starts `python -m MODULE FLAGS` in a process of its own, with `devices` CPU devices and files
    of at most `file_blocks` x 512 bytes.
    """

    def start(
        module: str,
        *flags: object,
        devices: int = 1,
        environment: dict[str, str] | None = None,
        file_blocks: int | None = None,
    ):
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JAX_", "XLA_", "PYTEST_"))
        }
        if "XDG_CACHE_HOME" not in (environment or {}):  # a test of the tool's own cache
            own |= COMPILATION_CACHE
        own |= {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        } | (environment or {})
        command = [sys.executable, "-W", "error::UserWarning", "-m", module, *map(str, flags)]
        if file_blocks is not None:
            command = ["sh", "-c", 'ulimit -f "$0"; exec "$@"', str(file_blocks), *command]
        return subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.fixture
def class_folders(tmp_path):
    """Three classes of images of 12 x 12 pixels, 10 of each in train and 4 in test: noise around a
    grey level of the class.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("ants", "bees", "cows")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = np.clip(rng.normal(60 + 60 * label, 20, (12, 12, 3)), 0, 255).astype(
                    np.uint8
                )
                Image.fromarray(noise).save(folder / f"{name}{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def captioned_folder(tmp_path):
    """`pairs.csv` beside 12 images of 9 x 9 pixels, each of one grey level; image 0 has two
    captions.
    """
    folder = tmp_path / "captioned"
    folder.mkdir()
    rows = ["image,caption"]
    for i in range(12):
        Image.new("RGB", (9, 9), (20 * i,) * 3).save(folder / f"{i}.png")
        rows.append(f'{i}.png,"grey number {i}, plain"')
    (folder / "pairs.csv").write_text("\n".join([*rows, "0.png,black"]) + "\n")
    return folder


def draw_variables(model, *inputs, seed=0, **options):
    """Returns random variables of a Flax model, drawn by NumPy, so that its `init` is not compiled:
    kernels as large as their inputs ask for, scales and variances near 1, exponents near 3.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), *inputs)

    def draw(path, leaf):
        middle = {"scale": 1.0, "var": 1.0, "p": 3.0}.get(path[-1].key, 0.0)
        inputs = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 100
        drawn = np.clip(rng.standard_normal(leaf.shape, np.float32), -3, 3) / np.sqrt(inputs)
        return (middle + drawn).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def one_line(capsys, main, *flags) -> str:
    """The sentence that a tool ends with."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, flags)])
    assert isinstance(caught.value.code, str), "the exit code of a sentence is 1"
    assert "\n" not in caught.value.code
    assert "Traceback" not in capsys.readouterr().err
    return caught.value.code


def passed_cases(config: pytest.Config, mark: str) -> int:
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("passed", [])
    return sum(report.when == "call" and mark in report.keywords for report in reports)


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out the files of COSTLY_FILES")


def pytest_ignore_collect(collection_path, config):
    return True if config.option.fast and collection_path.name in COSTLY_FILES else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Puts costly files first, so that no worker ends with a long one, and marks the combinations
    of a test marked `sampled` as slow, except a few that cover every value of every parameter.
    """
    items.sort(key=lambda item: item.path.name not in COSTLY_FILES)
    by_test = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            by_test[item.path, item.originalname].append(item)
    for combinations in by_test.values():
        kept = few_with_every_value(combinations)
        for item in combinations:
            if item not in kept:
                item.add_marker(pytest.mark.slow)


def few_with_every_value(items: list) -> list:
    """Returns a few items that together cover every value of every parameter."""

    def shown(item):
        return {(name, id(value)) for name, value in item.callspec.params.items()}

    kept, unseen = [], set().union(*map(shown, items))
    while unseen:
        kept.append(max(items, key=lambda item: len(unseen & shown(item))))
        unseen -= shown(kept[-1])
    return kept


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fails the session if a file of `LEAST_CASES` ran as a whole and fewer cases passed than it
    lists: some were skipped, deselected or removed.
    """
    config = session.config
    if (
        hasattr(config, "workerinput")
        or session.exitstatus != pytest.ExitCode.OK
        or config.option.keyword
        or config.option.collectonly
    ):
        return
    for mark, (name, least) in LEAST_CASES.items():
        if (
            name in (Path(argument).name for argument in config.args)
            and passed_cases(config, mark) < least
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Reports how many cases of the kernels passed, of those that need a run of their own."""
    for mark, (name, least) in LEAST_CASES.items():
        if count := passed_cases(terminalreporter.config, mark):
            terminalreporter.write_line(
                f"{count} {mark} cases of the kernels passed, of at least {least} in {name}"
            )


def assert_same(got, want):
    """Compares nested values with their types, the order of keys, and arrays with their dtypes in
    native byte order.
    """
    assert isinstance(got, type(want)) or isinstance(want, collections.OrderedDict), (
        type(got),
        type(want),
    )
    if isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, np.ndarray):
        assert got.dtype == want.dtype.newbyteorder("=")
        np.testing.assert_array_equal(got, want)
    else:
        assert got == want
