"""A file to deploy: each model's exported scores are its own, and a video is recognised without the checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stvit_video import Recognizer, build, create_model, export, list_models
from stvit_video.cli import export as command
from stvit_video.config import Config, DataConfig, ModelConfig, resolve, to_dict
from stvit_video.engine import checkpoint
from stvit_video.errors import InputError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CLASSES = ["grow", "move_left", "move_right"]


def tiny(name):
    """Sizes with which a model of this name is small, and still does all that it does."""
    if name.startswith("ptv_"):
        return {"num_frames": 4, "image_size": 32}
    if "swin" not in name:
        sizes = {"num_frames": 2, "image_size": 24, "patch_size": (1, 8, 8), "embed_dim": 16, "depth": 2}
        if not name.startswith("vit_"):
            sizes |= {"semantic_tokens": (2, 2, 2), "base_depth": 0, "depth": 3}
        return sizes | {"num_heads": 2}
    frames = 4 if "video" in name else 1
    time = frames // 2 or 1
    sizes = {"num_frames": frames, "image_size": 48, "embed_dim": 8, "num_heads": [1, 1, 2, 2]}
    sizes |= {"window_size": (time, 2, 2), "depths": [1, 2, 2, 1]}
    if name.startswith("stvit"):
        sizes |= {"semantic_tokens": (time, 1, 2), "depths": [1, 2, 3, 1]}
        if name.startswith("stvit_r"):
            return sizes | {"depths": [1, 2, 6, 1]}
        return sizes | {"base_depth": 1}
    return sizes


def make(name, task="classification", **sizes):
    """A model whose scores differ from clip to clip, its task, and the settings that make both."""
    sizes = tiny(name) | sizes
    data = {key: sizes.pop(key) for key in ("num_frames", "image_size")}
    config = resolve(
        Config(
            model=ModelConfig(name=name, **sizes), data=DataConfig(preset="demo", **data), task=task
        )
    )
    torch.manual_seed(1)
    model = build.build_model(config, len(CLASSES)).eval()
    task = build.build_task(config, CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not name.startswith("ptv_"):
                parameter.mul_(3)
        head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        logits = model(task.normalise(noise(config)))
        scale = 2 / logits.std(0).max()
        head.weight.mul_(scale)
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    return model, task, config


def noise(config, clips=5):
    size = config.data.image_size
    return torch.randint(256, (clips, 3, config.data.num_frames, size, size), dtype=torch.uint8)


def difference(path, name, precision="fp32", **sizes):
    model, task, config = make(name, **sizes)
    export.write(path, model, task, config, precision=precision)
    clips = noise(config)
    _, names, scores = export.read(path, CPU)
    assert names == CLASSES
    own = task.view_scores(model, clips[None])[0]
    assert own.std(0).max() > 0.1, "the scores say nothing of the clips"
    return max((scores(clips[:n]) - own[:n]).abs().max().item() for n in (1, 3, 5))  # traced with 2


@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", list_models())
def test_sweep(name, kind, tmp_path):
    assert difference(tmp_path / f"model{kind}", name) < 1e-5
