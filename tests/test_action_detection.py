"""Who does what: key frames, boxes that move with the pixels, frame mAP, and all of it by commands."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import finish, launch
from test_end_to_end import assert_same_runs, figures, run, train_in_two

from stvit_video import build, cli, create_model
from stvit_video.cli import actions
from stvit_video.config import make_parser, parse, resolve
from stvit_video.data import ava, demo_movers, sampling
from stvit_video.data.annotations import read_rows
from stvit_video.data.batch import Batch, Sample, collate
from stvit_video.data.dataset import open_kept
from stvit_video.data.decode import open_video
from stvit_video.data.key_frames import KeyFrame, KeyFrameViews, Resized
from stvit_video.data.rows import Row, class_ids
from stvit_video.data.transforms import Normalise, TrainTransform
from stvit_video.data.views import Sampling
from stvit_video.engine.job import Outcome
from stvit_video.errors import DecodeError, InputError, ListError
from stvit_video.figures import draw_boxes
from stvit_video.tasks import ActionScoring
from stvit_video.tasks.action_detection import ActionDetection
from stvit_video.tasks.frame_map import DETECTIONS, Detections, average_precision, detections, hits

NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL = """
device: cpu
task: action_detection
model: {name: stvit_tiny_patch16_224, patch_size: [2, 8, 8], embed_dim: 24, depth: 4, num_heads: 2,
  base_depth: 1, semantic_tokens: [2, 2, 2], drop_path: 0.1, dropout: 0.1}
data: {preset: demo, num_frames: 4, stride: 2, image_size: 24, scale: [0.5, 1.0], workers: 0, repeats: 2}
train: {epochs: 2, batch_size: 4, accumulate: 2, lr: 1e-3, lr_per: 8, warmup_epochs: 1, clip_grad: 1.0,
  ema: 0.9, layer_decay: 0.8, log_every: 1}
