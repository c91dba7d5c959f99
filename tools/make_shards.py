"""Write WebDataset shards: the same as the installed `stvit-shards`."""

from stvit_video.cli import shards

if __name__ == "__main__":
    shards()
