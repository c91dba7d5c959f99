"""Train: the same as the installed `stvit-train`."""

from stvit_video.cli import train

if __name__ == "__main__":
    train()
