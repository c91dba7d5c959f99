"""What a list of videos says of each: a `Row`; and `Rows`, which cost a forked worker no memory."""

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ListError

if TYPE_CHECKING:
    from .frames import FrameVideo
    from .shards import Place


@dataclass(frozen=True, slots=True)
class Row:
    """A video, an image or a folder of frames.

    target: what is to be learnt of it: a class id, several in rising order (multi-label), or what a task's
        list format says, with `classes`, the ids in it, and a repr that says all of it; None: not known.
    num_frames: None where the list does not say.
    place: where it lies in a shard; `path` is then its name, shard/member.
    """

    path: str
    target: Any
    num_frames: int | None = None
    place: "Place | None" = None

    @property
    def label(self) -> Any:
        """The target, by its name in classification."""
        return self.target

    def contents(self) -> "bytes | FrameVideo | None":
        """For `open_video`: what lies in a shard, None: the file at `path`. Raises DecodeError."""
        return None if self.place is None else self.place.contents(self.path)

    def frame(self, index: int) -> np.ndarray:
        """-> uint8 (H, W, 3). Raises DecodeError."""
        from .decode import open_video  # a machine that only computes may have no decoder

        with open_video(self.path, contents=self.contents()) as video:
            return video.read([index])[0].permute(1, 2, 0).contiguous().numpy()

    def missing_frames(self, num_frames: int) -> str | None:
        """What is wrong where the list says more frames than the video has."""
        if self.num_frames is None or num_frames >= self.num_frames:
            return None
        return f"{self.path}: the list says {self.num_frames} frames, there are {num_frames}"


def class_ids(target: Any) -> tuple[int, ...]:
    """The classes in a target: of one class, several, or none."""
    if hasattr(target, "classes"):
        return tuple(target.classes)
    return () if target is None else (target,) if isinstance(target, int) else tuple(target)


class Rows(Sequence[Row]):
    """Rows as one block of bytes, made into objects as they are asked for; equal to a list of them.

    A worker that is forked from this process shares the block. Objects it would copy, page by page, as
    soon as it counts references to them.
    class_names: names by class id, None where the format carries none.
    category_ids: what a list of objects calls the classes, by class id; None for other lists.
    """

    def __init__(
        self,
        rows: Iterable[Row] = (),
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
    ):
        parts = [pickle.dumps((row.path, row.target, row.num_frames, row.place), 5) for row in rows]
        self._ends = np.cumsum([0, *map(len, parts)])
        self._block = b"".join(parts)
        self.class_names, self.category_ids = class_names, category_ids

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        places = range(len(self))[index]
        if isinstance(index, slice):
            return [self[i] for i in places]
        start, end = self._ends[places : places + 2].tolist()
        return Row(*pickle.loads(self._block[start:end]))

    def __iter__(self) -> Iterator[Row]:
        start = 0
        for end in self._ends[1:]:
            yield Row(*pickle.loads(self._block[start:end]))
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Rows({list(self)!r}, {self.class_names!r})"


def parse_json(path: str | os.PathLike, text: str) -> Any:
    """What a json list says. Raises ListError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ListError(f"{path}:{error.lineno}: found {error.msg}, expected valid json") from error
    except RecursionError as error:
        raise ListError(f"{path}: found brackets too deep in each other, expected valid json") from error
