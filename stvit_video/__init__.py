"""Video recognition with spatiotemporal semantic tokens."""

__version__ = "0.1.0"
