"""The command page: a model to try in the browser."""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from ..data.media import VIDEO_SUFFIXES
from ..errors import InputError
from .common import command, videos_of

EXAMPLES = 24


@command
def page(args: Sequence[str]) -> None:
    """Open a page on this machine: drop a video, see its classes, its timeline and what the tokens took."""
    parser = argparse.ArgumentParser(description=page.__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="which model")
    parser.add_argument("--device", help="cpu, cuda, ...; default: CUDA where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="who may come (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    parser.add_argument(
        "--examples", metavar="FOLDER", help="videos to choose; default: the validation list's"
    )
    parser.add_argument("--max-megabytes", type=float, default=200, help="of an upload (200)")
    parser.add_argument("--max-seconds", type=float, default=600, help="that a video may last (600)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a video (60)")
    options = parser.parse_args(args)
    for name in ("max_megabytes", "max_seconds", "timeout"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be more than 0")
    if not 0 < options.port < 1 << 16:
        parser.error(f"--port {options.port}: must be from 1 to 65535")
    from ..page import build  # gradio takes seconds to import, and may be absent
    from ..recognizer import Recognizer

    recognize = Recognizer(options.checkpoint, device=options.device, timeout=options.timeout)
    folder = options.examples
    examples = videos_of(Path(folder), VIDEO_SUFFIXES) if folder else validated(recognize.config)
    if not all(path.is_file() for path in examples):
        raise InputError(f"{folder}: no folder with videos in it")
    limits = {"max_megabytes": options.max_megabytes, "max_seconds": options.max_seconds}
    site = build(recognize, examples=examples[:: -(-len(examples) // EXAMPLES) or 1], **limits)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as with Ctrl-C: uploads are removed
    try:
        site.launch(server_name=options.host, server_port=options.port, prevent_thread_lock=True)
        print(f"{site.local_url}  (Ctrl-C ends it)", flush=True)
        site.block_thread()
    except OSError as error:
        raise InputError(f"{options.host}:{options.port}: no page can be opened there ({error})") from None
    finally:
        site.temporary.cleanup()


def validated(config) -> list[Path]:
    """The checkpoint's validation videos that are files here; none where there are none."""
    from ..build import read_split

    try:
        source = config.data.train if config.data.hold_back and not config.data.val else config.data.val
        exists = source is not None and Path(source).exists()  # a demo set is not rendered
        rows = read_split(config, "val")[0] if exists else []
    except InputError:
        return []
    return [path for row in rows if (path := Path(row.path)).is_file()]
