"""Draw learning curves: the same as the installed `stvit-curves`."""

from stvit_video.cli import curves

if __name__ == "__main__":
    curves()
