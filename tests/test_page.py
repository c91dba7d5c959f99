"""The page to try a model on, in a browser: right answers, one line for what is wrong, nothing is kept."""

import io
import json
import re
import shutil
import socket
import sys
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from test_end_to_end import SMALL, run

from stvit_video import build, cli, figures, recognizer
from stvit_video.config import make_parser, parse, resolve, to_dict
from stvit_video.data.decode import open_video
from stvit_video.engine import checkpoint
from stvit_video.recognizer import Recognizer
from stvit_video.timeline import Moment

pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
CHROMIUM = shutil.which("chromium")
browsing = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

LIMIT = 0.5  # MB
LONGEST = 20.0  # seconds


def make_checkpoint(path, demo_root, *more):
    """An untrained model, sure of what it says: its head is enlarged."""
    (path.parent / "small.yaml").write_text(SMALL)
    args = ["--cfg", str(path.parent / "small.yaml"), f"--data.val={demo_root}/test", *more]
    config = resolve(parse(make_parser(""), args)[0])
    names = sorted(folder.name for folder in (demo_root / "test").iterdir())
    torch.manual_seed(0)
    model = build.build_model(config, len(names))
    torch.nn.init.normal_(model.head.weight, std=1.0)
    values = {"config": to_dict(config), "class_names": names, "built": model.built}
    checkpoint.save(path, values | {"model": model.state_dict(), "ema": None})
    return path


@pytest.fixture(scope="module")
def recognize(tmp_path_factory, demo_root):
    return Recognizer(
        make_checkpoint(tmp_path_factory.mktemp("page") / "best.pt", demo_root), device="cpu", timeout=30
    )


@pytest.fixture(scope="module")
def videos(demo_root, recognize):
    """Two videos of different classes, to this model."""
    paths = sorted((demo_root / "test").glob("*/*.mp4"))
    best = {recognize(path)[0].name: path for path in paths}
    assert len(best) > 1
    return list(best.values())[:2]


