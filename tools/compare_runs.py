"""Compare scoring runs on one page: the same as the installed `stvit-compare`."""

from stvit_video.cli import compare

if __name__ == "__main__":
    compare()
