"""SIGTERM is a request: the run ends at its next update, with a checkpoint, and exits with code 143."""

import signal
import sys

from . import distributed

EXIT_CODE = 128 + signal.SIGTERM


class Preemption:
    """While entered, SIGTERM sets `asked` and does nothing else, however often it comes.

    Ranks do not end in the same moment: who then waits for one that has left sees its connection close, and
    leaves with it, by SystemExit(143). Main thread only: Python delivers signals nowhere else.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Preemption":
        self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        signal.signal(signal.SIGTERM, self._former)
        if self.asked and isinstance(error, RuntimeError) and distributed.in_group():
            cause = str(error).partition("\n")[0]
            print(f"SIGTERM: stopped while others did: {cause}", file=sys.stderr)
            raise SystemExit(EXIT_CODE) from None

    def exit_if_asked(self) -> None:
        """For where all is saved and no other rank is waited for. Raises SystemExit(143)."""
        if self.asked:
            print("SIGTERM: stopped, --resume continues behind the last checkpoint", file=sys.stderr)
            raise SystemExit(EXIT_CODE)

    def _note(self, *_) -> None:
        self.asked = True
