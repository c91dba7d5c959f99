"""Objects in images: lists, the model, its scores, and what is drawn."""

import copy
import json

import av
import numpy as np
import pytest
import torch
from launch import finish, launch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_end_to_end import assert_same_runs, figures, run, train_in_two
from torchvision.models.detection.roi_heads import paste_masks_in_image

from stvit_video import Detector, cli, create_model, read_rows
from stvit_video.config import DataConfig
from stvit_video.data import demo, demo_objects
from stvit_video.data.batch import Sample, collate
from stvit_video.data.objects import Objects, _runs, encode_masks
from stvit_video.data.rows import Row, Rows
from stvit_video.data.transforms import Normalise
from stvit_video.data.views import Sampling
from stvit_video.engine import checkpoint
from stvit_video.engine.job import Outcome
from stvit_video.errors import InputError, ListError
from stvit_video.tasks import detection
from stvit_video.tasks.detection import Detection, Scaled, mirrored
from stvit_video.weights import load_weights

SWIN = {"embed_dim": 8, "depths": [1, 1, 6, 1], "num_heads": [1, 1, 2, 2], "window_size": (1, 4, 4)}
HEAD = {"head_dim": 8, "anchors": (8, 16, 32, 64, 128), "proposals": 30}
VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2}
STVIT = VIT | {"base_depth": 1, "semantic_tokens": (1, 2, 2)}
MODELS = {
    "stvit_r_det_swin_small": SWIN | {"semantic_tokens": (1, 2, 2)},
    "stvit_r_swin_small": SWIN | {"semantic_tokens": (1, 2, 2)},
    "swin_tiny_patch4_window7_224": SWIN,
    "video_swin_tiny": SWIN,
    "vit_tiny_patch16_224": VIT,
    "stvit_tiny_patch16_224": STVIT,
}
SMALL = """
device: cpu
task: detection
model: {name: stvit_r_det_swin_small, embed_dim: 8, depths: [1, 1, 6, 1], num_heads: [1, 1, 2, 2],
  window_size: [1, 4, 4], semantic_tokens: [1, 2, 2], layer_scale: null, head_dim: 8,
  anchors: [8, 16, 32, 64, 128], proposals: 30}
data: {sampling: middle, flip: all, num_frames: 1, image_size: 64, workers: 0}
train: {epochs: 2, batch_size: 4, accumulate: 2, lr: 2e-3, lr_per: 8, warmup_epochs: 1, log_every: 1,
  short_sides: [48, 64]}
eval: {batch_size: 3}
"""


@pytest.fixture(scope="module")
def demo_objects_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "demo_objects"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_objects, "SETTINGS", demo_objects.SETTINGS | {"train": 16, "test": 7})
        demo_objects.prepare_objects(root, workers=1)
    return root


@pytest.fixture(scope="module")
def args(demo_objects_root, tmp_path_factory):
    path = tmp_path_factory.mktemp("detection") / "small.yaml"
    path.write_text(SMALL)
    lists = (
        f"--data.{split}={demo_objects_root}/{name}.json"
        for split, name in (("train", "train"), ("val", "test"))
    )
    return ["--cfg", str(path), *lists]


@pytest.fixture(scope="module")
def trained(args, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    assert run(cli.train, *args, f"--output={output}") == 0
    return output


# ---- the model


def build(name, head="mask_rcnn", image_size=64):
    return create_model(
        name, num_classes=3, num_frames=1, image_size=image_size, head=head, **MODELS[name], **HEAD
    )


def sample(height=48, width=64):
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 4:24, 8:30], masks[1, 20:44, 30:60] = 1, 1
    boxes = torch.tensor([[8.0, 4, 30, 24], [30, 20, 60, 44]])
    return torch.randn(3, height, width), {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks}


