"""Check the lists of a config: the same as the installed `stvit-check`."""

from stvit_video.cli import check

if __name__ == "__main__":
    check()
