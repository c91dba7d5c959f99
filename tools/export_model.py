"""Export a checkpoint to ONNX or .pt2: the same as the installed `stvit-export`."""

from stvit_video.cli import export

if __name__ == "__main__":
    export()
