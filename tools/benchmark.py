"""Measure speed: the same as the installed `stvit-bench`."""

from stvit_video.cli import bench

if __name__ == "__main__":
    bench()
