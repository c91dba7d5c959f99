"""Recognise videos: the same as the installed `stvit-predict`."""

from stvit_video.cli import predict

if __name__ == "__main__":
    predict()
