"""Average several scorings: the same as the installed `stvit-ensemble`."""

from stvit_video.cli import ensemble

if __name__ == "__main__":
    ensemble()
