"""Pictures of superpatches: which patches are one token, drawn over the frames."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from test_end_to_end import run
from test_superpatches import half_even, vit

from stvit_video import cli
from stvit_video.figures import BORDER, COLOURS, overlay, palette, show_groups
from stvit_video.tasks.segmentation import Segmentation, as_png

YELLOW = list(ImageColor.getrgb(COLOURS[0]))


@pytest.mark.parametrize("budget", [{}, {"superpatch_tokens": 13}])
def test_the_map_is_that_of_the_tokens_that_the_model_makes(budget):
    model, clips = vit(superpatches="contrast", **budget), half_even()
    groups = model.superpatch_map(clips)
    assert groups.shape == (2, 2, 4, 4)
    assert groups.flatten(1).equal(model.embed(clips).places())
    for clip, grid in zip(groups, model.embed(clips).to_grid(), strict=True):
        for token in clip.unique():  # patches of one token have the same features
            assert (grid[clip == token] == grid[clip == token][0]).all()
    with pytest.raises(ValueError, match="no superpatches"):
        vit().superpatch_map(clips)


def test_chunks_share_no_token():
    stvit = {"name": "stvit_tiny_patch16_224", "semantic_tokens": (2, 2, 2), "base_depth": 2}
    model = vit(**stvit, superpatches="contrast", base_window=1)
    still = torch.zeros(1, 3, 4, 32, 32)
    first, second = model.superpatch_map(still)[0]
    assert len(first.unique()) == len(second.unique()) == 1
    assert first[0, 0] != second[0, 0]


def test_an_outline_goes_around_a_superpatch_and_not_through_it():
    groups = np.array([[0, 0, 1], [0, 0, 2], [3, 4, 4]])
    frame = np.full((240, 240, 3), 100, np.uint8)
    out = show_groups(frame, groups, alone=[1, 2], seen=[4])
    assert out.shape == frame.shape
    yellow = (out == YELLOW).all(-1)
    assert yellow[0, :160].all()
    assert yellow[:160, 159].all()
    assert not yellow[4:156, 4:156].any()  # patches of one token share one outline
    assert yellow[162:238, 0].all()  # alone in this picture, not in the clip
    assert not yellow[:160, 160:].any()
    assert out[80, 200].tolist() == out[79, 200].tolist() == [50] * 3  # between two that are alone
    assert out[40, 200].tolist() == [100] * 3
    assert out[200, 120].tolist() == out[200, 160].tolist() == [33] * 3  # seen before: dark, and one
    assert out[200, 80].tolist() == [c // 3 for c in YELLOW]
    assert show_groups(frame[:48, :48], groups).shape == frame.shape  # lines would hide it


def maps_of(tmp_path, demo_root, *flags):
    from test_page import make_checkpoint

    video = next(demo_root.glob("test/*/*.mp4"))
    made = make_checkpoint(tmp_path / "a.pt", demo_root, *flags)
    code = run(cli.predict, f"--checkpoint={made}", f"--maps={tmp_path}/maps", "--device=cpu", video)
    return code, tmp_path / "maps" / f"{video.stem}.png"


DENSE = ["--model.name=vit_tiny_patch16_224", "--model.semantic_tokens=auto", "--model.base_depth=auto"]
MERGED = ["--model.superpatches=contrast", "--model.superpatch_tokens=9"]


def test_superpatches_are_drawn_with_semantic_tokens_and_without(tmp_path, demo_root):
    heights = {}
    for name, flags in {"both": MERGED, "superpatches": DENSE + MERGED}.items():
        (tmp_path / name).mkdir()
        code, picture = maps_of(tmp_path / name, demo_root, *flags)
        assert code == 0
        heights[name] = Image.open(picture).height
    assert heights["both"] > 1.5 * heights["superpatches"]  # rows of semantic tokens


def test_there_may_be_nothing_to_draw(tmp_path, demo_root, capsys):
    assert maps_of(tmp_path, demo_root, *DENSE)[0] == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("vit_tiny_patch16_224 has no superpatches and no semantic tokens to draw")
    assert len(error.splitlines()) == 1


def test_a_segmenters_drawing_shows_its_superpatches():
    frame, mask = np.full((240, 240, 3), 100, np.uint8), torch.zeros(240, 240, dtype=torch.uint8)
    tokens = torch.zeros(240, 240, dtype=torch.uint8)
    tokens[:, 120], tokens[40:80, 40:80] = BORDER, 1  # two tokens, and an exit
    counts = {"patches": 4, "tokens": torch.tensor([2]), "map": tokens}
    record = {"masks": {0: as_png(mask)}}
    task = Segmentation([str(i) for i in range(len(palette()) - 1)], normalise=None)
    plain = overlay(frame, mask.numpy())
    assert np.array_equal(task.draw(frame, record), plain)
    unmerged = record | {"tokens_of": counts | {"tokens": torch.tensor([4])}}
    assert np.array_equal(task.draw(frame, unmerged), plain)
    drawn = task.draw(frame, record | {"tokens_of": counts})
    assert np.array_equal(drawn[:, 120], plain[:, 120] // 2)
    assert np.array_equal(np.delete(drawn, 120, 1), np.delete(plain, 120, 1))
