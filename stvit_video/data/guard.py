"""Calls that may hang or crash, made in a child process that can be killed and replaced.

Python cannot interrupt a native call (a decoder on a bad file), but the kernel can end a process. The child
is a fork, made when it is first needed; results come back through shared memory.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import math
import mmap
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch

from ..errors import DecodeError, InputError

LONGEST_WAIT = 1e6  # seconds that can be waited at a time: the kernel counts milliseconds in 31 bits
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class GivenUp(Exception):
    """A call that took too long, or whose process died: the message says which."""


class Guard:
    """guard(*args) is function(*args), or GivenUp after `timeout` seconds; the next call is as the first.

    What the function raises is raised here: an InputError as it is, anything else as a RuntimeError with
    its traceback. Arrays of a result come through shared memory, anything else pickled. One call at a time.
    A SharedMemory as the last argument is the same memory there; what the function puts into it is not
    copied, and other arrays of its result are put behind that.
    """

    def __init__(self, function: Callable, timeout: float):
        if not hasattr(os, "fork"):
            raise InputError("data.timeout needs a system that can fork processes; null: no guard")
        self.function, self.timeout = function, timeout
        self._child: Child | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            # Away while it works: after an interruption its late result must not pass for the next one.
            child, self._child = self._child, None
            if child is None or not child.lives():
                child = Child(self.function)
            try:
                child.send(args, self.timeout)
                [(_, result)] = finished([child])
            except BaseException:
                child.end()
                raise
            self._child = None if child.link.closed else child
        if isinstance(result, Raised):
            raise result.error
        return result

    def close(self) -> None:
        self._child = None

    def __reduce__(self):  # to another process goes the recipe, not the child
        return Guard, (self.function, self.timeout)


def guarded_map(
    function: Callable, items: Iterable, *, workers: int, timeout: float | None
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item) or the GivenUp) of each item, as they come, `workers` at a time."""
    waiting, idle = deque(items), []
    working: dict[Child, Any] = {}
    try:
        while waiting or working:
            while waiting and len(working) < workers:
                child = idle.pop() if idle else Child(function)
                working[child] = waiting.popleft()
                child.send((working[child],), timeout)
            for child, result in finished(working):
                item = working.pop(child)
                if not child.link.closed:
                    idle.append(child)
                if isinstance(result, Raised) and not isinstance(result.error, GivenUp):
                    raise result.error
                yield item, result.error if isinstance(result, Raised) else result
    finally:
        for child in (*idle, *working):
            child.end()


