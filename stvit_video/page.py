"""A page to try a model on: drop a video, see its classes, when they happen, and what the tokens took.

For whoever is allowed to reach it, but without trust: it keeps nothing, sends nothing elsewhere, and gives
out no file.
"""

import base64
import contextvars
import functools
import html
import json
import os
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .errors import InputError
from .figures import play_maps
from .recognizer import Recognizer
from .timeline import Moment, segments

try:
    import gradio as gr
    from gradio.route_utils import upload_fn
    from gradio.routes import file_upload_statuses
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
except ImportError as error:
    raise InputError(f"the page needs gradio ({error}): pip install stvit_video[page]") from None

# What the page uses of gradio's interface. Of the rest, "file=" would give out files, "proxy=" fetch pages.
USED = {"upload", "upload_progress", "queue", "heartbeat", "startup-events", "cancel", "reset"}
LARGEST_MESSAGE = 1 << 16  # bytes, of what is no upload
KEPT = 3600  # seconds, of an upload that was left waiting
MOMENTS, CLOSEST = 60, 0.25  # of a timeline: how many about, and seconds between them at least
CLIPS, CLIP = 4, 3.0  # that are played: how many at most, one for each so many seconds
LOWEST = 0.05  # score of a class that is drawn
COLOURS = ("#2f7ed8", "#e4730b", "#1f9d55", "#b14fc5", "#c2a000", "#00a3ad")  # of a timeline's classes
CSS = """
.refused {padding: .8rem; border-left: 4px solid #d33; overflow-wrap: anywhere}
.player img {width: 100%; max-width: 36rem; border-radius: 6px}
.timeline svg {width: 100%; height: 7rem; display: block; background: #8881}
.timeline polyline {vector-effect: non-scaling-stroke; stroke-width: 2px}
.timeline .strip {position: relative; height: 1rem; margin-top: 2px; background: #8883}
.timeline .strip i {position: absolute; height: 100%; opacity: .85}
.timeline .ends {display: flex; justify-content: space-between; font-size: .8rem}
.timeline ul {list-style: none; padding: 0; columns: 15rem; font-size: .9rem} .timeline b {color: var(--of)}
"""


