"""The page in a real browser: Chromium without a window, driven by Playwright."""

import shutil
import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image
from test_retrieval_page import HOSTILE, describe, pattern

from ggem_jax.retrieval.index.index import Index, build
from ggem_jax.retrieval.page import make_app

pytestmark = pytest.mark.slow
KEEP_ANSWERS = """
    const usual = window.fetch;
    window.answers = [];
    window.fetch = async (...given) => {
        const response = await usual(...given);
        const searches = /similar|search|words/.test(response.url);
        if (searches) window.answers.push(await response.clone().json());
        return response;
    };
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("browser")
    (base / "photos" / "sub").mkdir(parents=True)
    for seed in range(11):
        Image.fromarray(pattern(seed, (120, 160))).save(base / "photos" / f"{seed:02}.png")
    Image.fromarray(pattern(11, (120, 160))).save(base / "photos" / "sub" / HOSTILE)
    build(base / "photos", base / "my.index", lambda images: map(describe, images), {"model": "x"})
    large = np.zeros((300, 400, 3), np.uint8)
    large[60:180, 80:240] = pattern(7, (120, 160))
    Image.fromarray(large).save(base / "query.tif")  # a format that Chromium does not show
    (base / "text.png").write_text("no image")
    return base


@pytest.fixture(scope="module")
def url(folder):
    """The page, served by a thread of this process."""

    def encode(texts):  # a text is the number of an image
        return np.stack([describe(pattern(int(text), (120, 160))) for text in texts])

    app = make_app(folder / "my.index", describe=describe, encode=encode)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as started:
        own = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield own
        own.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the page; at the end nothing has gone wrong in it, and nothing came from elsewhere."""
    trouble, contexts = [], []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on(
            "request",
            lambda each: each.url.startswith((url, "data:")) or trouble.append(each.url),
        )
        page.add_init_script(KEEP_ANSWERS)
        page.goto(url)
        page.wait_for_selector(".card")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def names(page):
    return page.locator(".card:visible .name").all_text_contents()


def search(page, act):
    """The answer to the search that an action starts, once the page shows it."""
    page.evaluate("() => document.querySelector('#status').textContent = ''")
    act()
    page.locator("#status", has_text="results, search").wait_for()
    return page.evaluate("() => window.answers.at(-1)")


def drag(page, left, top, right, bottom):
    frame = page.locator("#preview").bounding_box()
    xs = [frame["x"] + each * frame["width"] for each in (left, right)]
    ys = [frame["y"] + each * frame["height"] for each in (top, bottom)]
    page.mouse.move(xs[0], ys[0])
    page.mouse.down()
    page.mouse.move(xs[1], ys[1], steps=4)
    page.mouse.up()


def give_file(page, kind, name, data):
    """Pastes or drops a file."""
    page.evaluate(
        """([kind, name, data]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], name, {type: "image/png"}));
            const event = kind === "paste"
                ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true})
                : new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
            document.body.dispatchEvent(event);
        }""",
        [kind, name, list(data)],
    )


def test_more_like_this_reranking_and_the_slider(open_page, folder):
    page = open_page()
    assert len(names(page)) == 12
    assert f"sub/{HOSTILE}" in names(page)  # as text
    assert page.locator(".name img").count() == 0
    page.wait_for_function(
        "() => [...document.images].filter(each => each.naturalWidth).length >= 4"
    )

    card = page.locator(".card", has_text="03.png")
    answer = search(page, card.click)
    assert names(page)[0] == "03.png"
    assert page.url.endswith(f"#{Index.open(folder / 'my.index').paths.index('03.png')}")
    assert page.locator("#query-name").text_content() == "03.png"
    assert page.locator(".before").count() == 0

    reranked = search(page, lambda: page.select_option("#rerank", "superglobal"))
    assert names(page) == [hit["name"] for hit in reranked["results"]]
    assert page.locator(".before").first.text_content().startswith("before: 1. at 1.0")
    moves = page.locator(".move").all_text_contents()
    ups = [hit["rank_before"] - hit["rank"] for hit in reranked["results"]]
    assert moves == ["=" if not up else f"{'▲' if up > 0 else '▼'} {abs(up)}" for up in ups]

    page.locator("#least").fill("0.5")
    kept = [hit["name"] for hit in reranked["results"] if hit["score_before"] >= 0.5]
    assert names(page) == kept
    assert 0 < len(kept) < 12
    page.locator("#least").fill("0")
    assert len(names(page)) == 12

    search(page, page.locator(".card").nth(4).click)
    search(page, lambda: page.select_option("#rerank", "none"))
    again = search(page, lambda: page.evaluate("history.back()"))
    assert again["query"]["id"] == answer["query"]["id"]
    page.click("#browse")
    page.wait_for_function("() => !document.querySelector('.ranks')")
    assert page.locator("#stage").is_hidden()