eval: {clips: 1, crops: 1, batch_size: 3, view_batch: 2}
"""


def task(classes=4, **scoring):
    on_failure = scoring.pop("on_failure", "wrong")
    names = [f"c{i}" for i in range(1, classes + 1)]
    return ActionDetection(
        names, normalise=NORMALISE, scoring=ActionScoring(**scoring), on_failure=on_failure
    )


# --- frame mAP ------------------------------------------------------------------------------------


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def frame_map_by_hand(frames, classes):
    """frames: (detections [(box, class, score)], truths [(box, classes)]) of each key frame -> AP by class.

    Written out as the protocol says it: each frame's 50 best, class by class, over all recalls.
    """
    values = []
    for c in classes:
        ranked, total = [], 0
        for found, truths in frames:
            best = sorted(found, key=lambda d: -d[2])[:DETECTIONS]
            boxes = [box for box, actions in truths if c in actions]
            total, seen = total + len(boxes), set()
            for box, _, score in [d for d in best if d[1] == c]:
                shares = [overlap(box, other) for other in boxes]
                at = shares.index(max(shares)) if shares else None
                right = at is not None and shares[at] >= 0.5 and at not in seen
                seen |= {at} if right else set()
                ranked.append((score, right))
        ranked.sort(key=lambda each: -each[0])
        if not total:
            values.append(None)
            continue
        points = []  # (recall, precision) after each detection
        for n in range(1, len(ranked) + 1):
            true = sum(right for _, right in ranked[:n])
            points.append((true / total, true / n))
        value, before = 0.0, 0.0
        for recall in sorted({recall for recall, _ in points if recall}):
            value += (recall - before) * max(p for r, p in points if r >= recall)
            before = recall
        values.append(value)
    return values


def random_set(rng, classes, frames):
    """Rows and records: boxes near each other on a coarse grid, scores with many ties, missing actions."""
    rows, records = [], []
    for i in range(frames):
        corners = rng.integers(0, 6, (rng.integers(1, 5), 2)) / 10
        boxes = tuple((float(x), float(y), float(x) + 0.4, float(y) + 0.4) for x, y in corners)
        actions = tuple(tuple(np.flatnonzero(rng.random(classes - 1) < 0.4).tolist()) for _ in boxes)
        rows.append(Row(f"{i}.mp4", KeyFrame(f"v{i % 3}", float(i), boxes, actions)))
        n = int(rng.integers(0, 6))
        people = np.array([boxes[rng.integers(len(boxes))] for _ in range(n)]).reshape(-1, 4)
        people = people + rng.integers(-1, 2, people.shape) / 20
        scores = torch.tensor(rng.integers(0, 8, (n, classes)) / 8, dtype=torch.float32)
        records.append({"boxes": torch.from_numpy(people), "scores": scores, "frame": 0})
    return rows, records


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("on_failure", ["wrong", "exclude"])
def test_frame_map_is_that_of_a_loop(seed, on_failure, tmp_path):
    """With ties, doubles, a class never true, one that does not count, excluded and unreadable ones."""
    rows, records = random_set(np.random.default_rng(seed), 5, 30)
    (tmp_path / "excluded.csv").write_text("v0,0003\nv2,5\nv1,0002\n")  # the last is no key frame
    (tmp_path / "counted.pbtxt").write_text(
        "".join(f'item {{\n  name: "c{i}"\n  id: {i}\n}}\n' for i in (1, 3, 4, 5))
    )
    records[7], failures = None, {7: "gone"}
    judge = task(
        5,
        excluded=f"{tmp_path}/excluded.csv",
        scored_classes=f"{tmp_path}/counted.pbtxt",
        on_failure=on_failure,
    )
    outcome = Outcome(rows, records, failures)
    frames = []
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        if row.target.at in {("v0", 3.0), ("v2", 5.0)} or (on_failure == "exclude" and i == 7):
            continue
        found = []
        for box, scores in (
            [] if record is None else zip(record["boxes"].tolist(), record["scores"], strict=True)
        ):
            found += [(box, c, float(scores[c])) for c in (0, 2, 3, 4)]
        frames.append((found, list(zip(row.target.boxes, row.target.actions, strict=True))))
    expected = frame_map_by_hand(frames, range(5))
    expected[1] = None  # does not count
    values, _ = judge.by_class(outcome)
    assert values[4] is None
    assert values == [None if value is None else pytest.approx(value) for value in expected]
    known = [value for value in expected if value is not None]
    assert judge.figures(outcome)["mAP"] == pytest.approx(sum(known) / len(known))
    assert 0.02 < judge.figures(outcome)["mAP"] < 0.9


def test_frame_map_of_what_can_be_said_by_heart():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    perfect = {"boxes": torch.from_numpy(boxes), "scores": torch.eye(2), "frame": 0}
    rows = [Row("a.mp4", KeyFrame("a", 1.0, tuple(map(tuple, boxes.tolist())), ((0,), (1,))))]
    assert task(2).figures(Outcome(rows, [perfect], {})) == {"mAP": 1.0}
    swapped = perfect | {"scores": torch.eye(2).flip(0)}
    assert task(2).figures(Outcome(rows, [swapped], {})) == {"mAP": 0.5}  # found second of two
    assert task(2).figures(Outcome(rows, [None], {0: "gone"})) == {"mAP": 0.0}
    nothing = [Row("a.mp4", KeyFrame("a", 1.0))]
    assert task(2).figures(Outcome(nothing, [None], {0: "gone"})) == {"mAP": None}
    nan = perfect | {"scores": torch.full((2, 2), float("nan"))}
    with pytest.raises(InputError, match="no numbers"):
        task(2).figures(Outcome(rows, [nan], {}))
    assert (
        average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 2) == 0.5 + 0.5 * 2 / 3
    )


def test_a_true_action_is_found_once_and_by_half_of_a_box():
    truth = np.array([[0.0, 0, 1, 1]])
    boxes = np.array([[0, 0, 1, 0.5], [0.0, 0, 1, 1], [0, 0, 1, 0.49]])
    found = Detections(boxes, np.zeros(3, int), np.array([0.9, 0.8, 0.7]))
    assert hits(found, truth, [(0,)]).tolist() == [True, False, False]  # half counts, twice does not
    assert hits(found, truth, [(1,)]).tolist() == [False] * 3


def test_of_a_key_frame_the_fifty_best_count():
    scores = np.arange(60, dtype=float).reshape(20, 3)
    best = detections(np.zeros((20, 4)), scores, [0, 1, 2])
    assert best.scores.tolist() == list(range(59, 9, -1))
    assert best.classes[:3].tolist() == [2, 1, 0]
    assert detections(np.zeros((0, 4)), np.zeros((0, 3)), [0, 1]).boxes.shape == (0, 4)


# --- lists ----------------------------------------------------------------------------------------

LABELS = 'item {\n  name: "stand"\n  id: 1\n}\nlabel {\n  name: "run \\"fast\\""\n  label_id: 3\n}\n'


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "labels.pbtxt").write_text(LABELS)
    (tmp_path / "b.webm").write_bytes(b"")

    def read(text, **options):
        (tmp_path / "train.csv").write_text(text)
        return read_rows(
            tmp_path / "train.csv", **{"root": tmp_path, "labels": tmp_path / "labels.pbtxt"} | options
        )

    return read


def test_ava_lists_become_key_frames(lists, tmp_path):
    rows = lists(
        "b,0902,0.1,0.2,0.5,0.6,3,7\nb,902,0.1,0.2,0.5,0.6,1,7\nb,0902,0.1,0.2,0.5,0.6,1,8\n"
        "a,0903,0.077,0.151,0.283,0.811,1,0\nb,0903,0,0,1,1,-1,0\n\n"
    )
    box = (0.1, 0.2, 0.5, 0.6)
    first = KeyFrame("b", 902.0, (box, box), ((0, 2), (0,)))
    assert [row.target for row in rows] == [
        first,
        KeyFrame("a", 903.0, ((0.077, 0.151, 0.283, 0.811),), ((0,),)),
        KeyFrame("b", 903.0, ((0.0, 0.0, 1.0, 1.0),), ((),)),
    ]
    assert [row.path for row in rows] == [f"{tmp_path}/{name}" for name in ("b.webm", "a.mp4", "b.webm")]
    assert rows.class_names == ["stand", "2", 'run \\"fast\\"']
    assert class_ids(first) == (0, 2)
    assert eval(repr(first)) == first  # all of it is in the digest of a list
    assert lists("b,0902\nb,0903\n", format="ava")[1].target == KeyFrame("b", 903.0)
    named = lists("b,0902,0.1,0.2,0.5,0.6,2,7\n", labels=None, class_names=["sit", "walk"])
    assert (named[0].target.actions, named.class_names) == (((1,),), ["sit", "walk"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b,0902,0.1,0.2,0.5,1.6,3,7", "box 0.1,0.2,0.5,1.6, expected x1,y1,x2,y2 from 0 to 1"),
        ("b,0902,0.5,0.2,0.1,0.6,3,7", "box 0.5,0.2,0.1,0.6, expected x1,y1,x2,y2 from 0 to 1"),
        ("b,0902,0.1,nan,0.5,0.6,3,7", "box 0.1,nan,0.5,0.6, expected"),
        ("b,soon,0.1,0.2,0.5,0.6,3,7", "second 'soon', expected a number"),
        ("b,0902,0.1,0.2,0.5,0.6,2,7", "action '2', expected an id of the 2 in the label map"),
        ("b,0902,0.1,0.2,0.5,0.6,run,7", "action 'run', expected an id"),
        ("b,0902,0.1,0.2,0.5", "5 columns, expected video,second,x1,y1,x2,y2,action"),
    ],
)
def test_a_bad_line_of_an_ava_list_is_named(lists, line, message):
    with pytest.raises(ListError, match=re.escape(message)) as error:
        lists(f"b,0902,0.1,0.2,0.5,0.6,3,7\n{line}\n")
    assert "train.csv:2: found" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_an_ava_list_lacks_is_named(lists, tmp_path):
    line = "b,0902,0.1,0.2,0.5,0.6,1,7\n"
    with pytest.raises(ListError, match=r"expected a video root for it \(data.root\)"):
        lists(line, root=None)
    with pytest.raises(ListError, match=r"expected its label map \(data.labels\) or data.class_names"):
        lists(line, labels=None)
    for text, message in (
        ("", "no classes"),
        ("  id: 1\n", "a name before it"),
        (LABELS + LABELS, "a new id"),
    ):
        (tmp_path / "labels.pbtxt").write_text(text)
        with pytest.raises(ListError, match=message):
            lists(line)


def test_lists_of_other_kinds_are_not_taken_for_ava(tmp_path):
    for line in ("a.mp4 1,2,3,4,5,6,7", "a.mp4,1", "a,b,c,d,e,f,g", "v,1,0,0,1,1,1"):
        assert not ava.is_ava(line)


def test_proposals_are_read_in_both_forms_and_by_score(tmp_path):
    file = tmp_path / "people.csv"
    file.write_text(
        "a,0902,0.1,0.2,0.5,0.6,0.9\na,0902,0,0,1,1,,0.95\na,0902,0,0,1,1,12,0.85\na,903,0,0,1,1,,0.79\n"
    )
    people = ava.read_people(file, 0.8)
    assert list(people) == [("a", 902.0)]
    boxes, scores = people["a", 902.0]
    assert boxes.tolist() == [[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1]]
    assert scores.tolist() == [0.9, 0.95]
    for line, message in (
        ("a,1,0,0,1,1", "6 columns"), ("a,1,0,0,1,1,x", "score 'x'"), ("a,1,0,0,1,2,1", "box 0,0,1,2"),
    ):  # fmt: skip
        file.write_text(line)
        with pytest.raises(ListError, match=message):
            ava.read_people(file, 0.8)
    with pytest.raises(ListError, match=r"no\.csv: found"):
        ava.read_people(tmp_path / "no.csv", 0.8)


# --- clips and boxes ------------------------------------------------------------------------------


class Numbered:
    """A video whose frame i is full of i, with a white box from (8, 4) to (24, 16) in 48 x 32."""

    path, num_frames, fps = "numbered.mp4", 100, 10.0

    def read(self, indices, short_side=None):
        frames = torch.zeros(len(indices), 3, 32, 48, dtype=torch.uint8)
        frames[:, 0] = torch.tensor(indices)[:, None, None]
        frames[:, 1, 4:16, 8:24] = 255
        return frames


KEY = KeyFrame("numbered", 903.0, ((8 / 48, 4 / 32, 24 / 48, 16 / 32),), ((1,),))


def views(transform, *, stride=2, frames=4, target_fps=None, judge=None, **options):
    judge = judge or task()
    return KeyFrameViews(Sampling("dense", frames, stride, target_fps), transform, judge._truth, **options)


@pytest.mark.parametrize(
    ("second", "first", "fps", "frames"),
    [
        (903.0, 900, None, [26, 28, 30, 32]),  # second 3 of the file is frame 30, the third of four
        (903.0, 902.9, None, [0, 0, 1, 3]),
        (9.9, 0, None, [95, 97, 99, 99]),
        (3.0, 0, 5.0, [22, 26, 30, 34]),  # every second frame at 5 a second is every fourth at 10
    ],
)
def test_a_clip_lies_around_its_key_frame(second, first, fps, frames):
    cut = views(Resized([32]), first_second=first, target_fps=fps)
    clips, (target,) = cut(Numbered(), KEY._replace(second=second))
    assert clips[0, 0, :, 0, 0].tolist() == frames
    assert target["frame"] == frames[2]


def test_clips_lie_as_slowfasts_do():
    """`get_sequence`: from the centre less half the span, every stride-th, clamped."""
    for centre, stride, frames, total in (
        (50, 4, 16, 200),
        (3, 4, 16, 200),
        (190, 2, 32, 200),
        (7, 5, 4, 30),
    ):
        span = stride * frames
        theirs = [min(max(i, 0), total - 1) for i in range(centre - span // 2, centre + span // 2, stride)]
        assert sampling.around(total, frames, stride, centre) == theirs


@pytest.mark.parametrize("second", [899.0, 910.0, 1e6])
def test_a_second_beyond_the_video_is_named(second):
    cut = views(Resized([32]), first_second=900)
    with pytest.raises(DecodeError, match=r"second \S+ is outside the video, which has seconds 900 to 910"):
        cut(Numbered(), KEY._replace(second=second))


def test_images_have_no_times():
    folder = Numbered()
    folder.fps = 0.0
    with pytest.raises(InputError, match="data.target_fps"):
        views(Resized([32]))(folder, KEY._replace(second=3))
    clips, _ = views(Resized([32]), target_fps=10)(folder, KEY._replace(second=3))
    assert clips[0, 0, 2, 0, 0] == 30


def white(clip):
    """The box of what is white in a clip (3, T, H, W)."""
    rows, columns = (clip[1, 0] > 127).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def test_boxes_follow_crop_and_flip_exactly():
    moved = set()
    for seed in range(30):
        torch.manual_seed(seed)
        cut = views(TrainTransform(64, scale=(0.5, 1.0), flip=True), repeats=2)
        clips, targets = cut(Numbered(), KEY._replace(second=3.0))
        for clip, target in zip(clips, targets, strict=True):
            assert target["actions"].tolist() == [[0, 1, 0, 0]] * len(target["boxes"])
            for box in target["boxes"].tolist():
                assert box == pytest.approx(white(clip), abs=1.0)  # edges are rounded to pixels
                moved.add(tuple(np.round(box, 3)))
    assert len(moved) > 50


def test_mirroring_mirrors_box_and_action():
    judge = task()
    judge.twins = [1, 0, 2, 3]
    transform = TrainTransform(32, scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=True, mirror=judge.mirror)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        _, (target,) = views(transform, judge=judge)(Numbered(), KEY._replace(second=3.0))
        (box,), (actions,) = target["boxes"].tolist(), target["actions"].tolist()
        left = 8 * 32 / 48
        expected = {False: [left, 4, 3 * left, 16], True: [32 - 3 * left, 4, 32 - left, 16]}[
            actions[0] == 1
        ]
        assert box == pytest.approx(expected, abs=1e-4)
        seen.add(actions[0])
    assert seen == {0.0, 1.0}


def test_a_box_that_a_crop_leaves_out_is_gone():
    class LowerHalf:
        def __call__(self, frames, target):
            from torchvision.transforms import v2

            return frames[..., 16:, :], target | {
                "boxes": v2.functional.crop(target["boxes"], 16, 0, 16, 48)
            }

    key = KEY._replace(second=3.0, boxes=(*KEY.boxes, (0, 0.4, 1, 1)), actions=((1,), (2,)))
    _, (target,) = views(LowerHalf())(Numbered(), key)
    assert target["actions"].tolist() == [[0, 0, 1, 0]]
    assert target["boxes"].tolist() == [[0, 0, 48, 16]]


def test_scoring_sees_all_of_a_frame():
    for size, shape, box in (([24, 24], (24, 24), [4, 3, 12, 12]), ([16], (16, 24), [4, 2, 12, 8])):
        clips, (target,) = views(Resized(size))(Numbered(), KEY._replace(second=3.0))
        assert clips.shape == (1, 3, 4, *shape)
        assert target["boxes"].tolist() == [pytest.approx(box, abs=1e-4)]


# --- the head -------------------------------------------------------------------------------------

SIZES = {
    "vit_tiny_patch16_224": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "stvit_tiny_patch16_224": {
        "embed_dim": 24, "depth": 4, "num_heads": 2, "base_depth": 1, "semantic_tokens": (2, 2, 2),
    },
    "video_swin_tiny": {
        "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2], "window_size": (2, 3, 3),
    },
    "stvit_video_swin_tiny": {
        "embed_dim": 8, "depths": [1, 1, 4, 1], "num_heads": [1, 2, 2, 2], "window_size": (2, 3, 3),
        "semantic_tokens": (2, 2, 2), "base_depth": 1,
    },
    "stvit_r_video_swin_small": {
        "embed_dim": 8, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 2, 2], "window_size": (2, 3, 3),
        "semantic_tokens": (2, 2, 2),
    },
}  # fmt: skip


def detector(name, **more):
    return create_model(
        name, num_classes=5, num_frames=4, image_size=64, head="actions", **SIZES[name] | more
    )


@pytest.mark.parametrize("name", SIZES)
def test_every_kind_of_backbone_carries_the_head(name):
    model = detector(name)
    assert all(key.startswith(("backbone.", "head.")) for key in model.state_dict())
    clips = torch.randn(3, 3, 4, 64, 64)
    boxes = [
        torch.tensor([[0.0, 0, 64, 64], [3, 5, 20, 40]]),
        torch.zeros(0, 4),
        torch.tensor([[30.0, 1, 60, 33]]),
    ]
    logits = model(clips, boxes)
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # a bias of all keys alike changes no attention, and one before a mean that a norm takes away is gone
    assert not [key for key in missing if not key.endswith("bias")]
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    model.eval()
    alone = model(clips[2:], boxes[2:])
    torch.testing.assert_close(alone, model(clips, boxes)[2:])
    again = create_model(**model.built)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(clips[2:], boxes[2:]), alone)


def test_a_video_swin_takes_frames_of_any_shape():
    model = detector("video_swin_tiny").eval()
    assert model(torch.randn(1, 3, 4, 64, 96), [torch.tensor([[0.0, 0, 90, 60]])]).shape == (1, 5)


def training_batch(boxes, actions, size=64):
    clips = torch.zeros(len(boxes), 1, 3, 4, size, size, dtype=torch.uint8)
    return Batch(torch.arange(len(boxes)), clips, {"boxes": boxes, "actions": actions})


def test_clips_of_any_shape_are_scored_as_they_are_alone():
    """Frames that keep their shape come as a list; key frames without boxes have no scores."""
    model, judge = detector("video_swin_tiny").eval(), task(5)
    samples = []
    for i, (height, width, count) in enumerate(((64, 96, 2), (64, 48, 0), (80, 64, 1))):
        shares = torch.tensor([[0.1, 0.2, 0.8, 0.9], [0.0, 0.0, 1.0, 0.5]], dtype=torch.float64)[:count]
        target = {
            "boxes": (shares * torch.tensor([width, height] * 2)).float(),
            "shares": shares,
            "frame": i,
        }
        clip = torch.randint(0, 255, (1, 3, 4, height, width), dtype=torch.uint8)
        samples.append(Sample(i, clip, [target], []))
    together = judge.records(model, collate(samples))
    for i, (sample, record) in enumerate(zip(samples, together, strict=True)):
        (alone,) = judge.records(model, collate([sample]))
        assert (record["frame"], record["scores"].shape) == (i, ((2, 0, 1)[i], 5))
        torch.testing.assert_close(record["scores"], alone["scores"])
        assert torch.equal(record["boxes"], sample.targets[0]["shares"])


def test_what_cannot_be_scored_is_named():
    with pytest.raises(InputError, match="a video without key frames .*: the list must be an AVA csv"):
        task(5).encode(None)
    shaped = task(5, keep_shape=True)
    with pytest.raises(InputError, match=r"eval.keep_shape=true: the model takes frames of \(64, 64\)"):
        shaped.records(detector("vit_tiny_patch16_224"), None)


def test_a_batch_without_boxes_has_no_gradient_and_no_error():
    model = detector("vit_tiny_patch16_224")
    loss = task(5).loss(model, training_batch(torch.zeros(2, 1, 0, 4), torch.zeros(2, 1, 0, 5)))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_box_has_the_features_that_lie_in_it():
    """Of a constant grid that constant, and of two halves those of its own; mean over time."""
    model = detector("vit_tiny_patch16_224")
    model.head = torch.nn.Identity()
    grid = torch.randn(24).expand(1, 2, 4, 4, 24).clone()
    model.features = lambda x: grid
    whole = torch.tensor([[0.0, 0, 64, 64], [17, 5, 40, 60]])
    clip = torch.zeros(1, 3, 4, 64, 64)
    torch.testing.assert_close(model(clip, [whole]), grid[0, 0, :2, 0])
    grid[:, :, :, 2:] += 7  # the right half
    grid[:, 1] += 2
    halves = torch.tensor([[0.0, 0, 24, 64], [40, 0, 64, 64]])
    torch.testing.assert_close(model(clip, [halves]), grid[0, :, 0, 0::3].mean(0))


@pytest.mark.parametrize("name", [name for name in SIZES if "swin" in name])
def test_padding_of_a_frame_moves_no_box(name):
    """A cell is as many pixels of a frame that fills no whole cells and windows as of one that does."""
    model = detector(name)
    model.head = torch.nn.Identity()
    grid = torch.randn(1, 2, 4, 4, 24)
    model.features = lambda x: grid
    boxes = [torch.tensor([[0.0, 0, 90, 90], [70, 30, 95, 60]])]
    padded = model(torch.zeros(1, 3, 4, 100, 100), boxes)
    assert torch.equal(padded, model(torch.zeros(1, 3, 4, 192, 192), boxes))
    cell = 48 if name.startswith("stvit_video") else 32  # windows of 3 become 2 tokens, before merging
    assert model._strides((100, 100)) == [cell, cell]


def test_the_head_needs_a_grid_over_space_and_time():
    for name in ("ptv_x3d_m", "stvit_r_det_swin_small"):
        with pytest.raises(ValueError, match="has no grid over space and time|cannot go without its head"):
            create_model(name, num_classes=5, num_frames=1, head="actions")


def test_the_loss_is_a_yes_or_no_for_each_action():
    judge, logits = task(3), torch.tensor([[0.0, 2, -1], [1, 0, 0]])
    actions = [[torch.tensor([[0.0, 1, 0]])], [torch.tensor([[1.0, 0, 1]])]]
    batch = training_batch([[torch.zeros(1, 4)]] * 2, actions, size=2)
    loss = judge.loss(lambda clips, boxes: logits, batch)["loss"].item()
    p, t = 1 / (1 + np.exp(-logits.numpy())), np.array([[0, 1, 0], [1, 0, 1]])
    assert loss == pytest.approx(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(), rel=1e-5)
    with pytest.raises(InputError, match="list.csv: b.mp4 is no key frame"):
        judge.check([Row("a.mp4", KEY), Row("b.mp4", 3)], "list.csv")


# --- through the commands -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def movers(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "demo_movers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_movers, "SETTINGS", demo_movers.SETTINGS | {"train": 5, "test": 4})
        demo_movers.prepare_movers(root, workers=1)
        yield root


@pytest.fixture(scope="module")
def args(movers, tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "small.yaml"
    path.write_text(SMALL)
    files = {"train": "train.csv", "val": "test.csv", "root": "videos", "labels": "labels.pbtxt"}
    return ["--cfg", str(path), *(f"--data.{key}={movers}/{name}" for key, name in files.items())]


@pytest.fixture(scope="module")
def trained(args, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    assert run(cli.train, *args, f"--output={output}") == 0
    return output


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def scored(folder):
    """report.json without the time it took; the lines of predictions.csv."""
    report = json.loads((folder / "report.json").read_text())
    return report | {"seconds": 0}, lines_of(folder / "predictions.csv")


def test_a_run_that_is_resumed_ends_as_if_unbroken(args, trained, tmp_path, monkeypatch):
    train_in_two(args, tmp_path / "run", monkeypatch)
    assert_same_runs(trained, tmp_path / "run")


def test_one_two_and_three_ranks_score_alike_and_as_predictions_say(args, trained, movers, tmp_path):
    given = [*args, f"--checkpoint={trained}/best.pt"]
    assert run(cli.test, *given, f"--output={tmp_path}/1") == 0
    alone = [*given, "--eval.view_batch=1"]  # else sums of other batches are rounded otherwise
    assert run(cli.test, *alone, f"--output={tmp_path}/alone1") == 0
    for ranks in (2, 3):
        log = tmp_path / f"{ranks}.txt"
        started = launch(cli.test, *alone, f"--output={tmp_path}/alone{ranks}", ranks=ranks, log=log)
        assert finish(started) == [0] * ranks, log.read_text()
    one, two, three = (scored(tmp_path / f"alone{ranks}") for ranks in (1, 2, 3))
    assert one == two == three
    report, lines = scored(tmp_path / "1")
    assert report["num_videos"] == 20
    assert len({tuple(line[:7]) for line in lines}) == len(lines)
    assert report["mAP"] == pytest.approx(one[0]["mAP"], abs=1e-3)
    frames = {}
    for video, second, *box, action, _ in lines_of(movers / "test.csv"):
        frames.setdefault((video, second), ([], {}))[1].setdefault(tuple(map(float, box)), []).append(
            int(action)
        )
    for video, second, *box, action, score in lines:
        frames[video, second][0].append((tuple(map(float, box)), int(action), float(score)))
    values = frame_map_by_hand(
        [(found, list(truths.items())) for found, truths in frames.values()], range(1, 9)
    )
    values = [value for value in values if value is not None]
    assert report["mAP"] == pytest.approx(sum(values) / len(values), abs=1e-9)
    best = [entry["val_mAP"] for entry in figures(trained) if entry["kind"] == "epoch"]
    assert report["mAP"] == pytest.approx(max(best))  # a checkpoint that is scored again
    classes = lines_of(tmp_path / "1" / "classes.csv")[1:]
    assert [row[0] for row in classes] == [str(i) for i in range(1, 9)]
    assert (tmp_path / "1" / "key_frames.png").stat().st_size > 1000


def test_proposals_take_the_place_of_true_boxes(args, trained, movers, tmp_path):
    """The true boxes as proposals score as they do; without any, nothing is found."""
    lines = [line.split(",") for line in (movers / "test.csv").read_text().split()]
    rows = dict.fromkeys(",".join([*line[:6], "", "0.9"]) for line in lines)
    (tmp_path / "people.csv").write_text("\n".join(rows) + "\n")
    given = [*args, f"--checkpoint={trained}/best.pt"]
    for name, more in (
        ("true", []),
        ("same", [f"--eval.proposals={tmp_path}/people.csv"]),
        ("none", [f"--eval.proposals={tmp_path}/people.csv", "--eval.proposal_score=0.95"]),
    ):
        assert run(cli.test, *given, *more, f"--output={tmp_path}/{name}") == 0
    (true, lines), (same, same_lines), (none, no_lines) = (
        scored(tmp_path / name) for name in ("true", "same", "none")
    )
    assert same == true
    assert same_lines == lines
    assert (none["mAP"], no_lines) == (0.0, [])


def test_videos_that_are_kept_are_kept_once(movers, args):
    config, _ = parse(make_parser(""), [*args, "--data.keep=true", "--data.timeout=null"])
    config = resolve(config)
    rows, names = build.read_split(config, "train")
    judge = build.build_task(config, names)
    data = build.build_train_loader(config, judge, rows, torch.device("cpu")).dataset
    open_kept.cache_clear()
    for index in range(10):  # five key frames of each of two videos
        data[0, index]
    assert open_kept.cache_info().currsize == len({row.path for row in rows[:10]}) == 2
    open_kept.cache_clear()


def test_a_missing_video_is_counted_and_named(args, trained, movers, tmp_path, capsys):
    text = (
        movers / "test.csv"
    ).read_text() + "gone,0001,0.1,0.1,0.5,0.5,1,0\ntest_0000,0009,0.1,0.1,0.5,0.5,1,0\n"
    (tmp_path / "test.csv").write_text(text)
    given = [
        *args,
        f"--data.test={tmp_path}/test.csv",
        f"--checkpoint={trained}/best.pt",
        "--data.preset=custom",
    ]
    given = [*given, "--data.flip=swap"]
    assert run(cli.test, *given, f"--output={tmp_path}/out") == 0
    assert "22 key frames x 1x1 views, 2 unreadable" in capsys.readouterr().out
    assert scored(tmp_path / "out")[0]["num_failed"] == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.sampling=middle", "clips lie around key frames: dense"),
        ("--eval.clips=2", "a key frame has one view"),
        ("--eval.proposals=no.csv", "no.csv: found"),
        ("--data.augment_on=device", "boxes move with the pixels"),
        ("--model.head=null", "task=action_detection has actions"),
    ],
)
def test_settings_that_make_no_sense_are_named(args, flag, message):
    config, _ = parse(make_parser(""), [*args, flag])
    config = resolve(config)

    def prepare():
        rows, names = build.read_split(config, "train")
        build.build_model(config, len(names))
        judge = build.build_task(config, names)
        build.build_train_loader(config, judge, rows, torch.device("cpu"))
        build.build_test_views(config, judge, config.eval.clips, config.eval.crops)

    with pytest.raises(InputError, match=message):
        prepare()


# --- the movers -----------------------------------------------------------------------------------


def test_movers_act_in_their_boxes():
    frames, boxes, actions = demo_movers.render(np.random.default_rng(4))
    again = demo_movers.render(np.random.default_rng(4))
    assert np.array_equal(frames, again[0])
    assert len(boxes) == len(actions)
    assert frames.shape == (48, 64, 64, 3)
    assert boxes.shape[1:] == (48, 4)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    wide = np.diff(boxes[..., 0::2], axis=-1)[..., 0]
    for person, doing in enumerate(actions):
        for second in range(1, 6):
            alone = doing[second] in (("grow",), ("shrink",))
            steps = np.diff(wide[person, 8 * second - 4 : 8 * second + 4])
            if alone:  # but for where it starts anew
                assert np.median(np.sign(steps)) in ((1, 0) if doing[second] == ("grow",) else (-1, 0))


def test_one_frame_says_nothing_of_the_action():
    """Mean place and size of a box at its key frame are alike, whatever is done."""
    values = {name: [] for name in demo_movers.CLASSES}
    for seed in range(30):
        _, boxes, actions = demo_movers.render(np.random.default_rng(seed))
        for person, doing in enumerate(actions):
            for second in range(1, 6):
                x1, y1, x2, y2 = boxes[person, 8 * second]
                for name in doing[second]:
                    values[name].append([(x1 + x2) / 2 % 0.5, (y1 + y2) / 2 % 0.5, x2 - x1, y2 - y1])
    means = np.array([np.mean(rows, 0) for rows in values.values()])
    assert (np.ptp(means, axis=0) < 0.05).all()


# --- predict -------------------------------------------------------------------------------------


class Finder(torch.nn.Module):
    """A detector that sees a person in the left half of a frame, a car, and a person it is not sure of."""

    def forward(self, images):
        height, width = images[0].shape[1:]
        boxes = torch.tensor([[0.0, 0, width / 2, height], [0, 0, width, height], [0, 0, 9, 9]])
        return [
            {"boxes": boxes, "labels": torch.tensor([1, 3, 1]), "scores": torch.tensor([0.9, 0.99, 0.5])}
        ]


def shown(path):
    with open_video(path) as video:
        return video.num_frames, video.fps, tuple(video.read([8, 9]).shape[1:])


def same_list(movers):
    """What a checkpoint is scored on, in the settings of the movers."""
    files = {"test": "test.csv", "root": "videos", "labels": "labels.pbtxt"}
    more = ["--device=cpu", "--data.workers=0", "--eval.clips=1", "--eval.crops=1", "--data.preset=demo"]
    return [*(f"--data.{key}={movers}/{name}" for key, name in files.items()), *more]


def test_predict_writes_who_does_what(trained, movers, tmp_path, monkeypatch, capsys):
    given = [f"--checkpoint={trained}/best.pt", "--device=cpu", "--workers=1", f"--actions={tmp_path}/out"]
    video = movers / "videos" / "test_0001.mp4"
    people = [
        ",".join([*line[:6], "", "1"]) + "\n"
        for line in lines_of(movers / "test.csv")
        if line[0] == "test_0001"
    ]
    (tmp_path / "people.csv").write_text("".join(people))
    assert run(cli.predict, video, *given, f"--proposals={tmp_path}/people.csv") == 0
    assert (
        run(cli.test, f"--checkpoint={trained}/best.pt", *same_list(movers), f"--output={tmp_path}/scored")
        == 0
    )
    written = {tuple(line[:7]): float(line[7]) for line in lines_of(tmp_path / "out" / "test_0001.csv")}
    wanted = {
        tuple(line[:7]): float(line[7]) for line in scored(tmp_path / "scored")[1] if line[0] == "test_0001"
    }
    assert written == {key: pytest.approx(value, abs=1e-5) for key, value in wanted.items()}
    assert len(written) == len(set(people)) * 8
    assert shown(tmp_path / "out" / "test_0001.mp4") == (48, 8.0, (3, 192, 192))

    monkeypatch.setattr(actions, "read_detector", lambda path: Finder())
    gone = tmp_path / "gone.mp4"
    assert run(cli.predict, video, gone, *given, "--detector=weights.pt", "--every=2") == 1
    lines = lines_of(tmp_path / "out" / "test_0001.csv")
    assert {tuple(line[:6]) for line in lines} == {
        ("test_0001", second, "0.0", "0.0", "0.5", "1.0") for second in ("0002", "0004")
    }
    assert "gone.mp4: no such file" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.part"))


def test_people_of_a_video_are_not_those_of_another_of_its_name(trained, tmp_path, monkeypatch):
    seen, found = [], iter([{("x", 1.0): None}, {("x", 2.0): None}])
    monkeypatch.setattr(actions, "read_detector", lambda path: Finder())
    monkeypatch.setattr(actions, "_moments", lambda *_: [])
    monkeypatch.setattr(actions, "find_people", lambda *_: next(found))
    monkeypatch.setattr(actions, "_scored", lambda c, t, m, rows, d: seen.extend(rows) or [])
    monkeypatch.setattr(actions, "_write_drawn", lambda path, target, *_: target.touch())
    options = {"checkpoint": trained / "best.pt", "device": "cpu", "workers": 0, "timeout": None}
    options |= {"every": 1.0, "proposals": None, "detector": "weights.pt"}
    videos = [tmp_path / folder / "x.mp4" for folder in "ab"]
    assert actions.write_actions(videos, tmp_path, SimpleNamespace(**options)) == 0
    assert [(row.path, row.target.second) for row in seen] == [
        (str(video), second) for video, second in zip(videos, (1.0, 2.0), strict=True)
    ]


def test_predict_says_what_it_needs(trained, movers, tmp_path, capsys):
    video = movers / "videos" / "test_0001.mp4"
    given = [video, f"--checkpoint={trained}/best.pt", "--device=cpu"]
    for more, message in (
        ([f"--actions={tmp_path}"], "--actions needs --proposals FILE.csv or --detector FILE"),
        ([f"--actions={tmp_path}", "--proposals=a", "--detector=b"], "one of them"),
        (["--proposals=a"], "--proposals and --detector need --actions"),
        ([f"--actions={tmp_path}", "--proposals=a", "--json"], "--json is not written with --actions"),
        (
            [f"--actions={movers}/videos", f"--proposals={movers}/test.csv"],
            "--actions needs another folder",
        ),
    ):
        assert run(cli.predict, *given, *more) == 2
        assert message in capsys.readouterr().err
    assert run(cli.export, f"--checkpoint={trained}/best.pt", f"--to={tmp_path}/a.onnx") == 2
    assert "only models that name classes are exported" in capsys.readouterr().err
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    assert run(cli.predict, *given, f"--actions={tmp_path}/out", f"--detector={tmp_path}/weights.pt") == 2
    assert "no state dict of torchvision's fasterrcnn_resnet50_fpn" in capsys.readouterr().err


def test_a_record_is_drawn_and_told():
    judge = task(2)
    record = {
        "boxes": torch.tensor([[0.25, 0.5, 0.75, 1.0]], dtype=torch.float64),
        "scores": torch.tensor([[0.7, 0.2]]),
        "frame": 8,
    }
    assert judge.plain(record) == {
        "frame": 8, "boxes": [{"box": [0.25, 0.5, 0.75, 1.0], "actions": {"c1": 0.7, "c2": 0.2}}],
    }  # fmt: skip
    frame = np.zeros((480, 640, 3), np.uint8)
    assert judge.draw(frame, record).shape == frame.shape
    rows, columns = draw_boxes(frame, record["boxes"].numpy(), [""]).any(2).nonzero()
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (160, 480, 240, 479)
    assert judge.draw(frame[::8, ::8], record).shape == (240, 320, 3)  # large enough to be read
    assert not judge.draw(
        frame, record | {"boxes": record["boxes"][:0], "scores": record["scores"][:0]}
    ).any()
