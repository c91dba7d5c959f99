"""A checkpoint, or a file exported from it, and a video -> names and scores."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .build import build_task, build_test_views
from .config import Config, from_dict
from .data.decode import DecodeError, open_video
from .data.guard import GivenUp, Guard
from .data.views import TestViews
from .engine import checkpoint
from .engine.device import autocast, pick_device, pick_precision
from .errors import InputError
from .export import FORMATS
from .export import read as read_exported
from .figures import draw_maps
from .weights import rebuild


class Guess(NamedTuple):
    name: str
    score: float


def load_model(path: str | Path) -> tuple[Config, list[str], torch.nn.Module]:
    """A checkpoint's settings, class names and model (its averaged weights, where it has them).

    Raises CheckpointError, ConfigError or WeightsError.
    """
    values = checkpoint.load(path)
    missing = {"config", "class_names", "model", "ema"} - values.keys()
    if missing:
        raise checkpoint.CheckpointError(f"{path}: holds no {min(missing)}")
    config, model = from_dict(values["config"], str(path)), rebuild(values, str(path))
    try:
        model.load_state_dict(values["model"] if values["ema"] is None else values["ema"])
    except RuntimeError as error:
        cause = " ".join(str(error).split())
        raise checkpoint.CheckpointError(f"{path}: weights do not fit its settings: {cause}") from None
    return config, values["class_names"], model.eval()


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
        self.exported = self.path.suffix in FORMATS
        if self.exported:
            self.config, self.class_names, self.model = read_exported(self.path, self.device)
        else:
            self.config, self.class_names, self.model = load_model(checkpoint)
            self.precision = pick_precision(self.config.train.precision, self.device)
            self.model.to(self.device)
            self.task = build_task(self.config, self.class_names).to(self.device)
        settings = self.config.eval
        self.views = build_test_views(self.config, clips or settings.clips, crops or settings.crops)
        self._decode = self._read if timeout is None else Guard(self._read, timeout)

    def __call__(self, path: str | Path, top: int = 5) -> list[Guess]:
        """The `top` best classes of one video, best first. Raises DecodeError."""
        scores = self._scores(self._clips(path))[0].double().mean(0)
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
    def draw_semantic_maps(self, path: str | Path, picture: str | Path) -> None:
        """Draw what the semantic tokens took from the central view of one video. Raises DecodeError."""
        self._need_checkpoint("maps of semantic tokens")
        semantic = getattr(self.model, "semantic", None)
        if not hasattr(semantic, "maps"):
            raise InputError(f"{self.config.model.name} has no semantic tokens to draw")
        clip = self._clips(path, build_test_views(self.config, 1, 1))[0]  # (1, 3, T, H, W)
        maps = self.model.semantic_maps(self.task.normalise(clip.to(self.device)))[0]
        step = -(-clip.shape[2] // maps.shape[1])
        frames = clip[0, :, ::step].permute(1, 2, 3, 0).numpy()
        draw_maps(frames, maps.unflatten(0, semantic.tokens).cpu().numpy(), Path(picture))

    def _need_checkpoint(self, what: str) -> None:
        if self.exported:
            raise InputError(f"{self.path}: an exported file gives scores only; {what} need the checkpoint")

    def _clips(self, path: str | Path, views: TestViews | None = None) -> Tensor:
        """-> uint8 (1, V, 3, T, H, W)."""
        try:
            return torch.from_numpy(self._decode(path, views or self.views)).unsqueeze(0)
        except GivenUp as error:
            raise DecodeError(f"{path}: {error}") from None

    def _read(self, path: str | Path, views: TestViews) -> np.ndarray:
        with open_video(path, self.config.data.decoder) as video:
            return views(video, -1)[0].contiguous().numpy()
