"""What is left of a pretrained model with semantic tokens in it, before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import build
from ..config import Config
from ..data.annotations import Rows, read_rows
from ..engine.job import Task
from ..errors import InputError
from ..figures import draw_conversion
from ..models.zoo import create_model, multiply_adds
from ..weights import classes_of, load_weights, model_of
from .accuracy import variant
from .commands import STARTS


def bench_convert(
    config: Config,
    *,
    base_depths: Sequence[int],
    tokens: Sequence[tuple[int, int, int]],
    starts: Sequence[str],
    also: Sequence[str],
    limit: int,
    output: Path,
    device: torch.device,
) -> list[dict]:
    """Agreement with the dense model of `model.weights`, on one view of each of `limit` videos or images.

    tokens: (t, h, w) of each; none: 0.7, 0.5 and 0.3 of the patches along each axis of a frame.
    also: more models, named as `accuracy.variant` reads them.
    kept: share of them whose best class stays; probability: the mean of that class's. The dense model comes
    first, then what itself makes of mirrored views: where it is unsure, it keeps few of its own classes.
    cost: multiply-adds over the dense model's. Raises InputError for weights without classes.
    """
    for name in also:
        if ":train." in name:
            raise InputError(f"--also {name}: nothing is trained here")
    source = config.model.weights
    clip = {key: getattr(config.data, key) for key in ("num_frames", "image_size")}
    classes = classes_of(source)
    if not classes:
        raise InputError(f"model.weights={source}: has no classifier, so that there are no classes to keep")
    sizes = model_of(source, num_frames=config.data.num_frames) | config.model.sizes() | {"centres": False}

    def make(**more) -> tuple[nn.Module, Any]:
        model = create_model(**clip, **sizes | more, num_classes=classes)
        return model, load_weights(
            model, source, fresh=("superpatches.vectors",), inflate=config.model.inflate
        )

    reduced = {"semantic_tokens", *(key for key in ("superpatches", "tome_r") if sizes.get(key))}
    dense, report = make(**dict.fromkeys(reduced))
    config = build.with_pixels(config, report)
    task = build.build_task(config, [str(i) for i in range(classes)]).to(device)
    loader = _loader(config, task, limit, device)
    t, *grid = dense.patch_embed.grid
    tokens = tokens or [(t, *(max(round(share * n), 1) for n in grid)) for share in (0.7, 0.5, 0.3)]
    cases = [
        (start, depth, size, {"base_depth": depth, "semantic_tokens": size, **STARTS[start]})
        for depth in base_depths
        for size in tokens
        for start in starts
    ]
    cases += [(name, None, (), variant(config, name).model.sizes()) for name in also]
    std = {"superpatch_std": sizes.get("superpatch_std") or config.data.std}
    models = [make(**std | more)[0] for *_, more in cases]
    own, mirrored, *scores = _scores(dense, models, task, loader, device)
    whole = multiply_adds(dense, **clip)
    best = own.argmax(-1, keepdim=True)
    rows = [_row("dense", None, (), own, best, 1.0), _row("dense, mirrored", None, (), mirrored, best, 1.0)]
    for (start, depth, size, _), model, part in zip(cases, models, scores, strict=True):
        cost = multiply_adds(model, **clip) / whole
        rows.append(_row(start, depth, size, part, best, cost))
    draw_conversion(rows, output / "convert.png")
    return rows


def _row(
    start: str, depth: int | None, tokens: Sequence[int], scores: Tensor, best: Tensor, cost: float
) -> dict:
    kept = (scores.argmax(-1, keepdim=True) == best).double().mean().item()
    probability = scores.gather(-1, best).double().mean().item()
    return {
        **{"start": start, "base depth": depth, "tokens": "x".join(map(str, tokens))},
        **{"cost": round(cost, 4), "kept": kept, "probability": probability},
    }


def _loader(config: Config, task: Task, limit: int, device: torch.device) -> DataLoader:
    """One view of each of at most `limit` rows of `data.test`, spread evenly over the list."""
    data = config.data
    rows = read_rows(data.test, root=data.root, labels=data.labels, format=data.format)
    chosen = [rows[i * len(rows) // min(limit, len(rows))] for i in range(min(limit, len(rows)))]
    chosen = Rows(replace(row, target=None) for row in chosen)
    return build.build_test_loader(config, task, chosen, device, clips=1, crops=1)


@torch.no_grad()
def _scores(
    dense: nn.Module, models: Sequence[nn.Module], task: Task, loader: DataLoader, device: torch.device
) -> list[Tensor]:
    """(N, K), on the CPU: of the dense model, of it on mirrored clips, of each of the others."""
    dense, *models = [model.eval().to(device) for model in (dense, *models)]
    parts = []
    for batch in tqdm(loader, desc="scoring", unit="batch"):
        if batch.failures:
            raise InputError(f"{batch.failures[0][1]}: to compare models, all must be readable")
        clips = batch.clips.to(device)
        pairs = [(dense, clips), (dense, clips.flip(-1)), *((model, clips) for model in models)]
        parts.append([task.view_scores(model, views)[:, 0].cpu() for model, views in pairs])
    return [torch.cat(part) for part in zip(*parts, strict=True)]
