"""Video recognition with spatiotemporal semantic tokens.

>>> import stvit_video
>>> recognize = stvit_video.Recognizer("best.pt")
>>> recognize("video.mp4")
"""

from .data.annotations import read_rows
from .data.decode import open_video
from .models.zoo import create_model, list_models, multiply_adds
from .recognizer import Recognizer
from .weights import LoadReport, WeightsError, load_weights

__all__ = [
    "LoadReport",
    "Recognizer",
    "WeightsError",
    "create_model",
    "list_models",
    "load_weights",
    "multiply_adds",
    "open_video",
    "read_rows",
]
__version__ = "0.2.0"
