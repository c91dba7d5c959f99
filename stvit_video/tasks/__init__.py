"""Tasks by name: `task: NAME` in the settings. A new one is a file here and a line in `TASKS`."""

from .action_detection import ActionDetection
from .classification import Classification
from .multilabel import MultiLabel

TASKS = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "action_detection": ActionDetection,
}
