"""Videos of a list into WebDataset shards: KEY.mp4 as it is, KEY.cls with its class id."""

import os
import stat
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm
from webdataset import TarWriter

from ..errors import InputError
from ..files import written_whole
from .annotations import MEDIA, SHARDS_NAMES
from .rows import Row


def write_shards(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    videos: int = 1000,
    size: int = 1_000_000_000,
) -> list[Path]:
    """Write `folder`/00000.tar, 00001.tar, ... in the order of the rows; returns them.

    A shard holds up to `videos` videos and `size` bytes of them (a larger video has one of its own). A key
    is the row's number and file name. class_names go beside the shards, where `read_rows` finds them. The
    same rows give the same bytes.

    Made beside `folder` and moved there, so that a broken-off writing leaves nothing that looks whole.
    Raises InputError for a folder that exists and, before anything is written, for rows that are no files
    or have several classes.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists: shards are written into a new folder")
    plan = _plan(rows, videos, size)
    try:
        with (
            written_whole(folder) as part,
            tqdm(total=len(rows), desc=f"writing {folder}", unit="video") as bar,
        ):
            part.mkdir(parents=True)
            for number, shard in enumerate(plan):
                with (
                    open(part / f"{number:05d}.tar", "wb") as file,
                    TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer,
                ):
                    for index in shard:
                        writer.write(_sample(index, rows[index]))
                        bar.update()
            if class_names is not None:
                text = "".join(f"{name}\n" for name in class_names)
                (part / SHARDS_NAMES).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return sorted(folder.glob("*.tar"))


def _plan(rows: Sequence[Row], videos: int, size: int) -> list[range]:
    """The rows of each shard."""
    starts, filled, bad = [], 0, []
    for index, row in enumerate(rows):
        if not isinstance(row.target, int | None):
            bad.append(f"{row.path}: target {row.target}, expected one class id or none")
            continue
        if row.place is None:
            try:
                status = os.stat(row.path)
            except OSError as error:
                bad.append(f"{row.path}: {error.strerror}")
                continue
            if not stat.S_ISREG(status.st_mode) or not row.path.lower().endswith(MEDIA):
                bad.append(f"{row.path}: not a video or image file")
                continue
        length = status.st_size if row.place is None else row.place.size
        if not starts or index - starts[-1] == videos or filled + length > size:
            starts.append(index)
            filled = 0
        filled += length
    if bad:
        raise InputError(f"{len(bad)} of {len(rows)} videos cannot go into shards, the first: {bad[0]}")
    return [range(*ends) for ends in pairwise([*starts, len(rows)])]


def _sample(index: int, row: Row) -> dict[str, str | bytes]:
    stem, suffix = os.path.splitext(os.path.basename(row.path))
    contents = row.contents()
    sample = {
        "__key__": f"{index:08d}_{stem.replace('.', '_')}",  # a key ends at its first dot
        suffix[1:].lower(): Path(row.path).read_bytes() if contents is None else contents,
    }
    return sample if row.target is None else sample | {"cls": str(row.target).encode()}
