"""Tasks by name: `task: NAME` in the settings. A new one is a file here and a line in `TASKS`.

Settings stand here and not beside their tasks, as what tasks import takes seconds.
"""

import importlib
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from ..bounds import Range


@dataclass
class NoSettings:
    pass


@dataclass
class Taught:
    teacher: str | None = None
    """Checkpoint of a run with the same clips and classes whose scores are learnt, too (distillation);
    task=policy learns where its patches agree, whatever its classes."""


@dataclass
class ClassificationSettings(Taught):
    label_smoothing: Annotated[float, Range(0, 0.999)] = 0.0
    """Share of the target that is spread over all classes; of several labels, of each."""
    erasing: Annotated[float, Range(0, 1)] = 0.0
    """Share of the clips that lose a random box."""
    mixup: Annotated[float, Range(0)] = 0.0
    """Alpha of mixup; 0: none. With cutmix too, they take turns."""
    cutmix: Annotated[float, Range(0)] = 0.0
    """Alpha of cutmix; 0: none."""
    distill: Annotated[float, Range(0, 1)] = 0.5
    """Share of train.teacher's scores in the loss; the labels have the rest."""


@dataclass
class SegmentationSettings:
    zoom: Annotated[tuple[float, float], Range(0.01, 100)] = (0.5, 2.0)
    """Segmentation: random scale of training images, from and to; the crop is data.image_size."""
    max_share: Annotated[float, Range(0.01, 1)] = 0.75
    """Segmentation: most of a training crop that one class may take, where ten tries give such a crop."""
    distort: bool = True
    """Segmentation: change brightness, contrast, saturation and hue of training images at random."""


@dataclass
class WindowScoring:
    window_stride: Annotated[int, Range(1)] | None = None
    """Segmentation: pixels from window to window, of a model that takes one size only; null: 2/3 of one."""


@dataclass
class SegmentationScoring(WindowScoring):
    zooms: Annotated[tuple[float, ...], Range(0.01, 100)] = (1.0,)
    """Segmentation: scales of an image whose scores are averaged."""
    mirrored: bool = False
    """Segmentation: average with the scores of the mirrored image, too."""


@dataclass
class PolicySettings(SegmentationSettings, Taught):
    border_unsure: bool = False
    """Policy: groups at the border with one class and ignored pixels teach nothing (CTS on ADE20K)."""
    agreement: Annotated[float, Range(-1, 1)] = 0.9
    """Policy, with train.teacher: cosine with their mean above which the patches of a group agree."""


@dataclass
class DetectionSettings:
    short_sides: tuple[Annotated[int, Range(1)], ...] = ()
    """Detection: short sides of training images in pixels, one drawn for each; none: data.image_size."""
    longest_side: Annotated[int, Range(1)] | None = None
    """Detection: pixels that no side of an image exceeds; null: 5/3 of data.image_size."""


@dataclass
class ActionScoring:
    proposals: str | None = None
    """Action detection: csv of people's boxes that are scored; null: the list's boxes."""
    proposal_score: Annotated[float, Range(0, 1)] = 0.8
    """Action detection: lowest score of a proposal that counts."""
    excluded: str | None = None
    """Action detection: csv of the key frames that do not count (video, second)."""
    scored_classes: str | None = None
    """Action detection: label map of the classes that count; null: all."""
    keep_shape: bool = False
    """Action detection: frames keep their shape, with a short side of data.image_size / eval.crop_ratio:
    for Swin, which takes any; false: all of a frame is made the model's square."""


class TaskEntry(NamedTuple):
    """A task before it is imported. home: its module here, and its class in that.

    heads: names in `models.zoo.HEADS` that give its outputs, the default first; (None,): the classifier's.
    settings: a dataclass of those that only this task has, read as `train.*`; scoring: as `eval.*`.
    """

    home: str
    heads: tuple[str | None, ...] = (None,)
    settings: type = NoSettings
    scoring: type | None = None

    @property
    def has_head(self) -> bool:
        """Whether its models say more than what class a clip is of."""
        return self.heads != (None,)


TASKS = {
    "classification": TaskEntry("classification.Classification", settings=ClassificationSettings),
    "multilabel": TaskEntry("multilabel.MultiLabel", settings=ClassificationSettings),
    "segmentation": TaskEntry(
        "segmentation.Segmentation", ("linear", "upernet", "atm"), SegmentationSettings, SegmentationScoring
    ),
    "policy": TaskEntry("policy.Policy", ("policy",), PolicySettings, WindowScoring),
    "detection": TaskEntry("detection.Detection", ("mask_rcnn", "faster_rcnn"), DetectionSettings),
    "action_detection": TaskEntry("action_detection.ActionDetection", ("actions",), scoring=ActionScoring),
}


def task_class(name: str, teacher: str | None = None) -> type:
    """The task of `TASKS` that is named; policy with a teacher is `Agreement`, which needs no labels."""
    taught = name == "policy" and teacher is not None
    module, _, kind = ("agreement.Agreement" if taught else TASKS[name].home).partition(".")
    return getattr(importlib.import_module(f".{module}", __name__), kind)