@pytest.mark.parametrize("name", MODELS)
def test_any_backbone_with_grids_detects_and_every_parameter_learns(name):
    model = build(name)
    (image, target), (other, nothing) = sample(), sample(40, 33)
    nothing = {key: value[:0] for key, value in nothing.items()}
    losses = model.train()([image, other], [target, nothing])
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(name.startswith(("backbone.", "head.")) for name, _ in model.named_parameters())
    with torch.no_grad():
        first, second = model.eval()([image, other])
    assert first["boxes"].shape == (len(first["scores"]), 4)
    assert first["masks"].shape[1:] == (1, 28, 28)
    assert set(first["labels"].tolist()) <= {0, 1, 2}
    assert (first["scores"].diff() <= 0).all()
    assert second["boxes"].max() <= 40
    again = create_model(**model.built)
    again.load_state_dict(model.state_dict())


def test_images_without_objects_leave_no_parameter_without_a_gradient():
    """DistributedDataParallel would wait for it."""
    model, (image, target) = build("swin_tiny_patch4_window7_224"), sample()
    losses = model.train()([image], [{key: value[:0] for key, value in target.items()}])
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_regions_are_pooled_at_the_strides_of_the_levels():
    """torchvision would take an 8th for the finest level of this image, whose side is no multiple of 32."""
    model = build("swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        model([torch.zeros(3, 40, 40)])
    for pool in (model.head.roi_heads.box_roi_pool, model.head.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        assert (pool.map_levels.k_min, pool.map_levels.k_max) == (2, 5)


def test_boxes_are_exact_in_half_precision():
    """In bfloat16 numbers from 256 on are 2 apart, from 512 on 4: pixels, and which mask is whose."""
    model, seen = build("swin_tiny_patch4_window7_224").eval(), []
    model.head.rpn.anchor_generator.register_forward_hook(lambda *call: seen.append(call[2][0]))
    model.head.rpn.register_forward_hook(lambda *call: seen.append(call[2][0][0]))
    for precise in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            (detected,) = model([torch.zeros(3, 64, 640)])
        seen.append(detected["boxes"])
    (anchors, *boxes), (others, *rounded) = seen[:3], seen[3:]
    assert torch.equal(anchors, others)
    assert {part.dtype for part in (*boxes, *rounded)} == {torch.float32}


def test_class_0_of_a_list_is_the_models_first_after_the_background():
    model, (image, target) = build("swin_tiny_patch4_window7_224"), sample()
    target = {key: value[1:] for key, value in target.items()}
    losses, bias = [], model.head.roi_heads.box_predictor.cls_score.bias
    for c in range(4):
        torch.manual_seed(0)
        with torch.no_grad():
            bias.zero_()[c] = 50
        losses.append(model.train()([image], [target])["loss_classifier"].item())
    assert target["labels"].tolist() == [2]
    assert losses[1] == pytest.approx(losses[2], abs=1)  # wrong for all boxes
    assert losses[3] < losses[1] - 1  # right for the object's
    assert losses[0] < losses[1] - 1  # right for all others


def test_boxes_alone_need_no_masks():
    model, (image, target) = build("swin_tiny_patch4_window7_224", "faster_rcnn"), sample()
    del target["masks"]
    assert not any("mask" in loss for loss in model.train()([image], [target]))
    with pytest.raises(InputError, match="no masks to learn: model.head=faster_rcnn"):
        build("swin_tiny_patch4_window7_224").train()([image], [target])


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("stvit_swin_tiny", {}, "take stvit_r_"),
        ("vit_tiny_patch16_224", {"num_frames": 16}, "num_frames=16: a detector takes images"),
        (
            "vit_tiny_patch16_224",
            {"num_frames": 1, "anchors": (8, 16)},
            r"anchors=\(8, 16\) must be 5 sides",
        ),
    ],
)
def test_what_cannot_detect_is_named(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=3, head="mask_rcnn", **{"num_frames": 1} | sizes)


