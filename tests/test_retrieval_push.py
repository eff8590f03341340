"""`push`: an index is sent to a vector database, whatever stops it, and searched there."""

import collections
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pymilvus  # noqa: F401  # its loggers keep the streams of the first import, not of a test
import pytest
from small_index import SETTINGS, described, extract, save
from test_retrieval_stores import ROOT, Table

from ggem_jax.retrieval.index import pushing
from ggem_jax.retrieval.index.index import Index, add, build, remove
from ggem_jax.retrieval.index.pushing import Pushed, fill_collection, push, read_ids
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.methods import choose_method
from ggem_jax.retrieval.stores import Marker, StoreRefused
from ggem_jax.retrieval.stores.milvus import open_milvus

# Push: any collection


class Collection(Table):
    """A collection in memory that can die before each of its calls."""

    def __init__(self, dies_at=10**9):
        super().__init__(np.empty((0, 3), np.float32))
        self.marker, self.left, self.sent = None, dies_at, 0

    def live(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def read_marker(self):
        self.live()
        return self.marker

    def write_marker(self, marker):
        self.live()
        self.marker = marker

    def ids(self):
        self.live()
        return self.numbers[np.random.default_rng(0).permutation(len(self.numbers))]

    def put(self, ids, vectors):
        self.live()
        assert vectors.dtype == np.float32
        keep = ~np.isin(self.numbers, ids)
        self.numbers = np.concatenate([self.numbers[keep], ids])
        self.vectors = np.concatenate([self.vectors[keep], vectors])
        self.sent += len(ids)

    def drop(self, ids):
        self.live()
        keep = ~np.isin(self.numbers, ids)
        self.numbers, self.vectors = self.numbers[keep], self.vectors[keep]


@pytest.fixture
def photos(tmp_path):
    for seed in range(12):
        save(tmp_path / "photos" / ("", "a", "b/c")[seed % 3] / f"{seed:02}.png", seed)
    shutil.copy(tmp_path / "photos" / "00.png", tmp_path / "photos" / "copy.png")
    return tmp_path / "photos"


@pytest.fixture
def built(photos, tmp_path):
    build(photos, tmp_path / "my.index", extract, SETTINGS)
    return tmp_path / "my.index"


def fill(collection, path):
    opened = Index.open(path)
    return fill_collection(collection, opened, read_ids(opened))


def assert_holds(collection, path):
    opened = Index.open(path)
    ids = read_ids(opened)
    assert collection.marker == pushing.make_marker(opened, ids)
    rows = np.argsort(collection.numbers)
    np.testing.assert_array_equal(collection.numbers[rows], np.sort(ids))
    vectors = opened.vectors().take(np.argsort(ids)).astype(np.float32)
    np.testing.assert_array_equal(collection.vectors[rows], vectors)


def test_a_push_sends_what_differs(built, photos):
    collection = Collection()
    assert fill(collection, built) == (13, 0)
    assert_holds(collection, built)
    assert fill(collection, built) == (0, 0)
    save(photos / "new.png", 99)
    save(photos / "03.png", 98)
    (photos / "a" / "01.png").unlink()
    add(built, extract, SETTINGS, prune=True)
    assert fill(collection, built) == (2, 2)
    assert_holds(collection, built)
    assert collection.sent == 15


def test_a_push_that_stops_anywhere_resumes(built, photos, monkeypatch):
    monkeypatch.setattr(pushing, "_ROWS", 3)
    first = Collection()
    fill(first, built)
    save(photos / "new.png", 99)
    (photos / "a" / "01.png").unlink()
    remove(built, ["b"])
    add(built, extract, SETTINGS, prune=True)
    for start in (None, first):
        for dies_at in range(100):
            collection = Collection(dies_at)
            if start is not None:
                collection.marker = start.marker
                collection.numbers, collection.vectors = start.numbers, start.vectors
            try:
                fill(collection, built)
                break
            except KeyboardInterrupt:
                complete = collection.marker is not None and collection.marker.complete
                untouched = start is not None and dies_at < 2
                assert complete == untouched
            collection.left = 10**9
            fill(collection, built)
            assert_holds(collection, built)
        assert dies_at > 6


def test_a_collection_of_something_else_is_refused(built, photos, tmp_path):
    collection = Collection()
    fill(collection, built)
    kept = collection.marker
    build(photos, tmp_path / "other", extract, {**SETTINGS, "model": "another"})
    build(photos / "a", tmp_path / "below", extract, SETTINGS)
    build(photos, tmp_path / "wide", extract, SETTINGS, dtype="float32")
    for other in ("other", "below", "wide"):
        with pytest.raises(StoreRefused, match="index of other images or settings: give another"):
            fill(collection, tmp_path / other)
        assert collection.marker == kept


def test_two_pushes_at_once_are_noticed(built):
    class Disturbed(Collection):
        def drop(self, ids):
            super().drop(ids)
            super().drop(self.numbers[:1])

    collection = Disturbed()
    with pytest.raises(StoreRefused, match="changed meanwhile: let one push at a time"):
        fill(collection, built)
    assert not collection.marker.complete


def test_ids_follow_path_content_and_vector(built, photos):
    before = dict(zip(Index.open(built).paths, read_ids(Index.open(built)).tolist(), strict=True))
    assert len(set(before.values())) == 13
    assert min(before.values()) >= 0
    save(photos / "03.png", 98)
    os.rename(photos / "06.png", photos / "moved.png")
    add(built, extract, SETTINGS, prune=True)
    after = dict(zip(Index.open(built).paths, read_ids(Index.open(built)).tolist(), strict=True))
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {"03.png", "moved.png"}
    stale = Index.open(built)
    remove(built, ["moved.png"])
    with pytest.raises(IndexRefused, match="is being written: wait"):
        read_ids(stale)


def test_the_name_of_a_collection():
    names = {"my.index": "my_index", "2026": "_2026", "ümläut": "_ml_ut", "_a": "_a"}
    for folder, name in names.items():
        assert pushing.default_collection(Path("/photos") / folder) == name


# Push and search: Milvus Lite


@pytest.fixture
def url(tmp_path):
    return f"milvus:{tmp_path / 'stores.db'}"


def test_search_through_milvus_is_that_of_the_index(built, photos, url, monkeypatch):
    monkeypatch.setattr(pushing, "_ROWS", 5)
    told = []
    assert push(built, url, on_progress=lambda *counts: told.append(counts)) == Pushed(
        str(built), url, "my_index", 13, 0, 0
    )
    assert (told[0], told[-1]) == ((0, 13), (13, 13))
    assert push(built, url).unchanged == 13
    queries = np.stack([described(np.full((1, 1, 3), 10 * i, np.uint8)) for i in range(5)])
    opened = Index.open(built)
    for rerank in (None, choose_method("superglobal", candidates=9, neighbors=2)):
        own = opened.search(queries, k=6, rerank=rerank)
        found = opened.search(queries, k=6, rerank=rerank, store=url)
        for name in ("ids", "paths", "scores", "ranks", "scores_before", "ranks_before"):
            np.testing.assert_array_equal(getattr(found, name), getattr(own, name), err_msg=name)
    remove(built, ["a"])
    with pytest.raises(StoreRefused, match="holds another version of the index: run ggem-retr"):
        Index.open(built).search(queries, store=url)
    assert push(built, url).removed == 4
    assert Index.open(built).search(queries, k=99, store=url).ids.shape == (5, 9)
    assert push(built, url, collection="second").added == 9
    own = Index.open(built).search(queries, k=3)
    found = Index.open(built).search(queries, k=3, store=url, collection="second")
    np.testing.assert_array_equal(found.ids, own.ids)


def test_an_unfinished_push_is_not_searched(built, url):
    push(built, url)
    opened = Index.open(built)
    with open_milvus(url, "my_index", dim=3) as collection:
        marker = collection.read_marker()
        collection.write_marker(marker._replace(complete=False))
    with pytest.raises(StoreRefused, match=r"holds an unfinished push: run ggem-retrieval push"):
        opened.search(np.eye(3)[:1], store=url)
    assert push(built, url).added == 0
    opened.search(np.eye(3)[:1], store=url)


def test_what_is_no_database_of_ours_is_refused(built, url, tmp_path):
    def refused(words, store, **options):
        with pytest.raises(StoreRefused, match=words) as caught:
            push(built, store, **options)
        assert "\n" not in str(caught.value)

    (tmp_path / "diary.db").write_text("dear diary")
    (tmp_path / "photos.db").mkdir()
    (tmp_path / "photos.db" / "1.jpg").write_text("a photo")
    refused("is no address of a vector database", str(tmp_path / "stores.db"))
    refused("is no address of a vector database", "milvus:")
    refused("must end with .db", f"milvus:{tmp_path / 'stores'}")
    refused("no database of Milvus Lite", f"milvus:{tmp_path / 'diary.db'}")
    refused("no database of Milvus Lite", f"milvus:{tmp_path / 'photos.db'}")
    refused("cannot be made: .* is no folder", f"milvus:{tmp_path / 'nowhere' / 'a.db'}")
    refused("must be named by letters", url, collection="a b")
    refused(r"127.0.0.1:9 did not do what was asked \(Fail connecting", "milvus:http://127.0.0.1:9")
    assert (tmp_path / "diary.db").read_text() == "dear diary"
    assert os.listdir(tmp_path / "photos.db") == ["1.jpg"]
    opened = Index.open(built)
    with pytest.raises(StoreRefused, match="is not there: push an index into it first"):
        opened.search(np.eye(3)[:1], store=url)
    assert not (tmp_path / "stores.db").exists()
    push(built, url, collection="other")
    with pytest.raises(StoreRefused, match="has no finished collection my_index"):
        opened.search(np.eye(3)[:1], store=url)
    with pytest.raises(StoreRefused, match="has vectors of 3 numbers, not 5"):
        open_milvus(url, "other", dim=5)
    with open_milvus(url, "mine", dim=3, new=True) as collection:
        collection.client.drop_collection("mine_marker")
    refused("was made by another program: give another --collection", url, collection="mine")


def test_a_server_that_lost_vectors_says_so(built, url):
    push(built, url)
    ids = read_ids(Index.open(built))
    with open_milvus(url, "my_index", dim=3) as collection:
        assert collection.read_marker() == Marker(**collection.read_marker()._asdict())
        collection.drop(ids[:2])
        with pytest.raises(StoreRefused, match="lacks 2 of 13 vectors"):
            collection.take(ids)
        with pytest.raises(StoreRefused, match="gave 11 of 13 results"):
            collection.search(np.eye(3, dtype=np.float32)[:1], 13)
        vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
        collection.put(ids[4:8], vectors)  # in any order, and again
        np.testing.assert_array_equal(collection.take(ids[[7, 4]]), vectors[[3, 0]])


def test_without_pymilvus_one_sentence_asks_for_it(built, url, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"needs pymilvus: pip install 'ggem-jax\[milvus\]'"):
        push(built, url)


def test_an_empty_index_is_refused(built, url):
    remove(built, ["."])
    with pytest.raises(IndexRefused, match="holds no images"):
        push(built, url)


KILLS = """
import json, os, random, shutil, signal, sys, time
import pymilvus, milvus_lite.server_manager, milvus_lite.adapter.grpc.server
from ggem_jax.retrieval.index import pushing
path, before, out = sys.argv[1:]
pushing._ROWS = 4
def fork(store, dies_at=None, after=False, wait=None):
    process = os.fork()
    if process:
        if wait is not None:
            time.sleep(wait)
            os.kill(process, signal.SIGKILL)
        return os.waitpid(process, 0)[1] == signal.SIGKILL
    left = [dies_at]
    def dying(name):
        really = getattr(pymilvus.MilvusClient, name)
        def called(self, *arguments, **options):
            left[0] -= 1
            if left[0] < 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            value = really(self, *arguments, **options)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return value
        setattr(pymilvus.MilvusClient, name, called)
    if dies_at is not None:
        for name in ("create_collection", "load_collection", "upsert", "delete", "flush"):
            dying(name)
    try:
        pushing.push(path, f"milvus:{store}")
    finally:
        os._exit(0)
def prepared(name):
    store = f"{out}/{name}.db"
    if name.startswith("again"):
        shutil.copytree(before, store)
    return store
killed, rng = {}, random.Random(0)
for kind in ("new", "again"):
    start = time.monotonic()
    fork(prepared(f"{kind}_whole"))
    whole = time.monotonic() - start
    for number in range(4):
        store = prepared(f"{kind}_random{number}")
        killed[store] = fork(store, wait=rng.uniform(whole / 4, whole))
    number, dead = 0, True
    while dead:
        store = prepared(f"{kind}_call{number}")
        dead = killed[store] = fork(store, number, after=bool(number % 2))
        number += 1
print(json.dumps(killed))
"""


def test_kills(built, photos, tmp_path):
    """A push that is killed, at random moments or around each call that writes, leaves a collection
    that is refused or complete, and the same call completes it.
    """
    push(built, f"milvus:{tmp_path / 'before.db'}")
    for seed in range(5):
        save(photos / f"new{seed}.png", 50 + seed)
    (photos / "a" / "01.png").unlink()
    add(built, extract, SETTINGS, prune=True)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", KILLS, built, tmp_path / "before.db", tmp_path / "out"]
    run = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    killed, seen = json.loads(run.stdout), collections.Counter()
    assert sum(killed.values()) > 25
    opened = Index.open(built)
    query = described(np.full((1, 1, 3), 77, np.uint8))[None]
    expected = opened.search(query, k=17)
    for store, dead in killed.items():
        url = f"milvus:{store}"
        if not dead:
            opened.search(query, k=17, store=url)
        with contextlib.suppress(StoreRefused):
            found = opened.search(query, k=17, store=url)
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.scores, expected.scores)
            seen["complete"] += 1
        push(built, url)
        found = opened.search(query, k=17, store=url)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert 2 < seen["complete"] < len(killed) - 20, seen