@pytest.fixture(scope="module")
def site(recognize, videos):
    from stvit_video import page

    hosts, resolve = set(), socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        hosts.add(host)
        return resolve(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setenv("GRADIO_TEMP_DIR", "")
        site = page.build(recognize, examples=videos, max_megabytes=LIMIT, max_seconds=LONGEST)
        site.launch(prevent_thread_lock=True)
        yield site
        site.close()
    assert hosts <= {"127.0.0.1", "localhost", None}, "the server talks to others"


@pytest.fixture(scope="module")
def browser(recognize):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
        recognize._decode.close()  # a fork, which would keep the driver's pipes open


@pytest.fixture
def visit(site, browser):
    """Opens the page anew; in the end no visitor has asked for anything elsewhere, and nothing is left."""
    contexts, asked = [], []

    def visit():
        contexts.append(browser.new_context())
        contexts[-1].set_default_timeout(90_000)  # milliseconds: on a busy machine
        tab = contexts[-1].new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(site.local_url)
        tab.wait_for_selector("input[type=file]", state="attached")
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {
        urlsplit(site.local_url).netloc
    }
    assert left(site) == []


def left(site):
    """What lies in the folder of uploads, once requests that end have had time to."""
    end = time.monotonic() + 5
    while (files := list(Path(site.temporary.name).iterdir())) and time.monotonic() < end:
        time.sleep(0.02)
    return files


def drop(tab, path, name=None):
    file = {"name": name or path.name, "mimeType": "video/mp4", "buffer": path.read_bytes()}
    tab.set_input_files("input[type=file]", file)


def shown(tab):
    """The classes and scores that a page comes to show."""
    tab.wait_for_selector("#more .timeline")
    meters = tab.locator("meter").all()
    return [(meter.get_attribute("aria-label"), float(meter.get_attribute("value"))) for meter in meters]


def refused(tab):
    """The one line that a page comes to show."""
    tab.wait_for_selector("#more .refused")
    assert tab.locator("meter").count() == 0
    return tab.inner_text("#more")


def is_right(recognize, scores, path):
    guesses = recognize(path)
    assert [name for name, _ in scores] == [guess.name for guess in guesses]
    assert [score for _, score in scores] == pytest.approx([guess.score for guess in guesses], abs=1e-5)


def loaded(picture):
    return picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")


@browsing
def test_a_dropped_video_is_recognised(visit, recognize, videos):
    tab = visit()
    drop(tab, videos[0])
    is_right(recognize, shown(tab), videos[0])
    assert tab.inner_text("#more h3 >> nth=0") == videos[0].name
    assert loaded(tab.locator("#more img")) == [2 * 192 + 192 // 32, 192]
    assert "its semantic tokens took" in tab.inner_text("#more figcaption")
    assert 1 <= tab.locator("#more polyline").count() <= 6
    assert tab.locator("#more li").count() >= tab.locator("#more polyline").count()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@browsing
def test_an_example_is_recognised(visit, recognize, videos):
    tab = visit()
    tab.set_viewport_size({"width": 400, "height": 800})
    tab.get_by_text(f"{videos[1].parent.name}/{videos[1].name}").click()
    is_right(recognize, shown(tab), videos[1])
    assert videos[1].exists()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@browsing
def test_two_visitors_at_once_get_their_answers(visit, recognize, videos):
    """Also of the same video: one's upload is removed, the other's stays until it is read."""
    tabs, paths = [visit() for _ in range(3)], [*videos, videos[0]]
    for tab, path in zip(tabs, paths, strict=True):
        drop(tab, path, "clip.mp4")
    for tab, path in zip(tabs, paths, strict=True):
        is_right(recognize, shown(tab), path)


@browsing
def test_what_is_no_video_is_one_line_and_the_page_goes_on(visit, recognize, videos, tmp_path):
    contents = {
        "notes.mp4": b"Dear diary, this is no video.\n" * 40,
        "empty.mp4": b"",
        "<img src=x onerror=alert(1)>.mp4": b"#EXTM3U\nhttp://192.0.2.1/a.ts\n",
        "cut.mp4": videos[0].read_bytes()[:600],
    }
    causes = [
        "notes.mp4: Invalid data found when processing input",
        "empty.mp4: empty file",
        "img src=x onerror=alert(1).mp4: a playlist of other files, not a video",
        "cut.mp4: Invalid data found when processing input",
    ]
    tab = visit()
    for (name, content), cause in zip(contents.items(), causes, strict=True):
        (tmp_path / "file").write_bytes(content)
        drop(tab, tmp_path / "file", name)
        tab.wait_for_function(
            "cause => document.querySelector('#more').innerText.includes(cause)", arg=cause
        )
        assert refused(tab) == cause
    drop(tab, videos[1])
    is_right(recognize, shown(tab), videos[1])


@browsing
def test_a_video_that_lasts_too_long_is_one_line(visit, tmp_path):
    frames = [Image.new("P", (8, 8), i % 2) for i in range(25)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:], duration=1000)
    tab = visit()
    drop(tab, tmp_path / "long.gif")
    assert refused(tab) == "long.gif: lasts 25 s, at most 20 s are taken"


@browsing
def test_a_video_that_hangs_is_given_up_and_the_page_goes_on(visit, recognize, videos, monkeypatch):
    def hang(path, *args):
        if "hang" in path.name:
            time.sleep(1000)
        return open_video(path, *args)

    monkeypatch.setattr(recognizer, "open_video", hang)
    monkeypatch.setattr(recognize._decode, "timeout", 0.5)
    recognize._decode.close()  # the next child has what was changed
    tabs = visit(), visit()
    drop(tabs[0], videos[0], "hang.mp4")
    assert refused(tabs[0]) == "hang.mp4: took longer than 0.5 s (data.timeout)"
    monkeypatch.setattr(recognize._decode, "timeout", 30)
    for tab, path in zip(tabs, videos, strict=True):
        drop(tab, path)
        is_right(recognize, shown(tab), path)


@browsing
def test_a_bug_is_one_line_too(visit, recognize, videos, monkeypatch, capsys):
    monkeypatch.setattr(recognize.task, "view_scores", None)
    tab = visit()
    drop(tab, videos[0])
    cause = f"{videos[0].name}: cannot be recognised (the cause is in the log of the page)"
    assert refused(tab) == cause
    assert "TypeError" in capsys.readouterr().err


@browsing
def test_the_browser_is_told_what_is_too_large(visit, tmp_path):
    (tmp_path / "large.mp4").write_bytes(b"\0" * 700_000)
    tab = visit()
    drop(tab, tmp_path / "large.mp4")
    toast = tab.locator(".toast-body").inner_text()
    assert re.search(r"exceed the maximum allowed size of 512(\.0)? Kb: \"large.mp4\"", toast)


# Without a browser: what a page would not send


def ask(site, method, path, body=b"", **headers):
    """-> (status, body) of a request, sent as it is, with `body` perhaps shorter than announced."""
    headers = {"Host": urlsplit(site.local_url).netloc, "Connection": "close", **headers}
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{key.replace('_', '-')}: {value}" for key, value in headers.items()),
    ]
    with socket.create_connection((site.server_name, site.server_port), timeout=20) as link:
        link.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b"".join(iter(lambda: link.recv(1 << 16), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), content.decode()


PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
FORM = {"Content_Type": "multipart/form-data; boundary=b"}
UPLOAD = "/gradio_api/upload"


def test_five_gigabytes_are_refused_before_they_are_sent(site):
    size = 5_000_000_000
    assert ask(site, "POST", UPLOAD, PART, **FORM, Content_Length=size) == (
        413,
        "4768 MB, at most 0.5 MB are taken",
    )
    code, line = ask(site, "POST", "/gradio_api/queue/join", b"{", Content_Length=size)
    assert (code, line) == (413, "4768 MB, at most 0.0625 MB are taken")
    chunked = ask(site, "POST", UPLOAD, b"5\r\nhello\r\n", **FORM, Transfer_Encoding="chunked")
    assert chunked == (411, "a body of unknown size")
    both = ask(
        site, "POST", UPLOAD, b"5\r\nhello\r\n", **FORM, Transfer_Encoding="chunked", Content_Length=9
    )
    assert both[0] in (400, 411)
    assert left(site) == []


@pytest.mark.parametrize("end", [b"\r\n--b--\r\n", b""])
def test_an_upload_that_breaks_off_leaves_nothing(site, end):
    """Broken off, or of more files than one may be large."""
    body = PART + b"\0" * 1000
    headers = {"Host": "a", "Content-Length": 9999, "Content-Type": FORM["Content_Type"]}
    if end:
        body = PART + b"\0" * 530_000 + end
        code, line = ask(site, "POST", UPLOAD, body, **FORM, Content_Length=len(body))
        assert (code, line) == (
            400,
            "not an upload: File size exceeded maximum allowed size of 524288 bytes.",
        )
    else:
        lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        with socket.create_connection((site.server_name, site.server_port)) as link:
            link.sendall(f"POST {UPLOAD} HTTP/1.1\r\n{lines}\r\n".encode() + body)
            time.sleep(0.1)
    assert left(site) == []


def test_uploads_that_nobody_asks_about_are_few_and_removed(site, monkeypatch):
    from stvit_video.page import gate

    monkeypatch.setattr(gate, "WAITING_UPLOADS", 2)
    body = PART + b"\r\n--b--\r\n"
    codes = [ask(site, "POST", UPLOAD, body, **FORM, Content_Length=len(body)) for _ in range(3)]
    assert [code for code, _ in codes] == [200, 200, 503]
    assert codes[2][1] == "2 uploads are waiting, try again later"
    monkeypatch.setattr(gate, "KEPT_SECONDS", -1)
    assert ask(site, "POST", UPLOAD, body, **FORM, Content_Length=len(body))[0] == 503
    assert left(site) == []
    monkeypatch.setattr(gate, "SLOWEST", 0.2)
    late = ask(site, "POST", UPLOAD, PART, **FORM, Content_Length=9999)
    assert late == (400, "not an upload: TimeoutError")
    assert left(site) == []


def test_no_file_is_given_out(site, recognize, videos, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    body = PART + b"theirs\r\n--b--\r\n"
    code, uploaded = ask(site, "POST", UPLOAD, body, **FORM, Content_Length=len(body))
    assert code == 200
    (uploaded,) = json.loads(uploaded)
    assert Path(uploaded).read_bytes() == b"theirs"
    for path in (tmp_path / "secret.txt", videos[0], uploaded, __file__, "http://192.0.2.1/a"):
        for route in ("/gradio_api/file=", "/gradio_api/proxy=", "/gradio_api/file/"):
            assert ask(site, "GET", route + quote(str(path))) == (403, "not given out here")
        for route in ("/file=", "/static/..", "/assets/../../../../../../../../.."):
            assert ask(site, "GET", route + quote(str(path)))[0] in (403, 404)
    evil = ask(site, "GET", f"/gradio_api/file={tmp_path}/secret.txt", Host="a?")
    assert evil == (403, "not given out here")
    shutil.rmtree(Path(uploaded).parents[1])


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "http://192.0.2.1/a.mp4", "{folder}/../x", "{folder}", ["a"], None]
)
def test_only_what_was_uploaded_is_recognised(site, path):
    """gradio itself would copy or fetch the others, and hand them on."""
    path = path.format(folder=site.temporary.name) if isinstance(path, str) else path
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for data in ([file], [{"deeper": [file]}]):
        body = json.dumps({"data": data, "fn_index": 0, "session_hash": "x"}).encode()
        asked = ask(site, "POST", "/gradio_api/queue/join", body, Content_Type="application/json",
                    Content_Length=len(body))  # fmt: skip
        assert asked == (400, "not a message of this page")
    assert left(site) == []