def test_settings_that_mean_nothing_here_are_refused():
    pixels = {"num_frames": 1, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for change, message in (
        ({"num_frames": 16}, "data.num_frames=16: a detector takes images, 1"),
        ({"augment_on": "device"}, "data.augment_on=device"),
        ({"rand_augment": (1, 5)}, r"data.rand_augment=\(1, 5\)"),
        ({"repeats": 2}, "data.repeats=2: detection scales and mirrors images"),
    ):
        with pytest.raises(InputError, match=message):
            Detection(["a"], normalise=None).train_views(
                Sampling("middle", 1), DataConfig(**pixels | change)
            )


def test_an_image_that_is_too_large_for_a_vit_is_named():
    with pytest.raises(InputError, match="an image of 65x20 pixels, but the model takes 64x64"):
        build("vit_tiny_patch16_224").eval()([torch.zeros(3, 65, 20)])


@pytest.mark.parametrize("name", MODELS)
def test_a_classifier_is_loaded_under_a_fresh_head(name):
    donor = create_model(name, num_classes=7, num_frames=1, image_size=64, **MODELS[name])
    model = build(name)
    report = load_weights(model, donor.state_dict())
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert not any(name in report.fresh for name in donor.state_dict())
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, donor.state_dict()[name])


# ---- what is learnt of an image


def objects(size=(48, 64), **changes):
    masks = np.zeros((3, *size), bool)
    masks[0, 4:24, 8:30], masks[1, 20:44, 30:60], masks[2, :9, 50:] = True, True, True
    boxes = ((8.0, 4.0, 22.0, 20.0), (30.0, 20.0, 30.0, 24.0), (50.0, 0.0, 14.0, 9.0))
    values = {
        "image": 5,
        "size": size,
        "classes": (0, 2, 1),
        "boxes": boxes,
        "crowds": (False, False, True),
    }
    areas = tuple(float(mask.sum()) for mask in masks)
    return Objects(**values | {"masks": tuple(encode_masks(masks)), "areas": areas} | changes)


def test_to_mirror_twice_changes_nothing():
    frames, target = torch.randint(256, (1, 3, 48, 64), dtype=torch.uint8), objects().tensors()
    once = mirrored(frames, target, twins=(1, 0, 2))
    assert once[1]["labels"].tolist() == [1, 2]
    assert once[1]["boxes"].tolist() == [[34, 4, 56, 24], [4, 20, 34, 44]]
    assert torch.equal(once[1]["masks"], target["masks"].flip(-1))
    again, same = mirrored(*once, twins=(1, 0, 2))
    assert torch.equal(again, frames)
    for key, value in target.items():
        assert torch.equal(same[key], value)


def test_boxes_and_masks_move_with_the_pixels():
    torch.manual_seed(3)
    frames = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
    frames[..., 20:44, 30:60] = 255
    for _ in range(4):
        pixels, target = Scaled((24, 96), 100, learnt=True, flip=True)(frames, objects())
        assert tuple(pixels.shape[-2:]) in {(24, 32), (75, 100)}
        assert target["labels"].tolist() == [0, 2], "a crowd is not learnt"
        x1, y1, x2, y2 = target["boxes"][1].round().int().tolist()
        assert pixels[0, 0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200
        covered = target["masks"][1].bool()
        assert (covered != (pixels[0, 0] > 127)).float().mean() < 0.02
        assert type(target["boxes"]) is type(target["masks"]) is torch.Tensor


def test_what_lies_beyond_the_image_is_cut_off_and_what_is_left_of_nothing_dropped():
    boxes = ((-0.5, -0.5, 10.0, 10.0), (30.0, 20.0, 34.9, 24.0), (5.0, 5.0, 0.0, 7.0))
    crowds = (False,) * 3
    _, target = Scaled((48,), 100, learnt=True)(
        torch.zeros(1, 3, 48, 64, dtype=torch.uint8), objects(boxes=boxes, crowds=crowds)
    )
    assert target["boxes"].tolist() == [[0, 0, 9.5, 9.5], [30, 20, 64, 44]]
    assert len(target["labels"]) == len(target["masks"]) == 2


# ---- lists


def coco_json():
    """Two images, of which one is empty; categories with gaps, in no order; each form of a mask."""
    square = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]
    run = {"size": [20, 30], "counts": [0, 40, 560]}
    compressed = rle.frPyObjects(run, 20, 30)["counts"].decode()
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 20, "width": 30},
            {"id": 3, "file_name": "b.png", "height": 20, "width": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 44, "bbox": [2, 2, 6, 6], "segmentation": [square]},
            {
                "id": 9,
                "image_id": 7,
                "category_id": 5,
                "bbox": [0, 0, 2, 20],
                "segmentation": run,
                "iscrowd": 1,
            },
            {
                "id": 4,
                "image_id": 7,
                "category_id": 5,
                "bbox": [0, 0, 2, 20],
                "area": 39.5,
                "segmentation": {"size": [20, 30], "counts": compressed},
            },
        ],
        "categories": [{"id": 44, "name": "bottle"}, {"id": 5, "name": "plane"}],
    }


