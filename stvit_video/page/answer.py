"""What the page says of one video: scores by class, and the rest as HTML without any file."""

import base64
import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..data.media import VIDEO_SUFFIXES
from ..errors import DecodeError, InputError
from ..figures import play_maps
from ..recognizer import Recognizer
from ..timeline import Moment, segments

MOMENTS, CLOSEST = 60, 0.25  # of a timeline: how many about, and seconds between them at least
CLIPS, CLIP = 4, 3.0  # that are played: how many at most, one for each so many seconds
LOWEST = 0.05  # score of a class that is drawn
TIMELINE_COLOURS = ("#2f7ed8", "#e4730b", "#1f9d55", "#b14fc5", "#c2a000", "#00a3ad")  # of its classes


def recognise(
    recognizer: Recognizer, path: Path, max_seconds: float, progress: Callable
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
        parts.append(_timeline(recognizer, path, seconds, max_seconds, progress))
    return scores, "\n".join(parts)


def _timeline(
    recognizer: Recognizer, path: Path, seconds: float, max_seconds: float, progress: Callable
) -> str:
    moments, line = [], ""
    try:
        for moment in recognizer.timeline(path, every=max(seconds / MOMENTS, CLOSEST)):
            if moment.start > max_seconds:  # its clock says otherwise than its frames
                break
            moments.append(moment)
            progress(min(moment.end / max(seconds, moment.end), 1), "timeline")
    except DecodeError as error:
        line = refusal(one_line(error, path))
    drawn = timeline_html(moments, overlap=recognizer.config.task == "multilabel") if moments else ""
    return drawn + line


def timeline_html(moments: Sequence[Moment], *, overlap: bool = False) -> str:
    """HTML: the best classes' scores over time, the segments below, and both in words.

    overlap: several classes may last at a time.
    """
    names, end = moments[0].class_names, moments[-1].end
    lasting = segments(moments, names, overlap=overlap)
    scores = np.stack([moment.scores for moment in moments])
    highest = scores.max(0)
    best = np.argsort(-highest, kind="stable")[: len(TIMELINE_COLOURS)].tolist()
    shown = [i for i in best if highest[i] >= LOWEST]
    colours = {names[i]: colour for i, colour in zip(shown, TIMELINE_COLOURS[: len(shown)], strict=True)}
    middles = [100 * (moment.start + moment.end) / 2 / end for moment in moments]
    lines = []
    for i in shown:
        row = scores[[0, *range(len(moments)), -1], i]  # level out to both ends
        points = " ".join(f"{x:.2f},{1 - y:.4f}" for x, y in zip([0, *middles, 100], row, strict=True))
        lines.append(f'<polyline points="{points}" stroke="{colours[names[i]]}"/>')
    strip = "".join(
        f'<i title="{html.escape(s.name)}" style="left: {100 * s.start / end:.2f}%; '
        f'width: {100 * (s.end - s.start) / end:.2f}%; background: {colours.get(s.name, "#888")}"></i>'
        for s in lasting
    )
    words = [(s.name, f"{_clock(s.start)} to {_clock(s.end)}, {s.score:.0%}") for s in lasting]
    rest = set(colours) - {s.name for s in lasting}
    words += [(names[i], f"never more than {highest[i]:.0%}") for i in shown if names[i] in rest]
    items = "".join(
        f'<li><b style="--of: {colours.get(name, "#888")}">■</b> {html.escape(name)}: {when}</li>'
        for name, when in words
    )
    return f"""<div class="timeline"><h3>Timeline</h3>
<svg viewBox="0 -.03 100 1.06" preserveAspectRatio="none" fill="none" role="img"
aria-label="scores over time">{"".join(lines)}</svg>
<div class="strip">{strip}</div><div class="ends"><span>0:00.0</span><span>{_clock(end)}</span></div>
<ul>{items}</ul></div>"""


def one_line(error: Exception, path: Path) -> str:
    """Its message, with the name alone instead of the path."""
    return str(error).replace(f"{path.parent}{os.sep}", "")


def refusal(line: str) -> str:
    return f'<p class="refused" role="alert">{html.escape(line)}</p>'


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"