def test_models_without_semantic_tokens_have_a_film_too(tmp_path, demo_root, videos):
    from stvit_video.page.answer import recognise

    dense = ["--model.name=vit_tiny_patch16_224", "--model.semantic_tokens=auto", "--model.base_depth=auto"]
    recognize = Recognizer(make_checkpoint(tmp_path / "best.pt", demo_root, *dense), device="cpu")
    scores, more = recognise(recognize, videos[0], 60, lambda *_: None)
    assert scores == {guess.name: guess.score for guess in recognize(videos[0])}
    assert "tokens" not in more
    assert 'src="data:image/webp;base64,' in more


def test_a_film_shows_what_was_taken():
    """A patch of which nothing was taken is a quarter as bright, the one most taken as bright as it is."""
    frames = np.full((2, 2, 192, 192, 3), 200, np.uint8)
    maps = np.zeros((2, 3, 1, 2, 2), np.float32)
    maps[0, :, 0, 0, 1] = maps[1, :, 0, 1, 0] = 1
    film = Image.open(io.BytesIO(figures.play_maps(frames, maps)))
    assert film.n_frames == 4 or film.n_frames == 2  # equal neighbours are one
    for number, bright in ((0, (0, 1)), (film.n_frames - 1, (1, 0))):
        film.seek(number)
        pixels = np.asarray(film.convert("L"))[:, 198:]
        for place in np.ndindex(2, 2):
            patch = pixels[place[0] * 96 + 40, place[1] * 96 + 40]
            assert patch == pytest.approx(200 if place == bright else 50, abs=4)
    assert Image.open(io.BytesIO(figures.play_maps(frames, None))).size == (192, 192)


