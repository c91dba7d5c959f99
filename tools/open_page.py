"""Open a page to try a model: the same as the installed `stvit-page`."""

from stvit_video.cli import page

if __name__ == "__main__":
    page()
