"""The page of an index: its JSON API, what it refuses, and what it never shows."""

import io
import json
import os
import signal
import socket
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.retrieval.__main__ import main
from ggem_jax.retrieval.index.index import Index, build
from ggem_jax.retrieval.methods import choose_method
from ggem_jax.retrieval.page import make_app

HOSTILE = "<img src=x onerror=alert(1)>&\"'.png"


def describe(image):
    """The mean colour of each quarter of an image, of length 1."""
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    parts = [image[i * rows :][:rows, j * columns :][:, :columns] for i in (0, 1) for j in (0, 1)]
    vector = np.concatenate([part.mean((0, 1)) for part in parts]) - 99.5
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def pattern(seed, size=(24, 32)):
    quarters = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return np.kron(quarters, np.ones((size[0] // 2, size[1] // 2, 1), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images, one of a hostile name and one whose name is not UTF-8; secrets beside them."""
    base = tmp_path_factory.mktemp("page")
    (base / "photos" / "sub").mkdir(parents=True)
    for seed in range(10):
        Image.fromarray(pattern(seed)).save(base / "photos" / f"{seed:02}.png")
    Image.fromarray(pattern(10)).save(base / "photos" / "sub" / HOSTILE)
    with open(os.fsencode(base / "photos") + b"/\xff.png", "wb") as file:
        Image.fromarray(pattern(11)).save(file, "PNG")
    Image.fromarray(pattern(99)).save(base / "secret.png")
    (base / "secret.txt").write_text("secret")
    build(base / "photos", base / "my.index", lambda images: map(describe, images), {"model": "x"})
    return base


def client_of(app, **headers):
    return TestClient(
        app, base_url="http://127.0.0.1:8000", headers=headers, raise_server_exceptions=True
    )


@pytest.fixture
def client(folder):
    return client_of(make_app(folder / "my.index", describe=describe))


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def upload(client, data, **fields):
    return client.post("/search", files={"image": ("query.png", data)}, data=fields)


def id_of(folder, path):
    return Index.open(folder / "my.index").paths.index(path)


# What it answers


@pytest.mark.parametrize("rerank", ["none", "superglobal", "aqe", "alpha-qe"])
def test_similar_is_the_search_of_the_library(client, folder, rerank):
    index = Index.open(folder / "my.index")
    found = client.get(f"/similar/3?k=5&rerank={rerank}&neighbors=3").json()
    method = choose_method(rerank, **({} if rerank == "none" else {"neighbors": 3}))
    results = index.search(index.vectors().take(np.array([3])).astype(np.float32), 5, rerank=method)
    assert [hit["id"] for hit in found["results"]] == results.ids[0].tolist()
    (expected,) = results.record()["queries"]
    shared = expected["results"][0].keys()
    assert [{name: hit[name] for name in shared} for hit in found["results"]] == json.loads(
        json.dumps(expected["results"])
    )
    assert found["rerank"] == method.record()
    assert found["query"] | {"bytes": 0} == {
        "id": 3, "path": "03.png", "name": "03.png", "width": 32, "height": 24, "bytes": 0,
        "box": None,
    }  # fmt: skip
    assert found["index_changed"] is False


def test_an_upload_finds_itself_and_comes_back_as_a_preview(client):
    found = upload(client, png(pattern(4)), k="3", preview="1").json()
    assert [found["results"][0][name] for name in ("path", "rank")] == ["04.png", 1]
    assert found["results"][0]["score"] == pytest.approx(1, abs=2e-3)
    assert (found["query"]["width"], found["query"]["height"]) == (32, 24)
    assert found["preview"].startswith("data:image/jpeg;base64,")
    assert "preview" not in upload(client, png(pattern(4))).json()
    assert found["seconds"].keys() == {"network", "search"}


def test_a_box_is_the_part_that_is_searched_for(client, folder):
    large = np.zeros((80, 100, 3), np.uint8)
    large[30:54, 40:72] = pattern(7)
    found = upload(client, png(large), box="40,30,72,54").json()
    assert found["results"][0]["path"] == "07.png"
    assert found["query"]["box"] == [40, 30, 72, 54]
    part = client.get("/similar/7?box=0,0,16,12").json()
    assert part["query"]["box"] == [0, 0, 16, 12]
    assert part["query"]["id"] == 7
    pixels = pattern(7)[:12, :16]
    assert part["results"] == upload(client, png(pixels)).json()["results"]


def test_images_are_drawn_at_random_by_a_seed(client):
    first, again, other = (client.get(f"/images?k=6&seed={seed}").json() for seed in (1, 1, 2))
    assert first == again != other
    assert first["total"] == 12
    assert len({each["id"] for each in first["images"]}) == 6
    assert len(client.get("/images?k=500").json()["images"]) == 12


@pytest.mark.parametrize(("route", "longest"), [("thumbnail", 320), ("image", 1280)])
def test_images_are_small_jpegs_that_are_asked_for_again_after_a_change(tmp_path, route, longest):
    Image.fromarray(pattern(1, (1400, 2000))).save(tmp_path / "a.jpg")
    build(tmp_path, tmp_path / "my.index", lambda images: map(describe, images), {"model": "x"})
    client = client_of(make_app(tmp_path / "my.index", describe=describe))
    found = client.get(f"/{route}/0")
    assert Image.open(io.BytesIO(found.content)).format == "JPEG"
    assert max(Image.open(io.BytesIO(found.content)).size) == longest
    tag = found.headers["etag"]
    assert client.get(f"/{route}/0", headers={"if-none-match": tag}).status_code == 304
    Image.fromarray(pattern(2, (40, 20))).save(tmp_path / "a.jpg")
    again = client.get(f"/{route}/0", headers={"if-none-match": tag})
    assert (again.status_code, Image.open(io.BytesIO(again.content)).size) == (200, (20, 40))
    (tmp_path / "a.jpg").unlink()
    assert client.get(f"/{route}/0").status_code == 404


def test_a_changed_index_is_told(tmp_path):
    Image.fromarray(pattern(1)).save(tmp_path / "a.png")
    extract = lambda images: map(describe, images)  # noqa: E731
    build(tmp_path, tmp_path / "my.index", extract, {"model": "x"})
    client = client_of(make_app(tmp_path / "my.index", describe=describe))
    assert client.get("/similar/0").json()["index_changed"] is False
    Image.fromarray(pattern(2)).save(tmp_path / "b.png")
    build(tmp_path, tmp_path / "my.index", extract, {"model": "x"})
    found = client.get("/similar/0").json()
    assert (found["index_changed"], len(found["results"])) == (True, 1)


def test_the_network_of_the_index_is_made_once(folder, monkeypatch):
    from ggem_jax.retrieval.index import describing

    made = []

    class Extractor:
        def __init__(self, settings, batch):
            made.append(settings.weights)

        def fit(self, height, width):
            return (12, 16)

        def __call__(self, images):
            for image in images:
                assert image.shape in ((12, 16, 3), (9, 9, 3), (240, 320, 3))
                yield describe(image)

    def find_settings(path, record, *, weights, whitening):
        return DescriptorSettings(backbone="resnet50", weights=weights)

    monkeypatch.setattr(describing, "find_settings", find_settings)
    monkeypatch.setattr(describing, "make_extractor", Extractor)
    app = make_app(folder / "my.index", weights="w.safetensors")
    app.state.searcher.warm_up()
    found = upload(client_of(app), png(pattern(2))).json()
    assert found["results"][0]["path"] == "02.png"
    assert (found["query"]["width"], found["query"]["height"]) == (32, 24)
    assert upload(client_of(app), png(pattern(1)), box="0,0,9,9").status_code == 200
    assert made == ["w.safetensors"]


def test_an_index_of_another_program_is_searched_by_its_entries_only(folder):
    client = client_of(make_app(folder / "my.index"))
    assert client.get("/similar/0").status_code == 200
    refused = upload(client, png(pattern(1)))
    assert refused.status_code == 400
    assert "only the program that made it can search it by image" in refused.json()["error"]


# Mistakes: a status and one sentence


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/similar/12", 404, "there is no image 12: the index holds 12"),
        ("/thumbnail/99999999999999999999", 404, "there is no image"),
        ("/image/12", 404, "there is no image 12"),
        ("/similar/0?k=0", 400, "k must be a whole number from 1 to 500, not '0'"),
        ("/similar/0?k=501", 400, "not '501'"),
        ("/similar/0?k=%D9%A3", 400, "k must be a whole number"),
        ("/similar/0?rerank=dba", 400, "rerank must be one of none, superglobal, aqe, alpha-qe"),
        ("/similar/0?rerank=aqe&neighbors=0", 400, "neighbors must be"),
        ("/similar/0?box=1,2,3", 400, "box must be x1,y1,x2,y2 in pixels, not '1,2,3'"),
        ("/similar/0?box=1,2,nan,3", 400, "a box must be four numbers"),
        ("/similar/0?box=50,50,60,60", 400, "nothing of the image of 32 x 24 pixels is inside"),
        ("/images?seed=-1", 400, "seed must be"),
        ("/none", 404, "Not Found"),
        ("/search", 405, "Method Not Allowed"),
    ],
)
def test_mistakes_have_a_status_and_a_sentence(client, path, status, sentence):
    found = client.get(path)
    assert found.status_code == status
    assert sentence in found.json()["error"]


def test_uploads_that_are_no_images_are_refused(client):
    assert upload(client, b"no image").status_code == 422
    assert "the upload is not a readable image" in upload(client, b"").json()["error"]
    assert upload(client, png(pattern(1))[:60]).status_code == 422
    assert client.post("/search", data={"image": "text"}).status_code == 400
    assert client.post("/search", content=b"x").json()["error"] == "the field image must be a file"
    two = [("image", ("a.png", png(pattern(1)))), ("image", ("b.png", png(pattern(1))))]
    assert client.post("/search", files=two).status_code == 400
    long = {"k": "1" * 5000}
    assert upload(client, png(pattern(1)), **long).status_code == 400


def test_uploads_are_bounded_in_bytes_and_pixels(folder):
    small = client_of(make_app(folder / "my.index", describe=describe, max_bytes=4096))
    assert upload(small, png(pattern(1))).status_code == 200
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    large = upload(small, png(noise))
    assert (large.status_code, large.json()) == (
        413,
        {"error": "the request has more than 4096 bytes"},
    )
    told = small.post(  # without a length, in pieces
        "/search",
        content=iter([b"x" * 1000] * 10),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert (told.status_code, told.json()) == (large.status_code, large.json())
    few = client_of(make_app(folder / "my.index", describe=describe, max_megapixels=0.001))
    assert upload(few, png(pattern(1))).status_code == 200
    refused = upload(few, png(noise))
    assert refused.status_code == 422
    assert "64 x 64 pixels are more than 0.001 megapixels" in refused.json()["error"]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")  # 400 megapixels in 50 kB
    usual = client_of(make_app(folder / "my.index", describe=describe))
    assert upload(usual, bomb.getvalue()).status_code == 422


# Nothing outside the root


ENCODINGS = [
    "../secret.png", "../../etc/passwd", "..%2fsecret.png", "%2e%2e/secret.png",
    "%2e%2e%2fsecret.png", "..%252fsecret.png", "....//secret.png", "..\\secret.png",
    "..%5csecret.png", "%c0%ae%c0%ae/secret.png", "0/../../secret.png", "0%00.png", "-1", "1.0",
    "0x1", "1e0", "00.png", "%2fetc%2fpasswd", "0;/../secret.png", "%E2%91%A0", "%EF%BC%91",
]  # fmt: skip


@pytest.mark.parametrize("route", ["thumbnail", "image", "similar"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_only_ids_are_served(client, folder, route, name):
    raw = f"/{route}/{name}".encode()
    for target in (raw, b"/" + name.encode()):
        found = client.send(with_raw_path(client, target))
        assert found.status_code in (400, 403, 404), (target, found.status_code)
        assert b"secret" not in found.content
        assert not found.content.startswith(b"\xff\xd8")


def with_raw_path(client, target):
    """A request whose path is sent as it is: the client would resolve the dots."""
    request = client.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=target)
    return request


def test_links_that_leave_the_root_are_not_followed(folder, tmp_path):
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("a.png", "b.png", "sub/c.png", "d.png"):
        Image.fromarray(pattern(1)).save(photos / name)
    Image.fromarray(pattern(2)).save(tmp_path / "outside" / "c.png")
    build(photos, tmp_path / "my.index", lambda images: map(describe, images), {"model": "x"})
    (photos / "a.png").unlink()
    (photos / "a.png").symlink_to(tmp_path / "outside" / "c.png")
    (photos / "b.png").unlink()
    (photos / "b.png").symlink_to("d.png")  # stays inside
    (photos / "sub" / "c.png").unlink()
    (photos / "sub").rmdir()
    (photos / "sub").symlink_to(tmp_path / "outside")
    client = client_of(make_app(tmp_path / "my.index", describe=describe))
    paths = Index.open(tmp_path / "my.index").paths
    status = {path: client.get(f"/thumbnail/{i}").status_code for i, path in enumerate(paths)}
    assert status == {"a.png": 404, "b.png": 200, "d.png": 200, "sub/c.png": 404}
    refused = client.get(f"/similar/{paths.index('a.png')}?box=0,0,9,9")
    assert refused.status_code == 422
    assert refused.json()["error"] == "a.png is outside the folder of the index"
    allowed = client_of(make_app(tmp_path / "my.index", describe=describe, follow_links=True))
    assert [allowed.get(f"/thumbnail/{i}").status_code for i in range(4)] == [200] * 4


@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "sub/../../secret.png", "\0"])
@pytest.mark.parametrize("follow_links", [False, True])
def test_an_altered_index_leads_nowhere(folder, path, follow_links):
    path = str(folder) + path if path.startswith("/") else path
    index = Index.open(folder / "my.index")
    index.paths[0] = path
    app = make_app(index, describe=describe, follow_links=follow_links)
    found = client_of(app).get("/thumbnail/0")
    assert (found.status_code, "outside the folder" in found.json()["error"]) == (404, True)


def test_a_pipe_does_not_hold_the_page_up(tmp_path):
    Image.fromarray(pattern(1)).save(tmp_path / "a.png")
    build(tmp_path, tmp_path / "my.index", lambda images: map(describe, images), {"model": "x"})
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    client = client_of(make_app(tmp_path / "my.index", describe=describe))
    assert "no regular file" in client.get("/thumbnail/0").json()["error"]


# Other sites


HOSTS = [
    "evil.example", "127.0.0.1.evil.example", "evil.example:8000", "192.168.1.5:8000", "",
    "localhost.evil.example", "user@127.0.0.1", "127.0.0.1/x", "[::1", "127.0.0.1:x",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("path", ["/", "/images", "/thumbnail/0", "/page.js"])
def test_other_hosts_are_refused(client, host, path):
    assert client.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:1", "LOCALHOST", "[::1]:8000"])
def test_names_of_this_machine_are_accepted(client, host):
    assert client.get("/images", headers={"host": host}).status_code == 200


def test_addresses_are_accepted_where_the_page_is_for_others_too(folder):
    app = make_app(folder / "my.index", describe=describe, hosts=["box.lan"], any_address=True)
    status = {
        host: client_of(app).get("/images", headers={"host": host}).status_code
        for host in ("192.168.1.5:8000", "[fe80::1]:8000", "Box.LAN", "evil.example")
    }
    assert list(status.values()) == [200, 200, 200, 403]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
    ],
)
def test_requests_of_other_sites_are_refused(client, headers, status):
    assert client.get("/thumbnail/0", headers=headers).status_code == status
    found = client.post("/search", files={"image": png(pattern(1))}, headers=headers)
    assert found.status_code == status