@pytest.fixture
def coco_list(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{name}.png")

    def write(change=lambda values: None, name="list.json"):
        values = coco_json()
        values = change(values) or values
        (tmp_path / name).write_text(json.dumps(values))
        return tmp_path / name

    return write


def test_coco_lists_are_read_as_they_are(coco_list):
    rows = read_rows(coco_list())
    assert rows.class_names == ["plane", "bottle"]
    assert rows.category_ids == [5, 44]
    first, second = (row.target for row in rows)
    assert (first.image, first.size, first.classes) == (7, (20, 30), (1, 0, 0))
    assert first.crowds == (False, True, False)
    assert first.areas == (36.0, 40.0, 39.5)
    assert first.masks[1] == first.masks[2]
    masks = first.tensors()["masks"]
    assert masks.sum((1, 2)).tolist() == [36, 40]
    assert masks[0, 2:8, 2:8].all()
    assert second == Objects(3, (20, 30), masks=())
    assert eval(repr(first)) == first  # all of it counts in what tells lists apart
    named = read_rows(coco_list(), class_names=["bottle", "cup", "plane"])
    assert named[0].target.classes == (0, 2, 2)
    assert named.category_ids == [44, 45, 5]


def test_images_are_where_cocos_are(coco_list, tmp_path):
    folder = tmp_path / "images" / "val2017"
    folder.mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    coco_list(name="annotations/instances_val2017.json")
    (tmp_path / "a.png").rename(folder / "a.png")
    (tmp_path / "b.png").unlink()
    rows = read_rows(tmp_path / "annotations" / "instances_val2017.json")
    assert [row.path for row in rows] == [str(folder / "a.png"), str(folder / "b.png")]
    rooted = read_rows(tmp_path / "annotations" / "instances_val2017.json", root=tmp_path)
    assert [row.path for row in rooted] == [str(folder / "a.png"), str(folder / "b.png")]


def changed(place, key, value):
    """A change of one value: an annotation's (a number), or another part's (part, number)."""
    part, number = place if isinstance(place, tuple) else ("annotations", place)
    return lambda values: values[part][number].update({key: value})


def test_compressed_run_lengths_are_pycocotools_own(coco_list):
    generator = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 0.99, 1):
        mask = generator.random((20, 30)) < share
        (counts,) = encode_masks(mask[None])
        shape = {"size": [20, 30], "counts": counts}
        row = read_rows(coco_list(changed(1, "segmentation", shape)))[0]
        assert counts in row.target.masks
        runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=2)), prepend=0)
        assert [run for run in _runs(counts) if run] == [run for run in runs.tolist() if run]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed(0, "bbox", [28, 2, 6, 6]),
            r"annotation 1: found box \[28, 2, 6, 6\], expected it inside an image of 30x20",
        ),
        (changed(0, "bbox", [2, 2, -6, 6]), r"annotation 1: found box \[2, 2, -6, 6\]"),
        (changed(0, "bbox", [2, 2, 6]), "annotation 1: found box .*expected x, y, width, height"),
        (changed(0, "category_id", 6), r"annotation 1: found category_id 6, expected one of \[5, 44\]"),
        (changed(0, "image_id", 8), "annotation 1: found image_id 8"),
        (changed(0, "segmentation", []), "annotation 1: found an empty polygon"),
        (changed(0, "segmentation", [[]]), "annotation 1: found an empty polygon"),
        (changed(0, "segmentation", [[1, 2, 3, 4]]), "annotation 1: found segmentation .*3 points"),
        (
            changed(1, "segmentation", {"size": [20, 30], "counts": [0, 40]}),
            "annotation 9: found run lengths",
        ),
        *(
            (
                changed(1, "segmentation", {"size": [20, 30], "counts": counts}),
                r"annotation 9: found run lengths .*, expected 600 pixels",
            )
            for counts in ([1.5, 598.5], [-5, 605], "zz", "", "PPP", "d4`0P1lb1", None)
        ),
        *(
            (
                changed(1, "segmentation", {"size": size, "counts": [600]}),
                "annotation 9: found a mask of",
            )
            for size in ([30, 20], 600, None)
        ),
        (changed(0, "segmentation", [[0, 0, 1e9, 0, 1e9, 1e9]]), "annotation 1: found segmentation"),
        (changed(0, "area", "wide"), "annotation 1: found area 'wide', expected a number of pixels"),
        (changed(1, "id", 1), "annotation 1: found this id twice"),
        (changed(("images", 1), "id", 7), "image 7: found this id twice"),
        (
            changed(("images", 1), "height", None),
            "image at place 1: found .*expected id, file_name, height",
        ),
        (changed(("categories", 1), "name", "bottle"), "found two categories of one name"),
        (lambda values: {"images": []}, "found images, expected COCO's json"),
    ],
)
def test_a_bad_list_is_one_clear_line(coco_list, change, message):
    with pytest.raises(ListError, match=message) as error:
        read_rows(coco_list(change))
    assert "\n" not in str(error.value)


