"""Score a checkpoint: the same as the installed `stvit-test`."""

from stvit_video.cli import test

if __name__ == "__main__":
    test()
