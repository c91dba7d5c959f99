"""Pages that need no network: a template of `templates/` with its style, script and data inside.

Paths, class names and causes come from elsewhere and may hold anything. A template escapes what it prints,
data is JSON without "<", scripts set text and never HTML, and the page's policy lets no other script run.
"""

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_page(
    path: Path, template: str, *, data: Any, previews: Sequence[bytes | None] = (), **texts: Any
) -> Path:
    """The page `template`.html, with `template`.js as its script.

    data: plain values for the script. previews: WebP files, or none where no video has one.
    texts: what the template prints.
    """
    script = _source("videos.js") + _source(f"{template}.js")
    pictures = [picture and base64.b64encode(picture).decode() for picture in previews]
    page = _templates().get_template(f"{template}.html")
    page = page.render(  # what is marked safe in the templates: these four, and no other
        style=_source("page.css"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=as_json(data),
        previews=as_json(pictures if any(pictures) else []),
        **texts,
    )
    path.write_bytes(page.encode(errors="xmlcharrefreplace"))  # a path's bytes may be no text: surrogates
    return path


def read_previews(path: Path) -> list[bytes | None]:
    """The previews inside a page that `write_page` wrote; none where there is no such page."""
    if not path.is_file():
        return []
    found = re.search(rb'<script type="application/json" id="previews">(.*?)</script>', path.read_bytes())
    return [picture and base64.b64decode(picture) for picture in json.loads(found[1])] if found else []


def as_json(data: Any) -> str:
    """For a script element, which "</script" or "<!--" would end or change; ASCII, no spaces."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def write_report_page(
    path: Path,
    report: Mapping[str, Any],
    *,
    headlines: Iterable[tuple[str, float | None]],
    measure: str,
    by_class: Sequence[tuple[str, int, float | None]],
    rows: Iterable[tuple[str, Sequence[int]]],
    best: np.ndarray,
    scores: np.ndarray,
    failures: Mapping[int, str],
    previews: Sequence[bytes | None],
    confusion: bool,
) -> Path:
    """`report.html` of a scoring of N videos and K classes.

    report: what `report.json` holds. headlines: (title, fraction). measure: what `by_class` holds beside
    (name, videos): a fraction, or None. rows: (path, class ids) of each video. best: class ids (N, 5), best
    first; scores: theirs. failures: why a video could not be read, by its index.
    confusion: whether a video has one class at most, so that there is a confusion matrix.
    """
    rows = list(rows)
    root, names = below([name for name, _ in rows])
    data = {
        "classes": [name for name, _, _ in by_class],
        "videos_of": [videos for _, videos, _ in by_class],
        "values": [value for _, _, value in by_class],
        "confusion": confusion,
        "paths": names,
        "labels": [list(labels) for _, labels in rows],
        "best": [[] if i in failures else line for i, line in enumerate(best.tolist())],
        "scores": [
            [round(value, 5) for value in line] for line in np.nan_to_num(scores.astype(float)).tolist()
        ],
        "failures": failures,
    }
    return write_page(
        path,
        "report",
        data=data,
        previews=previews,
        title=path.absolute().parent.name,
        report=report,
        headlines=headlines,
        measure=measure,
        root=root,
        confusion=confusion and any(labels for _, labels in rows),
    )


def below(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all paths lie in ("": there is none), and the paths from there."""
    prefix = os.path.commonprefix(paths)  # noqa: RUF071 (it is cut at a slash)
    root = "".join(prefix.rpartition("/")[:2])
    return root, [path[len(root) :] for path in paths]


@functools.cache
def _templates():
    from jinja2 import Environment, PackageLoader, StrictUndefined  # takes a tenth of a second to import

    pages = Environment(
        loader=PackageLoader("stvit_video"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters["percent"] = lambda value: "n/a" if value is None else f"{value:.2%}"
    return pages


def _source(name: str) -> str:
    """A template's file as it is."""
    pages = _templates()
    return pages.loader.get_source(pages, name)[0]