def build(
    recognizer: Recognizer,
    *,
    examples: Sequence[str | Path] = (),
    max_megabytes: float = 200,
    max_seconds: float = 600,
) -> gr.Blocks:
    """The page; `launch()` serves it on 127.0.0.1, with gradio's other options as they are.

    recognizer: has a `timeout` (seconds), after which a video is given up. examples: videos to choose from.
    max_megabytes, max_seconds: how large an upload may be, and how long a video.
    Raises InputError for a recognizer without a timeout.
    """
    if recognizer.timeout is None:
        raise InputError("the page takes files from anyone: its Recognizer needs a timeout")
    examples, config = [Path(path) for path in examples], recognizer.config
    temporary = tempfile.TemporaryDirectory(prefix="stvit_page_")  # goes with the page, or the process
    folder, largest = Path(temporary.name).resolve(), round(max_megabytes * 1e6)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio has no other way to say where
    # One thread: a Guard's child ends with the thread that made it, and gradio's come and go.
    worker = ThreadPoolExecutor(1)

    def answer(path: Path, progress: gr.Progress) -> tuple[dict | None, str, None]:
        """-> classes, the rest, and an empty place to drop the next one into."""
        call = functools.partial(recognise, recognizer, path, max_seconds, progress)
        try:
            return *worker.submit(contextvars.copy_context().run, call).result(), None
        except InputError as error:
            line = str(error).replace(f"{path.parent}{os.sep}", "")
        except Exception:  # of a file that someone made up, anything
            traceback.print_exc()
            line = f"{path.name}: cannot be recognised (the cause is in the log of the page)"
        return None, f'<p class="refused" role="alert">{html.escape(line)}</p>', None

    def uploaded(file: dict, progress: gr.Progress = gr.Progress()):  # noqa: B008 (gradio's way)
        path = Path(file["path"])
        try:
            return answer(path, progress)
        finally:
            shutil.rmtree(folder / path.relative_to(folder).parts[0], ignore_errors=True)

    def chosen(number: int, progress: gr.Progress = gr.Progress()):  # noqa: B008
        return answer(examples[number], progress)

    suffixes = VIDEO_SUFFIXES | (IMAGE_SUFFIXES if config.data.num_frames == 1 else set())
    with gr.Blocks(title="stvit_video", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gr.Markdown(
            f"# What happens in a video?\n{config.model.name}, {len(recognizer.class_names)} classes"
        )
        with gr.Row():
            with gr.Column(scale=2):
                label = f"A video, at most {max_megabytes:g} MB and {max_seconds:g} s; deleted afterwards"
                drop = gr.File(label=label, file_types=sorted(suffixes), height=170)
                names = [[f"{path.parent.name}/{path.name}"] for path in examples]
                options = {
                    "samples": names,
                    "type": "index",
                    "label": "Or an example",
                    "samples_per_page": 8,
                }
                choice = gr.Dataset(components=[gr.Textbox(visible=False)], visible=bool(names), **options)
            with gr.Column(scale=3):
                outputs = [gr.Label(label="Classes", num_top_classes=5), gr.HTML(elem_id="more"), drop]
        how = {"concurrency_limit": 1, "concurrency_id": "model", "scroll_to_output": True}
        drop.upload(uploaded, drop, outputs, preprocess=False, api_visibility="private", **how)
        choice.click(chosen, choice, outputs, api_visibility="private", **how)
    page.queue(max_size=32)
    page.temporary = temporary
    gate = Middleware(Gate, folder=folder, largest=largest)
    page.launch = functools.partial(
        page.launch,
        server_name="127.0.0.1",
        max_file_size=largest,
        app_kwargs={"middleware": [gate]},
        css=CSS,
        footer_links=[],
        quiet=True,
        **dict.fromkeys(
            ("share", "run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa"), False
        ),
    )
    return page


def recognise(
    recognizer: Recognizer, path: Path, max_seconds: float, progress: gr.Progress
) -> tuple[dict[str, float], str]:
    """-> the classes' scores, and HTML of what the tokens took and of the timeline. Raises InputError."""
    progress(0, "classes")
    seconds = recognizer.seconds(path)
    if seconds > max_seconds:
        raise InputError(f"{path}: lasts {seconds:.0f} s, at most {max_seconds:g} s are taken")
    scores = {guess.name: guess.score for guess in recognizer(path)}
    clips = min(max(round(seconds / CLIP), 1), CLIPS) if recognizer.config.data.sampling == "dense" else 1
    frames, maps = recognizer.semantic_maps(path, clips)
    film = base64.b64encode(play_maps(frames, maps)).decode()
    caption = "what the model sees" + ("" if maps is None else "; bright: what its semantic tokens took")
    parts = [f"<h3>{html.escape(path.name)}</h3>"]
    parts += [f'<figure class="player"><img alt="{caption}" src="data:image/webp;base64,{film}">']
    parts += [f"<figcaption>{caption}</figcaption></figure>"]
    if path.suffix.lower() in VIDEO_SUFFIXES:
        moments = []
        for moment in recognizer.timeline(path, every=max(seconds / MOMENTS, CLOSEST)):
            if moment.start > max_seconds:  # its clock says otherwise than its frames
                break
            moments.append(moment)
            progress(min(moment.end / max(seconds, 1e-3), 1), "timeline")
        parts.append(draw_timeline(moments, overlap=recognizer.config.task == "multilabel"))
    return scores, "\n".join(parts)


def draw_timeline(moments: Sequence[Moment], *, overlap: bool = False) -> str:
    """HTML: the best classes' scores over time, the segments below, and both in words.

    overlap: several classes may last at a time.
    """
    names, end = moments[0].class_names, moments[-1].end
    found = segments(moments, names, overlap=overlap)
    scores = np.stack([moment.scores for moment in moments])
    highest = scores.max(0)
    shown = np.argsort(-highest, kind="stable")[: len(COLOURS)].tolist()
    colours = {names[i]: colour for i, colour in zip(shown, COLOURS, strict=False) if highest[i] >= LOWEST}
    middles = [100 * (moment.start + moment.end) / 2 / end for moment in moments]
    lines = []
    for i, colour in zip(shown, colours.values(), strict=False):
        row = scores[[0, *range(len(moments)), -1], i]  # level out to both ends
        points = " ".join(f"{x:.2f},{1 - y:.4f}" for x, y in zip([0, *middles, 100], row, strict=True))
        lines.append(f'<polyline points="{points}" stroke="{colour}"/>')
    strip = "".join(
        f'<i title="{html.escape(s.name)}" style="left: {100 * s.start / end:.2f}%; '
        f'width: {100 * (s.end - s.start) / end:.2f}%; background: {colours.get(s.name, "#888")}"></i>'
        for s in found
    )
    words = [(s.name, f"{_clock(s.start)} to {_clock(s.end)}, {s.score:.0%}") for s in found]
    rest = set(colours) - {s.name for s in found}
    words += [(names[i], f"never more than {highest[i]:.0%}") for i in shown if names[i] in rest]
    items = "".join(
        f'<li><b style="--of: {colours.get(name, "#888")}">■</b> {html.escape(name)}: {when}</li>'
        for name, when in words
    )
    return f"""<div class="timeline"><h3>Timeline</h3>
<svg viewBox="0 -.03 100 1.06" preserveAspectRatio="none" fill="none" role="img" aria-label="scores over time">
{"".join(lines)}</svg>
<div class="strip">{strip}</div><div class="ends"><span>0:00.0</span><span>{_clock(end)}</span></div>
<ul>{items}</ul></div>"""


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


class Gate:
    """Stands before gradio, and refuses what would cost memory, disk or a connection before it does.

    Large bodies, and those of unknown size; parts of gradio that the page does not use; names of files that
    were not uploaded, which gradio would copy or, from the net, fetch. Each upload gets a folder of its
    own: gradio goes by content, and one visitor's would be removed with another's that is equal.
    """

    def __init__(self, app, folder: Path, largest: int):
        self.app, self.folder, self.largest = app, folder, largest

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        part = request.url.path.removeprefix("/gradio_api/").partition("/")[0]
        response = self._refusal(request, part)
        if response is None and part == "upload":
            response = await self._upload(request)
        elif response is None and request.method == "POST":
            body = await request.body()
            messages = [{"type": "http.request", "body": body}]
            try:
                json.loads(body or "null", object_hook=self._check)
            except (ValueError, RecursionError):
                response = PlainTextResponse("not a message of this page", 400)

            async def receive(receive=receive):
                return messages.pop() if messages else await receive()

        await (response or self.app)(scope, receive, send)

    def _refusal(self, request: Request, part: str) -> Response | None:
        if request.url.path.startswith("/gradio_api/") and part not in USED:
            return PlainTextResponse("not given out here", 403)
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return None
        size, most = (
            request.headers.get("content-length"),
            self.largest if part == "upload" else LARGEST_MESSAGE,
        )
        if size is None or not size.isdecimal():
            return PlainTextResponse("a body of unknown size", 411)
        if int(size) > most + LARGEST_MESSAGE:
            return PlainTextResponse(f"{int(size) / 1e6:.0f} MB, at most {most / 1e6:g} MB are taken", 413)
        return None

    def _check(self, entry: dict) -> dict:
        if "path" in entry:
            Path(str(entry["path"])).resolve().relative_to(self.folder)  # else a ValueError
        return entry

    async def _upload(self, request: Request) -> Response:
        home, number = self.folder / secrets.token_hex(8), request.query_params.get("upload_id")
        try:
            files, *_ = await upload_fn(
                request,
                home,
                self.largest,
                number,
                upload_progress=file_upload_statuses if number else None,
            )
        except BaseException as error:
            shutil.rmtree(home, ignore_errors=True)
            if isinstance(error, Exception):
                return PlainTextResponse(f"not an upload: {error}", 400)
            raise
        request.app.get_blocks().upload_file_set.update(map(str, files))  # gradio removes it after `KEPT`
        return JSONResponse([str(file) for file in files])
