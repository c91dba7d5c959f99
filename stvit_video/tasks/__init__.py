"""Tasks by name: `task: NAME` in the settings. A new one is a file here and a line in `TASKS`."""

from .classification import Classification
from .detection import Detection
from .multilabel import MultiLabel
from .segmentation import Segmentation

TASKS = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "segmentation": Segmentation,
    "detection": Detection,
}
