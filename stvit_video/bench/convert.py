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

# How semantic tokens start, and "pool": average pooling in their place, the control.
STARTS = {
    "grid": {"pool": "grid", "semantic_proportional": True},
    "avg": {"pool": "avg", "semantic_proportional": False},
    "max": {"pool": "max", "semantic_proportional": False},
    "pool": {"pool": "avg", "reducer": "pool"},
}


def bench_convert(
    config: Config,
    *,
    base_depths: Sequence[int],
    tokens: Sequence[tuple[int, int, int]],
    starts: Sequence[str],
    limit: int,
    output: Path,
    device: torch.device,
) -> list[dict]:
    """Agreement with the dense model of `model.weights`, on one view of each of `limit` videos or images.

    tokens: (t, h, w) of each; none: 0.7, 0.5 and 0.3 of the patches along each axis of a frame.
    kept: share of them whose best class stays; probability: the mean of that class's; the dense model's row
    comes first. cost: multiply-adds over the dense model's. Raises InputError for weights without classes.
    """
    source, clip = (
        config.model.weights,
        {key: getattr(config.data, key) for key in ("num_frames", "image_size")},
    )
    classes = classes_of(source)
    if not classes:
        raise InputError(f"model.weights={source}: has no classifier, so that there are no classes to keep")
    sizes = model_of(source, num_frames=config.data.num_frames) | config.model.sizes() | {"centres": False}

    def make(**more) -> tuple[nn.Module, Any]:
        model = create_model(**clip, **sizes | more, num_classes=classes)
        return model, load_weights(model, source, fresh=(), inflate=config.model.inflate)

    dense, report = make(semantic_tokens=None)
    config = build.with_pixels(config, report)
    task = build.build_task(config, [str(i) for i in range(classes)]).to(device)
    loader = _loader(config, task, limit, device)
    t, *grid = dense.patch_embed.grid
    tokens = tokens or [(t, *(max(round(share * n), 1) for n in grid)) for share in (0.7, 0.5, 0.3)]
    variants = [
        (depth, size, start, make(base_depth=depth, semantic_tokens=size, **STARTS[start])[0])
        for depth in base_depths
        for size in tokens
        for start in starts
    ]
    scores = _scores([dense, *(model for *_, model in variants)], task, loader, device)
    whole = multiply_adds(dense, **clip)
    best = scores[0].argmax(-1, keepdim=True)
    rows = [_row("dense", None, "", scores[0], best, 1.0)]
    for (depth, size, start, model), part in zip(variants, scores[1:], strict=True):
        cost = multiply_adds(model, **clip) / whole
        rows.append(_row(start, depth, "x".join(map(str, size)), part, best, cost))
    draw_conversion(rows, output / "convert.png")
    return rows


def _row(start: str, depth: int | None, tokens: str, scores: Tensor, best: Tensor, cost: float) -> dict:
    kept = (scores.argmax(-1, keepdim=True) == best).double().mean().item()
    probability = scores.gather(-1, best).double().mean().item()
    return {
        **{"start": start, "base depth": depth, "tokens": tokens},
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
    models: Sequence[nn.Module], task: Task, loader: DataLoader, device: torch.device
) -> list[Tensor]:
    """Of each model (N, K), on the CPU."""
    models = [model.eval().to(device) for model in models]
    parts = []
    for batch in tqdm(loader, desc="scoring", unit="batch"):
        if batch.failures:
            raise InputError(f"{batch.failures[0][1]}: to compare models, all must be readable")
        clips = batch.clips.to(device)
        parts.append([task.view_scores(model, clips)[:, 0].cpu() for model in models])
    return [torch.cat(part) for part in zip(*parts, strict=True)]
