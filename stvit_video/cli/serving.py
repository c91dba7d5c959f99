"""What the command page does: a model to try in the browser."""

import signal
from argparse import Namespace
from pathlib import Path

from ..build import read_split
from ..data.media import VIDEO_SUFFIXES
from ..errors import InputError
from ..recognizer import Recognizer
from .common import videos_of

EXAMPLES = 24


def page(options: Namespace) -> None:
    """A checkpoint, served until Ctrl-C."""
    from ..page import build  # gradio takes seconds to import, and may be absent

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
    try:
        source = config.data.train if config.data.hold_back and not config.data.val else config.data.val
        exists = source is not None and Path(source).exists()  # a demo set is not rendered
        rows = read_split(config, "val")[0] if exists else []
    except InputError:
        return []
    return [path for row in rows if (path := Path(row.path)).is_file()]
