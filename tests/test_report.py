"""report.html: the figures of report.json, nothing but itself, and what clicking and typing in it does."""

import contextlib
import json
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_tasks import multilabel

from stvit_video.cli.scoring import PREVIEWED, _previews
from stvit_video.config import Config, EvalConfig
from stvit_video.data.dataset import TestSampler as EverySampler
from stvit_video.data.dataset import VideoDataset, make_loader
from stvit_video.data.preview import BOX, BYTES, PREVIEW_FRAMES, make_preview
from stvit_video.data.rows import Row
from stvit_video.data.transforms import Normalise
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.data.views import Sampling
from stvit_video.data.views import TestViews as SpreadViews
from stvit_video.engine.evaluate import Shares, score, write_report
from stvit_video.engine.job import Outcome
from stvit_video.errors import InputError
from stvit_video.reports.page import as_json, read_previews, write_report_page
from stvit_video.tasks import classification
from stvit_video.tasks.classification import Classification
from stvit_video.tasks.multilabel import MultiLabel

HOSTILE = "</script><img src=x onerror=document.title='got'>"
CPU = torch.device("cpu")
NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """No confusion.png, which takes longer than all the rest."""
    monkeypatch.setattr(classification, "draw_confusion", lambda *args: None)


def made(folder, task, targets, scores, *, failures=None, paths=None, previews=()):
    """The report of these scores (N, K); -> what report.json holds."""
    failures = failures or {}
    paths = paths or [f"/data/set/{i:05}.mp4" for i in range(len(targets))]
    rows = [Row(path, target) for path, target in zip(paths, targets, strict=True)]
    records = [
        None if i in failures else {"scores": s, "classes": s.argmax()[None]}
        for i, s in enumerate(torch.as_tensor(scores, dtype=torch.float32))
    ]
    outcome = Outcome(rows, records, failures, list(previews))
    views = {"clips": 1, "crops": 1}
    write_report(folder, task, outcome, views=views, details={"on_failure": task.on_failure})
    return json.loads((folder / "report.json").read_text())