def test_a_timeline_is_drawn_where_it_lies():
    from stvit_video.page.answer import timeline_html

    rows = [(0.9, 0.1, 0)] * 3 + [(0.2, 0.8, 0)]
    names = ["<b>", "jump", "never"]
    text = timeline_html([Moment(i, i + 1, np.array(row), names) for i, row in enumerate(rows)])
    assert "left: 0.00%; width: 75.00%" in text
    assert "left: 75.00%; width: 25.00%" in text
    assert "&lt;b&gt;: 0:00.0 to 0:03.0, 90%" in text
    assert "jump: 0:03.0 to 0:04.0, 80%" in text
    assert '"0.00,0.1000 12.50,0.1000 37.50,0.1000 62.50,0.1000 87.50,0.8000 100.00,0.8000"' in text
    assert text.count("<polyline") == 2
    assert "<b>" not in text
    assert "never" not in text


def test_the_command_says_what_is_missing(tmp_path, demo_root, capsys, monkeypatch):
    path = make_checkpoint(tmp_path / "best.pt", demo_root)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(cli.page, f"--checkpoint={path}", f"--port={port}") == 2
    assert capsys.readouterr().err.startswith(f"error: 127.0.0.1:{port}: no page can be opened there")
    with pytest.raises(recognizer.InputError, match="needs a timeout"):
        sys.modules["stvit_video.page"].build(Recognizer(path, device="cpu"))
    assert run(cli.page, f"--checkpoint={path}", f"--examples={tmp_path}/none") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none: no folder with videos in it\n"
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "stvit_video.page")
    assert run(cli.page, f"--checkpoint={path}") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "pip install stvit_video[page]" in line


@pytest.mark.parametrize(
    "flag", ["--max-megabytes=nan", "--max-seconds=-1", "--timeout=0", "--port=99999", "--port=0"]
)
def test_limits_that_make_no_sense_are_one_line(flag, capsys):
    assert run(cli.page, "--checkpoint=a.pt", flag) == 2
    assert f"error: {flag.replace('=', ' ')}" in capsys.readouterr().err


def test_examples_are_of_the_validation_list(tmp_path, demo_root):
    from stvit_video.cli.serving import validated

    config = Recognizer(make_checkpoint(tmp_path / "best.pt", demo_root), device="cpu").config
    assert validated(config) == sorted((demo_root / "test").glob("*/*.mp4"))
    config.data.val = str(tmp_path / "gone")
    assert validated(config) == []