def test_a_collection_that_was_half_made_is_made_again(built, url):
    database = Path(url.removeprefix("milvus:"))
    with open_milvus(url, "other", dim=3, new=True):
        pass
    (database / "collections" / "my_index").mkdir()
    assert push(built, url).added == len(Index.open(built))
    Index.open(built).search(np.eye(3)[:1], store=url)


def test_a_graph_that_was_half_written_is_made_again(built, url):
    own = "import sys; from ggem_jax.retrieval.index.pushing import push; push(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", own, str(built), url], cwd=ROOT, check=True)
    query = described(np.full((1, 1, 3), 77, np.uint8))[None]
    graphs = [
        path
        for path in Path(url.removeprefix("milvus:")).rglob("*.idx")
        if "_marker" not in str(path)
    ]
    assert graphs
    for graph in graphs:
        graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    opened = Index.open(built)
    with pytest.raises(StoreRefused):
        opened.search(query, k=5, store=url)
    pushed = push(built, url)
    assert (pushed.added, pushed.unchanged) == (len(opened), 0)
    expected = opened.search(query, k=5)
    np.testing.assert_array_equal(opened.search(query, k=5, store=url).ids, expected.ids)


# The tool


def test_the_tool(tmp_path, monkeypatch, capsys, nine_photos):
    from ggem_jax.retrieval.__main__ import main

    assert main(["index", "photos", "-o", "my.index"]) == 0
    capsys.readouterr()

    def json_of(*arguments):
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    record = Pushed("my.index", "milvus:a.db", "my_index", 9, 0, 0).record()
    assert json_of("push", "my.index", "milvus:a.db") == record
    assert main(["push", "my.index", "milvus:a.db", "--collection", "c2"]) == 0
    assert capsys.readouterr().out == "c2 in milvus:a.db: 9 added, 0 unchanged, 0 removed\n"
    flags = ["photos/3.png", "-k", "4", "--rerank", "superglobal", "--candidates", "9"]
    own = json_of("search", "my.index", *flags)
    for more in ([], ["--collection", "c2"]):
        assert json_of("search", "my.index", *flags, "--store", "milvus:a.db", *more) == own
    assert main(["search", "my.index", "photos/3.png", "--collection", "c2"]) == 2
    assert "give --store too" in capsys.readouterr().err
    assert main(["search", "my.index", "photos/3.png", "--store", "a.db"]) == 1
    assert "is no address of a vector database" in capsys.readouterr().err
    assert main(["search", "my.index", "photos/3.png", "--store", "milvus:b.db"]) == 1
    assert "is not there: push an index" in capsys.readouterr().err