class Page(HTMLParser):
    """Elements of a page by tag, and the text of its scripts by id."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.values, self.scripts, self._script = [], [], {}, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if "data-value" in attributes:
            self.values.append(float(attributes["data-value"]))
        self._script = attributes.get("id", "code") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    @property
    def data(self):
        return json.loads(self.scripts["data"])


def three_classes(**options):
    return Classification(["walk", HOSTILE, "Fußball"], normalise=NORMALISE, **options)


PATHS = ["/v/a.mp4", f"/v/{HOSTILE}.mp4", "/v/not\udcfftext.mp4", "/v/ü.mp4", "/v/e.mp4", "/v/f.mp4"]
SCORES = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0, 0, 0], [0.9, 0.06, 0.04], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]
TARGETS = [0, 1, 1, 2, 1, None]
FAILURES = {2: f"cut off {HOSTILE}"}


@pytest.mark.parametrize(("on_failure", "of_class"), [("wrong", 1 / 3), ("exclude", 1 / 2)])
def test_the_page_has_the_figures_of_the_report(tmp_path, on_failure, of_class):
    task = three_classes(on_failure=on_failure)
    report = made(tmp_path, task, TARGETS, SCORES, failures=FAILURES, paths=PATHS)
    page = Page(tmp_path / "report.html")
    keys = ("top1", "mean_class_accuracy", "per_clip_top1")  # of three classes the five best say nothing
    assert page.values == [report[key] for key in keys]
    data = page.data
    assert data["values"] == pytest.approx([1, of_class, 0])
    assert np.mean(data["values"]) == pytest.approx(report["mean_class_accuracy"])
    assert data["videos_of"] == [1, 3 if on_failure == "wrong" else 2, 1]
    assert data["labels"] == [[0], [1], [1], [2], [1], []]
    assert data["best"] == [[0, 1, 2], [1, 0, 2], [], [0, 1, 2], [0, 1, 2], [2, 1, 0]]
    np.testing.assert_allclose(data["scores"][3], [0.9, 0.06, 0.04], atol=1e-5)
    assert data["failures"] == {"2": FAILURES[2]}


def test_whatever_names_hold_is_text(tmp_path):
    made(tmp_path, three_classes(), TARGETS, SCORES, failures=FAILURES, paths=PATHS)
    page = Page(tmp_path / "report.html")
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert page.data["classes"] == ["walk", HOSTILE, "Fußball"]
    assert page.data["paths"] == [path.removeprefix("/v/") for path in PATHS]
    assert "<" not in page.scripts["data"]
    assert json.loads(as_json({"<!--": ["&amp;", "\u2028", None]})) == {"<!--": ["&amp;", "\u2028", None]}


def test_of_several_labels_the_page_has_their_precisions(tmp_path):
    scores = np.random.default_rng(0).random((6, 4))
    targets = [(0,), (0, 2), (1,), (), (2,), None]
    report = made(tmp_path, multilabel(), targets, scores)
    page = Page(tmp_path / "report.html")
    assert page.values == [report["mAP"]]
    assert page.data["values"][3] is None
    assert np.mean(page.data["values"][:3]) == pytest.approx(report["mAP"])
    assert page.data["videos_of"] == [2, 1, 2, 0]
    assert page.data["labels"] == [list(target or ()) for target in targets]
    with np.load(tmp_path / "scores.npz") as arrays:
        np.testing.assert_array_equal(arrays["scores"], scores.astype(np.float32))
        assert arrays["labels"].tolist()[1] == [1, 0, 1, 0]
        assert (arrays["labels"][5] == -1).all()


@pytest.mark.parametrize(("on_failure", "videos"), [("wrong", 2), ("exclude", 1)])
def test_of_several_labels_what_is_left_out_does_not_count(tmp_path, on_failure, videos):
    task = MultiLabel(["a", "b"], normalise=NORMALISE, on_failure=on_failure)
    made(tmp_path, task, [(0,), (0,), (1,)], [[0.9, 0.1]] * 3, failures={1: "gone"})
    assert Page(tmp_path / "report.html").data["videos_of"] == [videos, 1]
    assert f"a,{videos}," in (tmp_path / "classes.csv").read_text()


def test_of_several_labels_scores_that_are_no_numbers_are_one_line(tmp_path):
    with pytest.raises(InputError, match="the model's scores are no numbers"):
        made(tmp_path, multilabel(), [(0,)], [[np.nan] * 4])


def test_a_list_without_labels_has_a_page(tmp_path):
    made(tmp_path, three_classes(), [None] * 6, SCORES)
    page = Page(tmp_path / "report.html")
    assert page.values == []
    assert page.data["values"] == [None] * 3


@pytest.mark.parametrize("shape", [(20, 3, 240, 320), (3, 3, 30, 20), (1, 3, 700, 40), (8, 3, 48, 640)])
def test_a_preview_is_small_and_moves(shape):
    from io import BytesIO

    from PIL import Image

    frames = torch.randint(256, shape, dtype=torch.uint8)  # noise: nothing takes more bytes
    data = make_preview(frames)
    assert len(data) <= BYTES
    picture = Image.open(BytesIO(data))
    assert (picture.format, getattr(picture, "n_frames", 1)) == ("WEBP", min(shape[0], PREVIEW_FRAMES))
    assert picture.width <= min(BOX[0], shape[3])
    assert picture.height <= min(BOX[1], shape[2])


def loader(demo_root, *, previews=True, workers=0, timeout=None):
    rows = [Row(str(path), i % 3) for i, path in enumerate(sorted(demo_root.glob("test/*/*.mp4")))]
    rows.insert(4, Row("gone.mp4", 1))
    views = SpreadViews(Sampling("dense", 2), CropTransform(16), 2, make_preview if previews else None)
    dataset = VideoDataset(rows, views, timeout=timeout)
    options = {"pin_memory": False, "persistent": False}
    return make_loader(dataset, EverySampler(len(rows)), batch_size=3, workers=workers, **options)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 16 * 16, 3))


@pytest.mark.parametrize(("workers", "timeout"), [(0, None), (1, 30)])
def test_previews_come_beside_the_same_scores(model, demo_root, tmp_path, workers, timeout):
    task = three_classes()
    plain = score(model, task, loader(demo_root, previews=False), CPU)
    outcome = score(model, task, loader(demo_root, workers=workers, timeout=timeout), CPU)
    assert plain.previews == [None] * 12
    assert [preview is None for preview in outcome.previews] == [i == 4 for i in range(12)]
    assert all(preview.startswith(b"RIFF") for i, preview in enumerate(outcome.previews) if i != 4)
    for one, other in zip(plain.records, outcome.records, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one["scores"], other["scores"])
    write_report(tmp_path, task, outcome, views={"clips": 2, "crops": 1}, details={"on_failure": "wrong"})
    assert read_previews(tmp_path / "report.html") == outcome.previews


def test_a_scoring_that_goes_on_has_the_previews_of_its_first_part(model, demo_root, tmp_path):
    task, batches = three_classes(), []
    unbroken = score(model, task, loader(demo_root), CPU)

    def stop():
        batches.append(1)
        if len(batches) == 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        score(model, task, loader(demo_root), CPU, after_batch=stop, shares=Shares(tmp_path, [], minutes=0))
    second = loader(demo_root)
    outcome = score(model, task, second, CPU, shares=Shares(tmp_path, []))
    assert 0 < len(second.sampler) < 12
    assert outcome.previews == unbroken.previews


def test_previews_are_made_of_small_sets_or_as_it_is_set():
    assert [_previews(Config(), videos) for videos in (PREVIEWED, PREVIEWED + 1)] == [True, False]
    for value in (True, False):
        assert _previews(Config(eval=EvalConfig(previews=value)), PREVIEWED + 1) is value


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium to open pages with")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """open(path) -> the page; at the end: it asked for nothing but itself, and no script failed."""
    requests, troubles, pages = [], [], []

    def open_page(path, width=1280, height=800):
        size = {"width": width, "height": height}
        page = browser.new_page(viewport=size, reduced_motion="reduce")
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(path.as_uri())
        pages.append(path.as_uri())
        return page

    yield open_page
    assert [url for url in requests if not url.startswith("data:image/webp")] == pages
    assert troubles == []


def shown(page):
    """Names of the files in the list's rows, from the top."""
    return [row.inner_text().rpartition("/")[2] for row in page.locator(".row .path").all()]