def test_a_class_that_is_not_the_models_is_named(coco_list):
    with pytest.raises(ListError, match="annotation 1: found class 'bottle'.*did you mean 'bottles'"):
        read_rows(coco_list(), class_names=["bottles", "plane"])


VOC = """<annotation><filename>{name}.png</filename><size><width>30</width><height>20</height></size>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>8</xmax>
<ymax>8</ymax></bndbox></object><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{x}</xmax>
<ymax>20</ymax></bndbox></object></annotation>"""


@pytest.mark.parametrize("layout", ["voc", "beside", "sets"])
def test_xml_files_of_voc(tmp_path, layout):
    beside = layout == "beside"
    folders = {kind: tmp_path / ("" if beside else kind) for kind in ("Annotations", "JPEGImages")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (folders["Annotations"] / f"{name}.xml").write_text(VOC.format(name=name, x=30))
        Image.new("RGB", (30, 20)).save(folders["JPEGImages"] / f"{name}.png")
    path = tmp_path
    if layout == "sets":
        path = tmp_path / "ImageSets" / "Main" / "train.txt"
        path.parent.mkdir(parents=True)
        path.write_text("b\n")
    rows = read_rows(path)
    assert [row.path for row in rows] == [
        str(folders["JPEGImages"] / f"{name}.png") for name in ("b" if layout == "sets" else "ab")
    ]
    assert rows.class_names == ["cat", "dog"]
    boxes = ((2.0, 2.0, 6.0, 6.0), (0.0, 0.0, 30.0, 20.0))
    assert rows[0].target == Objects(1, (20, 30), (1, 0), boxes, None, (True, False), (36.0, 600.0))
    (folders["Annotations"] / "b.xml").write_text(VOC.format(name="b", x=33))
    with pytest.raises(ListError, match=r"b.xml: found box .* expected it inside an image of 30x20"):
        read_rows(path)
    (folders["Annotations"] / "b.xml").write_text("<annotation>")
    with pytest.raises(ListError, match="b.xml: found .*expected VOC's xml"):
        read_rows(path)


# ---- scores


def average_precision(truth, found, iou):
    """Boxes of one class, (image, box) and (image, box, score): 101 recalls, greedy by score."""
    used, hits = set(), []
    for image, box, _ in sorted(found, key=lambda one: -one[2]):
        candidates = [(overlap(box, other), i) for i, (where, other) in enumerate(truth) if where == image]
        best = max((c for c in candidates if c[1] not in used), default=(0, None))
        hits.append(best[0] >= iou)
        used |= {best[1]} if hits[-1] else set()
    points = [(sum(hits[: n + 1]) / len(truth), sum(hits[: n + 1]) / (n + 1)) for n in range(len(hits))]
    return sum(max((p for r, p in points if r >= i / 100), default=0) for i in range(101)) / 101


def overlap(a, b):
    sides = [min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def test_figures_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    rows, records, truth, found = [], [], {0: [], 1: []}, {0: [], 1: []}
    for image in range(12):
        n = int(rng.integers(0, 5))
        boxes = [(*rng.uniform(0, 60, 2).tolist(), *rng.uniform(10, 39, 2).tolist()) for _ in range(n)]
        classes = rng.integers(2, size=n).tolist()
        areas = tuple(w * h for *_, w, h in boxes)
        target = Objects(image, (100, 100), tuple(classes), tuple(boxes), None, (False,) * n, areas)
        rows.append(Row(f"{image}.png", target))
        detected = [[x + rng.normal(0, 2) for x in box] for box in boxes for _ in range(rng.integers(3))]
        labels = rng.integers(2, size=len(detected)).tolist()
        scores = rng.uniform(size=len(detected)).tolist()
        order = np.argsort(scores)[::-1]
        values = {"labels": labels, "scores": scores, "boxes": detected}
        records.append({key: [values[key][i] for i in order] for key in values} | {"size": (100, 100)})
        for c, box in zip(classes, boxes, strict=True):
            truth[c].append((image, box))
        for c, box, score in zip(labels, detected, scores, strict=True):
            found[c].append((image, box, score))
    task = Detection(["a", "b"], normalise=None)
    outcome = Outcome(Rows(rows, ["a", "b"], [9, 4]), records, {})
    scored = task.figures(outcome)
    ious = [0.5 + 0.05 * i for i in range(10)]
    each = {c: [average_precision(truth[c], found[c], iou) for iou in ious] for c in (0, 1)}
    assert scored["AP50"] == pytest.approx((each[0][0] + each[1][0]) / 2)
    assert scored["AP75"] == pytest.approx((each[0][5] + each[1][5]) / 2)
    for name, c in (("a", 0), ("b", 1)):
        assert scored["by_class"][name] == {"AP": pytest.approx(sum(each[c]) / 10)}
    assert scored["AP"] == pytest.approx(sum(each[0] + each[1]) / 20)
    assert "mask_AP" not in scored


@pytest.mark.parametrize("on_failure", ["wrong", "exclude"])
def test_an_image_that_cannot_be_read_counts_as_nothing_found_or_not_at_all(on_failure):
    target = objects(crowds=(False,) * 3)
    perfect = {"labels": target.classes, "scores": [0.9] * 3, "boxes": target.boxes, "masks": target.masks}
    perfect |= {"size": target.size}
    rows = [Row("a.png", target), Row("b.png", target._replace(image=6))]
    task = Detection(["a", "b", "c"], normalise=None, on_failure=on_failure)
    scored = task.figures(Outcome(rows, [perfect, None], {1: "gone"}))
    half = 51 / 101  # recalls 0, 0.01, ... 0.5
    for key in ("AP", "AP50", "mask_AP", "mask_AP50"):
        assert scored[key] == pytest.approx(1 if on_failure == "exclude" else half)
    assert task.figures(Outcome(rows, [None, None], {0: "gone", 1: "gone"}))["AP"] in (0, None)


def test_masks_are_pasted_one_by_one(monkeypatch):
    """A hundred of them in a photograph of 12 million pixels would be 5 gigabytes."""
    generator, size, shapes = torch.Generator().manual_seed(0), (30, 40), []
    corners = 10 * torch.rand(5, 2, generator=generator)
    detected = {
        "boxes": torch.cat([corners, corners + 15], 1),
        "labels": torch.zeros(5),
        "scores": torch.ones(5),
        "masks": torch.rand(5, 1, 28, 28, generator=generator),
    }
    together = encode_masks(
        (paste_masks_in_image(detected["masks"], detected["boxes"], size) > 0.5)[:, 0].numpy()
    )

    def paste(masks, *where):
        shapes.append(masks.shape)
        return paste_masks_in_image(masks, *where)

    monkeypatch.setattr(detection, "paste_masks_in_image", paste)
    judge = Detection(["a"], normalise=Normalise((0.5,) * 3, (0.5,) * 3))
    frames = torch.zeros(1, 3, 1, *size, dtype=torch.uint8)
    batch = collate([Sample(0, frames, [{"size": torch.tensor(size)}], [])])
    (record,) = judge.records(lambda images: [detected], batch)
    assert record["masks"] == together
    assert shapes == [(1, 1, 28, 28)] * 5


def test_a_precision_of_nothing_is_printed(tmp_path):
    task = Detection(["a", "b"], normalise=None)
    lines = task.report(tmp_path, Outcome(Rows(), [], {}), {"AP": 0.0, "AP50": None})
    assert [line.split() for line in lines[:-1]] == [["AP", "of", "boxes", "0.00%"]]


def test_a_record_is_in_the_images_own_pixels():
    class TopHalf(torch.nn.Module):
        def forward(self, images):
            height, width = images[0].shape[-2:]
            assert (height, width) == (24, 32)
            boxes, labels = torch.tensor([[0.0, 0, width, height / 2]]), torch.tensor([1])
            return [
                {
                    "boxes": boxes,
                    "labels": labels,
                    "scores": torch.ones(1),
                    "masks": torch.ones(1, 1, 28, 28),
                }
            ]

    frames = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
    frames, target = Scaled((24,), 100)(frames, objects())
    task = Detection(["a", "b"], normalise=Normalise((0.5,) * 3, (0.5,) * 3))
    batch = collate([Sample(0, frames.transpose(0, 1)[None].contiguous(), [target], [])])
    (record,) = task.records(TopHalf(), batch)
    assert record["boxes"] == [[0, 0, 64, 24]]
    (one,) = task.instances(record)
    assert one.name == "b"
    assert one.mask.shape == (48, 64)
    assert one.mask[2:22, 2:62].all()
    assert not one.mask[26:].any()


def scored(folder):
    report = json.loads((folder / "report.json").read_text())
    return report | {"seconds": 0, "checkpoint": ""}, json.loads((folder / "predictions.json").read_text())


def test_a_checkpoint_scores_alike_on_any_number_of_ranks(args, trained, tmp_path):
    given = [*args, f"--checkpoint={trained}/last.pt"]
    assert run(cli.test, *given, f"--output={tmp_path}/one") == 0
    report, predictions = scored(tmp_path / "one")
    assert predictions
    last = [entry for entry in figures(trained) if entry["kind"] == "epoch"][-1]
    assert [last[f"val_{key}"] for key in Detection.watched] == [report[key] for key in Detection.watched]
    assert set(report["by_class"]) == set(demo.SHAPES)
    for ranks in (2, 3):
        output, log = tmp_path / f"on{ranks}", tmp_path / "out.txt"
        started = launch(
            cli.test, *given, f"--output={output}", "--eval.batch_size=2", ranks=ranks, log=log
        )
        assert finish(started) == [0] * ranks, log.read_text()
        assert scored(output) == (report, predictions)
    assert Image.open(tmp_path / "one" / "objects.png").height >= 7 * 240


def test_predictions_give_the_reports_figures_again(args, trained, demo_objects_root, tmp_path):
    """As anyone would score them, by COCO's own tool and the list."""
    assert run(cli.test, *args, f"--checkpoint={trained}/last.pt", f"--output={tmp_path}") == 0
    report, _ = scored(tmp_path)
    truth = COCO(demo_objects_root / "test.json")
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        scoring = COCOeval(truth, truth.loadRes(str(tmp_path / "predictions.json")), kind)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
        for place, key in enumerate(("AP", "AP50", "AP75")):
            assert report[prefix + key] == pytest.approx(scoring.stats[place], abs=1e-9)


def test_a_run_that_is_resumed_ends_as_if_unbroken(args, trained, tmp_path, monkeypatch):
    train_in_two(args, tmp_path / "run", monkeypatch, saves=1)
    assert_same_runs(trained, tmp_path / "run")


def test_two_ranks_share_the_learning(args, tmp_path):
    log = tmp_path / "out.txt"
    started = launch(cli.train, *args, f"--output={tmp_path}/run", "--train.epochs=1", ranks=2, log=log)
    assert finish(started) == [0, 0], log.read_text()


def test_images_that_cannot_be_read_are_told(args, trained, demo_objects_root, tmp_path):
    """One broken, one missing, one of another size than the list says."""
    values = json.loads((demo_objects_root / "test.json").read_text())
    names = [image["file_name"] for image in values["images"]]
    for name in names:
        (tmp_path / name).write_bytes((demo_objects_root / "test" / name).read_bytes())
    (tmp_path / names[1]).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / names[2]).unlink()
    Image.new("RGB", (96, 128)).save(tmp_path / names[3])
    (tmp_path / "list.json").write_text(json.dumps(values))
    given = [*args, f"--checkpoint={trained}/last.pt", f"--data.test={tmp_path}/list.json"]
    assert run(cli.test, *given, f"--output={tmp_path}/scored") == 0
    report, predictions = scored(tmp_path / "scored")
    assert (report["num_videos"], report["num_failed"]) == (7, 3)
    assert {one["image_id"] for one in predictions} <= {1, 5, 6, 7}


def test_class_rows_of_a_detector_are_not_taken_for_a_classifiers(trained):
    """They begin with the background: chosen by class name, they would all be one too far."""
    values = checkpoint.load(trained / "last.pt")
    names = values["class_names"]
    model = create_model(**values["built"])
    report = load_weights(model, copy.deepcopy(values), class_names=names[::-1])
    assert "head.roi_heads.box_predictor.cls_score.weight" in report.fresh
    same = load_weights(model, values, class_names=names)
    assert not same.fresh
    assert torch.equal(
        model.state_dict()["head.rpn.head.cls_logits.bias"],
        values["model"]["head.rpn.head.cls_logits.bias"],
    )


# ---- prediction


@pytest.fixture(scope="module")
def sure(trained, tmp_path_factory):
    """The checkpoint of a detector that is sure of all that it sees."""
    values = checkpoint.load(trained / "last.pt")
    values["model"]["head.roi_heads.box_predictor.cls_score.bias"][2] += 30
    path = tmp_path_factory.mktemp("sure") / "best.pt"
    checkpoint.save(path, values)
    return path


def test_objects_are_drawn_into_images_and_videos(sure, demo_objects_root, tmp_path, capsys):
    image = demo_objects_root / "test" / "00000.png"
    frames = np.stack(
        [np.asarray(Image.open(demo_objects_root / "test" / f"0000{i}.png")) for i in range(5)]
    )
    demo.write_mp4(tmp_path / "five.mp4", frames, fps=5)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    out = tmp_path / "drawn"
    words = [
        f"--checkpoint={sure}",
        f"--draw={out}",
        "--json",
        image,
        tmp_path / "five.mp4",
        tmp_path / "broken.png",
    ]
    assert run(cli.predict, *words) == 1
    printed = capsys.readouterr()
    assert "broken.png" in printed.err
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line.get("time") for line in lines] == [None, 0, 0.2, 0.4, 0.6, 0.8, None]
    first = lines[0]["objects"][0]
    assert first["score"] > 0.9
    assert first["mask"]["size"] == [96, 128]
    pixels, drawn = np.asarray(Image.open(image)), np.asarray(Image.open(out / "00000.png"))
    assert drawn.shape == pixels.shape
    assert (drawn != pixels).any()
    with av.open(str(out / "five.mp4")) as video:
        assert [round(frame.time, 2) for frame in video.decode(video=0)] == [0, 0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (cli.predict, ["--timeline=t", "a.mp4"], "--timeline: "),
        (cli.predict, ["--features=f.npz", "a.mp4"], "--features: "),
        (cli.export, ["--to=model.onnx"], "task=detection; only models that name classes are exported"),
    ],
)
def test_what_a_detector_does_not_do_is_one_line(
    sure, tmp_path, monkeypatch, capsys, command, words, message
):
    monkeypatch.chdir(tmp_path)
    assert run(command, f"--checkpoint={sure}", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_library_user_finds_objects(sure, demo_objects_root):
    detector, image = Detector(sure, device="cpu"), demo_objects_root / "test" / "00000.png"
    first, *_ = detector.detect(image)
    assert first.name == demo.SHAPES[1]
    assert first.mask.shape == (96, 128)
    x, y, width, height = first.box
    assert 0 <= x <= x + width <= 128
    assert 0 <= y <= y + height <= 96
    same = detector.detect(np.asarray(Image.open(image)))[0]
    assert (same.score, same.box) == (first.score, first.box)