def test_words(open_page):
    page = open_page()
    page.fill("#text", "04 - 05")
    answer = search(page, lambda: page.press("#text", "Enter"))
    assert names(page)[0] == "04.png"
    assert answer["query"]["name"] == "04 - 05"
    assert page.locator("#stage").is_hidden()
    search(page, page.locator(".card", has_text="02.png").click)
    assert page.locator("#query-name").text_content() == "02.png"
    page.fill("#text", "04 -")
    page.press("#text", "Enter")
    page.locator("#status.error", has_text="has no text").wait_for()


def test_files_and_boxes(open_page, folder):
    page = open_page()
    search(page, lambda: page.set_input_files("#file", folder / "query.tif"))
    page.wait_for_function("() => document.querySelector('#preview').naturalWidth === 400")
    assert page.locator("#query-name").text_content() == "query.tif"
    assert page.locator("#whole").is_hidden()

    answer = search(page, lambda: drag(page, 80 / 400, 60 / 300, 240 / 400, 180 / 300))
    assert np.abs(np.array(answer["query"]["box"]) - [80, 60, 240, 180]).max() <= 2
    assert names(page)[0] == "07.png"
    assert "preview" not in answer
    frame, box = (page.locator(each).bounding_box() for each in ("#preview", "#box"))
    assert box["x"] - frame["x"] == pytest.approx(frame["width"] * 0.2, abs=2)
    assert box["width"] == pytest.approx(frame["width"] * 0.4, abs=3)
    whole = search(page, lambda: page.click("#whole"))
    assert (whole["query"]["box"], page.locator("#box").is_hidden()) == (None, True)

    search(page, page.locator(".card", has_text="02.png").click)
    part = search(page, lambda: drag(page, 0.1, 0.1, 0.6, 0.7))
    assert part["query"]["path"] == "02.png"
    assert np.abs(np.array(part["query"]["box"]) - [16, 12, 96, 84]).max() <= 2

    for kind, number in (("paste", 5), ("drop", 6)):
        data = (folder / "photos" / f"{number:02}.png").read_bytes()
        search(page, lambda kind=kind, data=data: give_file(page, kind, f"{kind}.png", data))
        assert names(page)[0] == f"{number:02}.png"
        assert page.locator("#query-name").text_content() == f"{kind}.png"

    page.set_input_files("#file", folder / "text.png")
    page.wait_for_selector("#status.error")
    assert "the upload is not a readable image" in page.locator("#status").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_both_schemes_at_the_width_of_a_phone_and_of_a_desk(open_page, scheme, width):
    touch = width == 400
    page = open_page(
        color_scheme=scheme, viewport={"width": width, "height": 800}, has_touch=touch,
        is_mobile=touch,
    )  # fmt: skip
    search(page, page.locator(".card").first.click)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#crop").is_visible() == touch
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, ground[4:-1].split(","))) < 60) == (scheme == "dark")


def test_scripts_that_are_not_the_pages_do_not_run(open_page):
    page = open_page()
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = true";
            document.body.append(script);
            const text = "<b onclick='window.hacked = true'>b</b>";
            document.body.insertAdjacentHTML("beforeend", text);
            document.querySelector("body > b").click();
        }"""
    )
    assert page.evaluate("window.hacked") is None
