"""Commands in processes of their own, forked from this one: as torchrun does, without its imports."""

import multiprocessing
import os
import socket
import sys
import time

CONTEXT = multiprocessing.get_context("fork")


def launch(command, *args, ranks=1, log=os.devnull, before=None):
    """Start `command` on so many ranks of one machine; their output goes to the file `log`.

    before: called in every process first, with its rank: what is to go wrong there.
    """
    port = free_port()
    given = [str(arg) for arg in args]
    started = [
        CONTEXT.Process(target=_work, args=(command, given, rank, ranks, port, log, before))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    return started


def finish(processes, timeout=120):
    """Their exit codes; none of them is left behind."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(process.exitcode is None for process in processes):
        time.sleep(0.01)  # `join` with a limit waits for their loader workers too
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _work(command, args, rank, ranks, port, log, before):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if before is not None:
        before(rank)
    command(args)