def test_a_link_of_another_site_may_open_the_page(client):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/images", "/thumbnail/0", "/none"])
def test_every_response_says_what_a_browser_may_do(client, path):
    for headers in ({}, {"host": "evil.example"}):
        found = client.get(path, headers=headers).headers
        policy = found["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert found["x-content-type-options"] == "nosniff"
        assert found["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in found


def test_the_page_has_no_inline_script_or_style_and_loads_nothing_from_elsewhere(client):
    text = client.get("/").text
    assert "<script type=" in text
    assert not any(each in text for each in ("<style", " style=", "onclick", "onload", "http:"))
    parts = [client.get(path).text for path in ("/page.js", "/page.css")]
    assert not any(
        each in part
        for part in parts
        for each in ("http:", "https:", "url(", "@import", "innerHTML", "eval(", "outerHTML")
    )


def test_hostile_names_are_data(client, folder):
    entry = client.get(f"/similar/{id_of(folder, f'sub/{HOSTILE}')}?k=12").json()
    assert entry["query"]["path"] == f"sub/{HOSTILE}"
    names = {hit["path"]: hit["name"] for hit in entry["results"]}
    assert names["\udcff.png"] == "'\\udcff.png'"


def test_the_name_of_the_index_is_escaped(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(pattern(1)).save(tmp_path / "photos" / "a.png")
    path = tmp_path / "<script>&.index"
    build(tmp_path / "photos", path, lambda images: map(describe, images), {"model": "x"})
    text = client_of(make_app(path)).get("/").text
    assert "<title>&lt;script&gt;&amp;.index</title>" in text


# The command


def test_serve_answers_until_it_is_interrupted(folder, tool):
    process = tool("ggem_jax.retrieval", "serve", folder / "my.index", "--port", 0)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{folder / 'my.index'}: 12 images at http://127.0.0.1:"), line
        url = line.split(" at ")[1].split(" ")[0]
        with urllib.request.urlopen(f"{url}similar/0?k=2", timeout=60) as answer:
            assert json.load(answer)["results"][0]["path"] == "00.png"
            assert "server" not in {name.lower() for name in answer.headers}
        port = int(url.rstrip("/").rpartition(":")[2])
        for target in ("/../secret.txt", "/thumbnail/../../secret.png", "//etc/passwd"):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                request = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
                connection.sendall(request.encode())
                first = connection.makefile("rb").readline()
            assert first == b"HTTP/1.1 404 Not Found\r\n", target
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=60)
        assert (process.returncode, said, told) == (0, "", "")
    finally:
        process.kill()


def test_a_port_that_is_taken_is_one_sentence(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(folder / "my.index"), "--port", str(port)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"ggem-retrieval: the page cannot listen at port {port} of 127.0.0.1 (")
    assert told.endswith("choose another with --port or --host\n")
    assert main(["serve", str(folder / "none.index")]) == 1
    assert main(["serve", str(folder / "my.index"), "--port", "99999"]) == 2


def test_a_missing_package_is_named(monkeypatch, capsys, folder):
    for name in [name for name in sys.modules if name.startswith("ggem_jax.retrieval.page")]:
        monkeypatch.delitem(sys.modules, name)
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "starlette" else real(name))
    assert main(["serve", str(folder / "my.index")]) == 1
    assert capsys.readouterr().err == (
        "ggem-retrieval: the page needs the package starlette: pip install 'ggem-jax[serve]'\n"
    )
