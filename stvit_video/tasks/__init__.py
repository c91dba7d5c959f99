"""Tasks by name: `task: NAME` in the settings. A new one is a file here and a line in `TASKS`."""

from .action_detection import ActionDetection
from .agreement import Agreement
from .classification import Classification
from .detection import Detection
from .multilabel import MultiLabel
from .policy import Policy
from .segmentation import Segmentation

TASKS = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "segmentation": Segmentation,
    "policy": Policy,
    "detection": Detection,
    "action_detection": ActionDetection,
}


def task_class(name: str, teacher: str | None) -> type:
    """The task of `TASKS` that is named; policy with a teacher is `Agreement`, which needs no labels."""
    return Agreement if name == "policy" and teacher is not None else TASKS[name]