def test_clicking_through_a_report(opened, tmp_path):
    picture = make_preview(torch.randint(256, (4, 3, 48, 64), dtype=torch.uint8))
    previews = [None if i in FAILURES else picture for i in range(6)]
    made(tmp_path, three_classes(), TARGETS, SCORES, failures=FAILURES, paths=PATHS, previews=previews)
    page = opened(tmp_path / "report.html", height=2000)
    names = ["ü.mp4", "e.mp4", "not\udcfftext.mp4", "a.mp4", "f.mp4", HOSTILE.partition("/")[2] + ".mp4"]
    assert page.locator(".figures dd").first.inner_text() == "40.00%"
    assert shown(page) == names  # mistakes first
    assert page.locator(".row").nth(2).locator(".cause").inner_text() == FAILURES[2]
    bars = page.locator(".row").first.locator(".guess")
    assert [bar.inner_text().split("\n")[-1] for bar in bars.all()] == ["90.0%", "6.0%", "4.0%"]
    assert page.locator("canvas.preview, img.preview").count() == 5

    page.fill("#search", "FUSSBALL fußball ü")
    assert shown(page) == []
    page.fill("#search", "fußball ü")
    assert shown(page) == ["ü.mp4"]
    page.fill("#search", "")
    page.select_option("#sort", "path")
    assert shown(page)[-1] == "ü.mp4"
    page.select_option("#show", "unreadable")
    assert shown(page) == ["not\udcfftext.mp4"]
    page.select_option("#show", "all")

    cells = page.locator("#matrix td")
    assert [cell.inner_text() for cell in cells.all()] == ["1", "", "", "1", "1", "", "1", "", ""]
    cells.nth(3).click()
    assert shown(page) == ["e.mp4"]
    assert page.locator(".chip").inner_text() == f"{HOSTILE}, predicted walk"
    page.locator(".chip").click()
    assert len(shown(page)) == 6
    page.locator("#classes button", has_text="Fußball").click()
    assert shown(page) == ["ü.mp4"]
    assert page.title() == f"{tmp_path.name}: report"


def test_a_report_is_used_by_keyboard(opened, tmp_path):
    scores = np.random.default_rng(0).random((300, 3))
    made(tmp_path, three_classes(), [i % 3 for i in range(300)], scores)
    page = opened(tmp_path / "report.html", width=400)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.locator("#matrix td").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.cell") == "1,1"
    assert page.locator("#readout").inner_text().startswith(HOSTILE)
    page.keyboard.press("Enter")
    counted = int(page.locator('[data-cell="1,1"]').get_attribute("aria-label").split(": ")[-1].split()[0])
    assert page.locator("#count").inner_text() == f"{counted} of 300"
    page.keyboard.press("Enter")  # once more: all again
    for _ in range(5):  # search, which, order, row
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "row":
            break
    assert page.evaluate("document.activeElement.dataset.place") == "0"
    for key, place in (("ArrowDown", 1), ("End", 299), ("ArrowUp", 298), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.place") == str(place)
        box = page.locator(".row:focus").bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 800
    assert page.locator(".row").count() < 20


def test_twenty_thousand_videos_and_a_thousand_classes_open_at_once(opened, tmp_path):
    generator = np.random.default_rng(0)
    write_report_page(
        tmp_path / "report.html",
        {"num_videos": 20_000, "num_failed": 0, "views": {"clips": 5, "crops": 3}},
        headlines=[("top-1", 0.5)],
        measure="accuracy",
        by_class=[(f"class {i}", 20, 0.5) for i in range(1000)],
        rows=[(f"/data/videos/some/folder/{i:011}.mp4", [i % 1000]) for i in range(20_000)],
        best=generator.integers(1000, size=(20_000, 5)),
        scores=np.sort(generator.random((20_000, 5)) / 5)[:, ::-1],
        failures={5: "cut off"},
        previews=[],
        confusion=True,
    )
    started = time.monotonic()
    page = opened(tmp_path / "report.html")
    assert page.locator("#count").inner_text() == "20000"
    assert time.monotonic() - started < 20  # 0.6 on an idle machine
    assert 0 < page.locator(".row").count() < 40
    assert page.locator("#matrix td").count() == 40 * 40
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_selector('.row[data-place="19999"]')
    page.locator("#pairs button").first.click()
    name = page.locator("#pairs button").first.inner_text()
    assert page.locator("#count").inner_text() == f"{name.split('(')[1][:-1]} of 20000"
