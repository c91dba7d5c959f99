"""A page to try a model on: drop a video, see its classes, when they happen, and what the tokens took.

For whoever is allowed to reach it, but without trust: it keeps nothing, sends nothing elsewhere, and gives
out no file.
"""

import contextvars
import functools
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ..errors import InputError
from ..recognizer import Recognizer
from .answer import one_line, recognise, refusal

try:
    import gradio as gr
    from starlette.middleware import Middleware

    from .gate import KEPT_SECONDS, MB, WAITING_UPLOADS, Gate
except ImportError as error:
    raise InputError(f"the page needs gradio ({error}): pip install stvit_video[page]") from None

OFF = ("share", "run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa")  # of gradio
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
    examples = [Path(path) for path in examples]
    temporary = tempfile.TemporaryDirectory(prefix="stvit_page_")  # goes with the page, or the process
    folder, largest = Path(temporary.name).resolve(), round(max_megabytes * MB)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio has no other way to say where
    # One thread: a Guard's child ends with the thread that made it, and gradio's come and go.
    worker = ThreadPoolExecutor(1)

    def answer(path: Path, progress: gr.Progress) -> tuple[dict | None, str, None]:
        """-> classes, the rest, and an empty place to drop the next one into."""
        call = functools.partial(recognise, recognizer, path, max_seconds, progress)
        try:
            return *worker.submit(contextvars.copy_context().run, call).result(), None
        except InputError as error:
            line = one_line(error, path)
        except Exception:  # of a file that someone made up, anything
            traceback.print_exc()
            line = f"{path.name}: cannot be recognised (the cause is in the log of the page)"
        return None, refusal(line), None

    def uploaded(file: dict, progress: gr.Progress = gr.Progress()):  # noqa: B008 (gradio's way)
        path = Path(file["path"]).resolve()
        home = folder / path.relative_to(folder).parts[0]  # see Gate
        try:
            return answer(path, progress)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def chosen(number: int, progress: gr.Progress = gr.Progress()):  # noqa: B008
        return answer(examples[number], progress)

    label = f"A video, at most {max_megabytes:g} MB and {max_seconds:g} s; deleted afterwards"
    page = _laid_out(recognizer, examples, label, uploaded, chosen)
    page.queue(max_size=WAITING_UPLOADS)
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
        **dict.fromkeys(OFF, False),
    )
    return page


def _laid_out(
    recognizer: Recognizer, examples: Sequence[Path], label: str, uploaded: Callable, chosen: Callable
) -> gr.Blocks:
    """A place to drop a video, by its label, and examples; beside them what comes of either."""
    config = recognizer.config
    suffixes = VIDEO_SUFFIXES | (IMAGE_SUFFIXES if config.data.num_frames == 1 else set())
    with gr.Blocks(title="stvit_video", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        kind = f"{config.model.name}, {len(recognizer.class_names)} classes"
        gr.Markdown(f"# What happens in a video?\n{kind}")
        with gr.Row():
            with gr.Column(scale=2):
                drop = gr.File(label=label, file_types=sorted(suffixes), height=170)
                names = [[f"{path.parent.name}/{path.name}"] for path in examples]
                choice = gr.Dataset(
                    components=[gr.Textbox(visible=False)],
                    samples=names,
                    samples_per_page=6,
                    type="index",
                    label="Or an example",
                    visible=bool(names),
                )
            with gr.Column(scale=3):
                outputs = [gr.Label(label="Classes", num_top_classes=5), gr.HTML(elem_id="more"), drop]
        how = {"concurrency_limit": 1, "concurrency_id": "model", "scroll_to_output": True}
        drop.upload(uploaded, drop, outputs, preprocess=False, api_visibility="private", **how)
        choice.click(chosen, choice, outputs, api_visibility="private", **how)
    return page
