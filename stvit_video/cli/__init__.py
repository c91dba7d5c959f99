"""The commands: what `tools/` and the scripts `stvit-...` call. Each is imported when it is used."""

import importlib

_HOMES = {
    "train": "training",
    "test": "scoring",
    "predict": "prediction",
    "check": "lists",
    "shards": "lists",
    "curves": "pictures",
    "compare": "pictures",
    "bench": "measuring",
    "page": "serving",
    "ensemble": "ensembling",
    "export": "exporting",
    "command": "common",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
