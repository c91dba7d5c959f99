"""Video recognition with spatiotemporal semantic tokens.

>>> import stvit_video
>>> recognize = stvit_video.Recognizer("best.pt")
>>> recognize("video.mp4")
"""

import importlib

__version__ = "0.5.0"
_HOMES = {  # imported when they are first asked for: each command and each notebook pays for what it uses
    "Detector": "predictor",
    "LoadReport": "weights",
    "Predictor": "predictor",
    "Recognizer": "recognizer",
    "WeightsError": "weights",
    "Moment": "timeline",
    "Segment": "timeline",
    "create_model": "models.zoo",
    "list_models": "models.zoo",
    "load_weights": "weights",
    "multiply_adds": "models.zoo",
    "open_video": "data.decode",
    "read_rows": "data.annotations",
    "segments": "timeline",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
