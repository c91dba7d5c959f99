"""A checkpoint, or a file exported from it, and a video -> names and scores."""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .build import build_sampling, build_task, build_test_views, load_model
from .data.decode import Video, open_video
from .data.guard import GivenUp, Guard, guarded_in_order, read_ahead
from .data.live import Chunk, LiveReader
from .data.stream import Window, WindowReader
from .data.views import TestViews
from .engine.device import autocast, pick_device, pick_precision
from .errors import DecodeError, InputError
from .export import EXPORT_SUFFIXES
from .export import read as read_exported
from .figures import draw_maps
from .tasks import TASKS
from .tasks.base import check_scores
from .timeline import EVERY, Moment

TIMELINE_BATCH = 16  # views; more are no faster, and a moment waits longer


class Guess(NamedTuple):
    name: str
    score: float


class Recognizer:
    """Says what happens in a video.

    >>> recognize = Recognizer("best.pt")
    >>> recognize("video.mp4")[0]
    Guess(name='move_left', score=0.98)

    checkpoint: alone says which model, sampling, views, normalisation and class names; or a file that
        stvit-export made of one (.onnx, .pt2), which gives scores, but no features and maps.
    clips, crops: other views than the checkpoint's.
    device: "cpu", "cuda", ...; by default CUDA where there is one.
    timeout: seconds after which a video is given up, read in a child process; None: read here, unguarded.
    Raises InputError for a checkpoint of another kind, and for one whose scores are no numbers; ValueError
    for less than one clip or crop.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        clips: int | None = None,
        crops: int | None = None,
        device: str | None = None,
        timeout: float | None = None,
    ):
        self.path, self.device = Path(checkpoint), pick_device(device or "auto")
        self.exported = self.path.suffix in EXPORT_SUFFIXES
        if self.exported:
            self.config, self.class_names, self.model = read_exported(self.path, self.device)
            self.precision = None  # the file's
        else:
            self.config, self.class_names, self.model = load_model(checkpoint)
            self.precision = pick_precision(self.config.train.precision, self.device)
            self.model.to(self.device)
        self.task = build_task(self.config, self.class_names).to(self.device)
        if TASKS[self.config.task].has_head:
            raise InputError(
                f"{self.path}: was trained for task={self.config.task}, which names no classes: "
                "stvit-predict or a Predictor takes it"
            )
        for name, count in (("clips", clips), ("crops", crops)):
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: must be 1 or more")
        settings = self.config.eval
        self.views = self._test_views(clips or settings.clips, crops or settings.crops)
        self._timeline_views = self._test_views(1, crops or 1)
        self.timeout = timeout
        self._decode = self._read if timeout is None else Guard(self._read, timeout)

    def __call__(self, path: str | Path, top: int = 5) -> list[Guess]:
        """The `top` best classes of one video, best first. Raises DecodeError."""
        return self._guesses(self._clips(path), top)

    def many(
        self, paths: Iterable[str | Path], workers: int = 4, top: int = 5
    ) -> Iterator[tuple[str | Path, list[Guess] | DecodeError]]:
        """(path, what `recognize(path)` gives, or the DecodeError) of each video, in order.

        workers: processes that decode, each one video ahead; closing the generator ends them.
        Raises ValueError for less than one.
        """
        if workers < 1:
            raise ValueError(f"workers={workers}: must be 1 or more")
        return self._many(paths, workers, top)

    def _many(
        self, paths, workers: int, top: int
    ) -> Iterator[tuple[str | Path, list[Guess] | DecodeError]]:
        jobs = ((path, self.views) for path in paths)
        results = guarded_in_order(self._read_job, jobs, workers=workers, timeout=self.timeout)
        with contextlib.closing(results):
            for (path, _), result in results:
                if isinstance(result, GivenUp):
                    yield path, DecodeError(f"{path}: {result}")
                elif isinstance(result, Exception):
                    yield path, result
                else:
                    yield path, self._guesses(torch.from_numpy(result).unsqueeze(0), top)

    def timeline(
        self,
        source: str | Path,
        *,
        every: float = EVERY,
        window: float | None = None,
        skip: int = 0,
    ) -> Iterator[Moment]:
        """What happens when in a video file of any length: scores of windows that slide over it.

        Every frame is decoded once, by a process that works ahead; memory does not depend on the length.
        Windows are cut like clips of the checkpoint, with one centre crop, or `crops` where the Recognizer
        has some set. `WindowReader` and `Layout` say where they lie.

        every: seconds from the start of one to the start of the next.
        window: seconds; None: the checkpoint's num_frames x stride, or 4 s for sampling "uniform".
        skip: windows, from the first, that are not scored; the others' moments are the same, bit for bit.
        Raises DecodeError, for a file that is damaged midway after the moments before that; ValueError.
        """
        for name, seconds in (("every", every), ("window", window)):
            if seconds is not None and not 0 < seconds < float("inf"):
                raise ValueError(f"{name}={seconds}: must be more than 0 seconds")
        transform = self._timeline_views.transform
        batch = max(min(TIMELINE_BATCH, self.config.eval.view_batch) // transform.crops, 1)
        skipped = skip - skip % batch  # batches of the same windows as in one go: rounding depends on them
        reader = WindowReader(
            source,
            build_sampling(self.config.data),
            transform,
            every=every,
            window=window,
            skip=skipped,
            batch=batch,
        )
        return self._moments(reader, batch, skip - skipped)

    def _moments(self, reader: WindowReader, batch: int, drop: int) -> Iterator[Moment]:
        """The moments of all windows but the `drop` first ones."""
        waiting: list[Window] = []
        end, error = 0.0, None
        chunks = guarded_in_order(reader, itertools.repeat(None), workers=1, timeout=self.timeout)
        with contextlib.closing(chunks):
            for _, chunk in chunks:
                if chunk is None or isinstance(chunk, Exception):
                    error = chunk
                    break
                waiting += chunk
                while len(waiting) >= batch:
                    yield from self._score_windows(waiting[:batch])[drop:]
                    end, drop = waiting[batch - 1].end, 0
                    del waiting[:batch]
        if waiting:
            yield from self._score_windows(waiting)[drop:]
            end = waiting[-1].end
        if isinstance(error, GivenUp):
            raise DecodeError(f"{reader.path}: after {end:.2f} s: {error}")
        if error is not None:
            raise error

    def stream(self, source: str | Path, *, every: int | None = None) -> Iterator[Moment]:
        """What happens now, in frames as they come: a moment for each `every` frames, of the last clip.

        For models with chunks (`model.base_window`): each chunk's semantic tokens are computed once and
        kept, so that a moment costs a chunk's base layers and the layers on semantic tokens. It is what the
        model gives for the clip of the same frames. The first comes when a whole clip is there; frames are
        taken as the checkpoint's sampling says, every stride-th, with one centre crop.

        source: a video file; a folder whose images come as others write them; or an address that FFmpeg
            opens (rtsp://, http://, /dev/video0), whose frames are dropped where the model is too slow.
        every: frames of a clip, whole chunks of them; None: one chunk's.
        Raises DecodeError where the source cannot be read, ValueError, InputError for other models.
        """
        self._need_checkpoint("a stream's scores")
        if getattr(self.model, "chunk_embed", None) is None:
            raise InputError(
                f"{self.path}: a stream needs a model with chunks (model.base_window), which "
                f"{self.config.model.name} has not here; for files there is `timeline`"
            )
        frames = self.config.data.num_frames // self.model.chunks
        every = frames if every is None else every
        if every < frames or every % frames:
            raise ValueError(f"every={every}: must be whole chunks of {frames} frames")
        transform = self._test_views(1, 1).transform
        reader = LiveReader(source, build_sampling(self.config.data), transform, frames)
        return self._live_moments(reader, every // frames)

    def _live_moments(self, reader: LiveReader, each: int) -> Iterator[Moment]:
        kept: deque[tuple[Chunk, Tensor]] = deque(maxlen=self.model.chunks)
        dropped, since = 0, each  # the first moment waits for no more than a clip
        with contextlib.closing(read_ahead(reader, reader.source, self.timeout)) as calls:
            for chunks in calls:
                for chunk in chunks:
                    kept.append((chunk, self._chunk_tokens(chunk)))
                    dropped, since = dropped + chunk.dropped, since + 1
                    if len(kept) < self.model.chunks or since < each:
                        continue
                    scores = self._join(torch.stack([tokens for _, tokens in kept], 1))
                    latency = time.monotonic() - chunk.arrived
                    yield Moment(kept[0][0].start, chunk.end, scores, self.class_names, latency, dropped)
                    dropped, since = 0, 0

    @torch.no_grad()
    def _chunk_tokens(self, chunk: Chunk) -> Tensor:
        with autocast(self.device, self.precision):
            pixels = torch.from_numpy(chunk.pixels).to(self.device)
            return self.model.chunk_tokens(self.task.normalise(pixels[None]))

    @torch.no_grad()
    def _join(self, chunks: Tensor) -> np.ndarray:
        with autocast(self.device, self.precision):
            scores = self.task.activation(self.model.join(chunks).float())[0].cpu().numpy()
        check_scores(scores)
        return scores

    def _score_windows(self, windows: list[Window]) -> list[Moment]:
        clips = torch.from_numpy(np.stack([window.clips for window in windows]))
        scores = self._scores(clips).double().mean(1).float().cpu().numpy()
        check_scores(scores)
        return [Moment(w.start, w.end, s, self.class_names) for w, s in zip(windows, scores, strict=True)]

    def _guesses(self, clips: Tensor, top: int) -> list[Guess]:
        scores = self._scores(clips)[0].double().mean(0)
        check_scores(scores)
        order = scores.argsort(descending=True, stable=True)[:top].tolist()
        return [Guess(self.class_names[i], scores[i].item()) for i in order]

    def _scores(self, clips: Tensor) -> Tensor:
        """uint8 (B, V, 3, T, H, W) -> probabilities of each view, float32 (B, V, K), on the device."""
        if self.exported:  # normalisation and softmax are in the file
            parts = clips.flatten(0, 1).split(self.config.eval.view_batch)
            return torch.cat([self.model(part) for part in parts]).unflatten(0, clips.shape[:2])
        with autocast(self.device, self.precision):
            return self.task.view_scores(self.model, clips.to(self.device))

    @torch.no_grad()
    def features(self, path: str | Path) -> Tensor:
        """What the head sees, averaged over the views: float32 (C,). Raises DecodeError."""
        self._need_checkpoint("features")
        if not hasattr(self.model, "pooled_features"):
            raise InputError(f"{self.config.model.name} has no pooled_features")
        parts = self._clips(path)[0].to(self.device).split(self.config.eval.view_batch)
        features = [self.model.pooled_features(self.task.normalise(part)) for part in parts]
        return torch.cat(features).mean(0)

    @torch.no_grad()
    def draw_maps(self, path: str | Path, picture: str | Path) -> None:
        """Draw, over the central view of one video, which patches are one superpatch, and what the semantic
        tokens took; of these what the model has.

        Raises DecodeError; InputError for a model that has neither.
        """
        self._need_checkpoint("maps of tokens")
        frames, maps = self.semantic_maps(path)
        groups = None
        if getattr(self.model, "superpatches", None) is not None:
            clip = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).to(self.device)
            groups = self.model.superpatch_map(self.task.normalise(clip))[0].cpu().numpy()
        if maps is not None:
            tokens = self.model.semantic.tokens or (1, 1, maps.shape[1])  # merged ones lie on no grid
            maps = maps[0].reshape(-1, *tokens[1:], *maps.shape[2:])
        if maps is None and groups is None:
            raise InputError(f"{self.config.model.name} has no superpatches and no semantic tokens to draw")
        slices = len(groups) if maps is None else maps.shape[3]
        draw_maps(frames[0, :: -(-frames.shape[1] // slices)], maps, groups, Path(picture))

    @torch.no_grad()
    def semantic_maps(self, path: str | Path, clips: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """The centre crop of clips spread over a video, and what the semantic tokens took from each patch.

        -> uint8 (clips, T, H, W, 3); (clips, n, T', H', W'), each of the n maps summing to 1, or None for a
        model without semantic tokens. Raises DecodeError.
        """
        views = self._clips(path, self._test_views(clips, 1))[0]  # (clips, 3, T, H, W)
        frames, maps = views.permute(0, 2, 3, 4, 1).numpy(), None
        if hasattr(getattr(self.model, "semantic", None), "maps"):
            parts = views.to(self.device).split(self.config.eval.view_batch)
            maps = torch.cat([self.model.semantic_maps(self.task.normalise(part)) for part in parts])
        return frames, None if maps is None else maps.cpu().numpy()

    def seconds(self, path: str | Path) -> float:
        """How long one video lasts; 0: of unknown rate. Raises DecodeError."""
        return self._clips(path, _seconds).item()

    def _need_checkpoint(self, what: str) -> None:
        if self.exported:
            raise InputError(f"{self.path}: an exported file gives scores only; {what} need the checkpoint")

    def _clips(self, path: str | Path, views: Callable | None = None) -> Tensor:
        """-> uint8 (1, V, 3, T, H, W), or what `views` make of the video."""
        try:
            return torch.from_numpy(self._decode(path, views or self.views)).unsqueeze(0)
        except GivenUp as error:
            raise DecodeError(f"{path}: {error}") from None

    def _test_views(self, clips: int, crops: int) -> TestViews:
        return build_test_views(self.config, self.task, clips, crops)

    def _read_job(self, job: tuple[str | Path, TestViews]) -> np.ndarray:
        return self._read(*job)

    def _read(self, path: str | Path, views: Callable) -> np.ndarray:
        with open_video(path, self.config.data.decoder) as video:
            return views(video, -1)[0].contiguous().numpy()


def _seconds(video: Video, _: int) -> tuple[Tensor]:
    return (torch.tensor(video.num_frames / video.fps if video.fps else 0.0),)