def guarded_in_order(
    function: Callable, items: Iterable, *, workers: int, timeout: float | None
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item) or its InputError or GivenUp) of each item, in order.

    Up to `workers` calls are made ahead, also while the last result is in use; a process makes one call
    after the other. Closing the generator ends the processes.
    """
    left, calls = iter(items), deque()

    def begin(child: Child | None) -> None:
        for item in left:
            child = Child(function) if child is None or child.link.closed else child
            calls.append((child, item))
            child.send((item,), timeout)
            return
        if child is not None:
            child.end()

    try:
        for _ in range(workers):
            begin(None)
        while calls:
            child, item = calls[0]
            [(_, result)] = finished([child])
            calls.popleft()
            begin(child)
            if isinstance(result, Raised):
                result = result.error
                if not isinstance(result, InputError | GivenUp):
                    raise result
            yield item, result
    finally:
        for child, _ in calls:
            child.end()


def read_ahead(reader: Callable, path: Any, timeout: float | None) -> Iterator[Any]:
    """What `reader` gives call by call, up to None, in a process that works ahead.

    Raises what it raises, and DecodeError, of this path, where it took too long or died.
    """
    calls = guarded_in_order(reader, itertools.repeat(None), workers=1, timeout=timeout)
    with contextlib.closing(calls):
        for _, result in calls:
            if result is None:
                return
            if isinstance(result, Exception):
                raise DecodeError(f"{path}: {result}") if isinstance(result, GivenUp) else result
            yield result


class Raised(NamedTuple):
    """Of a call that raised: GivenUp where its process took too long or died."""

    error: Exception


def finished(working: Iterable["Child"]) -> list[tuple["Child", Any]]:
    """Waits for one or more that have answered, crashed or run out of time; -> their results, or Raised.

    Those that crashed or ran out of time have been ended.
    """
    working, results = list(working), []
    while not results:
        left = min(child.deadline for child in working) - time.monotonic()
        left = None if left == float("inf") else min(max(left, 0), LONGEST_WAIT)
        ready = wait([child.link for child in working], left)
        for child in working:
            if child.link in ready:
                results.append((child, child.result()))
            elif child.deadline < time.monotonic():
                child.end()
                cause = f"took longer than {child.timeout:g} s (data.timeout)"
                results.append((child, Raised(GivenUp(cause))))
    return results


class Child:
    """A process that makes calls of one function, one after the other."""

    def __init__(self, function: Callable):
        self.link, its_link = Pipe()
        self.memory: SharedMemory | None = None  # of the latest call
        self.owner = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            self.link.close()
            _serve(function, its_link, self.owner)
        its_link.close()

    def lives(self) -> bool:
        """Whether it is this process's child, and has not ended (it ends with the thread that made it)."""
        return self.owner == os.getpid() and self._status() is None

    def send(self, args: tuple, timeout: float | None) -> None:
        """Begin a call, which has `timeout` seconds (None: any time)."""
        self.timeout = timeout
        self.deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        last = bool(args) and isinstance(args[-1], SharedMemory)
        memory, args = (args[-1], args[:-1]) if last else (SharedMemory(), args)
        new, self.memory = memory is not self.memory, memory
        self.link.send((args, last, memory.end, new))
        if new:
            send_handle(self.link, memory.file.fileno(), self.pid)

    def result(self) -> Any:
        """What the function returned, or Raised; GivenUp where the process crashed."""
        try:
            content, places = self.link.recv()
        except (EOFError, ConnectionError):
            return Raised(GivenUp(f"the decoder crashed ({self.end(patience=1)})"))
        return pickle.loads(content, buffers=[self.memory.map(*place) for place in places])

    def end(self, patience: float = 0.0) -> str:
        """Reap it, killed if it does not end by itself within `patience` seconds; -> how it ended."""
        if self.owner != os.getpid() or not self.pid:
            return "gone"
        status = self._wait(patience)
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
            status = self._wait(1)  # no longer: in a dead network file system not even this ends a process
        self.link.close()
        if status is None:
            return "cannot be killed"
        return f"signal {-status}" if status < 0 else f"exit code {status}"

    def _wait(self, seconds: float) -> int | None:
        give_up = time.monotonic() + seconds
        while (status := self._status()) is None and time.monotonic() < give_up:
            time.sleep(0.001)
        return status

    def _status(self) -> int | None:
        """Exit code, or minus the signal; None while it lives."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # reaped by someone else
            self.pid = 0
            return 0
        if not pid:
            return None
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def __del__(self):
        if getattr(self, "pid", 0):
            self.end()


class SharedMemory:
    """Nameless memory that processes share; it grows at its end. Each maps the parts that it uses."""

    def __init__(self, file: int | None = None):
        if file is not None:
            self.file = os.fdopen(file, "r+b")
        self.begin(0)

    @functools.cached_property
    def file(self) -> BinaryIO:
        """Made when it is needed: a child that is forked before that does not keep it from being freed."""
        if hasattr(os, "memfd_create"):  # not in /dev/shm, which containers keep small
            return os.fdopen(os.memfd_create("clips"), "r+b")
        return tempfile.TemporaryFile()

    def begin(self, end: int) -> None:
        """What lies behind `end` is to be written over."""
        self.end, self.parts = end, []  # parts: (place, bytes) mapped here

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """uint8, behind what is there."""
        return torch.from_numpy(self.map(self.end, math.prod(shape))).view(*shape)

    def map(self, start: int, size: int) -> np.ndarray:
        """uint8 (size,) from this place on."""
        self.end = max(self.end, start + size)
        if not size:
            return np.empty(0, np.uint8)
        first, part = self.parts[-1] if self.parts else (0, np.empty(0, np.uint8))
        if not first <= start <= first + part.nbytes - size:
            first = start - start % mmap.ALLOCATIONGRANULARITY
            # each part costs a file descriptor: as large as all before it, so that they are few
            length = max(start + size - first, first)
            if os.fstat(self.file.fileno()).st_size < first + length:
                os.ftruncate(self.file.fileno(), first + length)
            part = np.frombuffer(mmap.mmap(self.file.fileno(), length, offset=first), np.uint8)
            self.parts.append((first, part))
        return part[start - first :][:size]

    def place(self, array: np.ndarray) -> int | None:
        """Where a contiguous array lies that was made in it; None: it was not."""
        for start, part in self.parts:
            ahead = array.ctypes.data - part.ctypes.data
            if 0 <= ahead <= part.nbytes - array.nbytes:
                return start + ahead
        return None

    def tensor(self) -> torch.Tensor:
        """uint8 (end,), all of it, of a kind that torch hands to other processes without a copy."""
        storage = torch.UntypedStorage._new_shared_fd_cpu(self.file.fileno(), self.end)
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def pickled(self, result: Any) -> tuple[bytes, list[tuple[int, int]]]:
        """-> the result without its arrays, pickled; place and size of each, in this memory."""
        parts: list[np.ndarray] = []
        content = pickle.dumps(
            result, 5, buffer_callback=lambda buffer: parts.append(np.frombuffer(buffer.raw(), np.uint8))
        )
        return content, [(self._kept(part), part.size) for part in parts]

    def _kept(self, part: np.ndarray) -> int:
        if (place := self.place(part)) is None:
            place = self.end
            self.empty([part.size]).numpy()[:] = part
        return place


def _serve(function: Callable, link: Connection, parent: int) -> NoReturn:
    memory = None
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # the parent is told too, and decides
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
        gc.freeze()  # what the parent made is left to it: a collection here would copy all its pages
        torch.set_num_threads(1)  # the parent's pool of threads is not in a fork
        while os.getppid() == parent:
            args, last, end, new = link.recv()
            memory = SharedMemory(recv_handle(link)) if new else memory
            memory.begin(end)
            try:
                message = memory.pickled(function(*args, memory) if last else function(*args))
            except InputError as error:
                message = memory.pickled(Raised(error))
            except Exception as error:  # whatever it is, the parent raises it
                cause = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                message = memory.pickled(Raised(RuntimeError(cause)))
            link.send(message)
    except (EOFError, ConnectionError):
        pass  # the parent has gone, or closed
    finally:
        os._exit(0)
