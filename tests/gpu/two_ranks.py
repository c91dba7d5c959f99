"""Started by torchrun: two ranks make three updates of one model in each way; or rank 1 comes to an end."""

import os
import signal
import sys
import traceback

import torch
from test_gpu import make_batch, make_model, start

from stvit_video.engine import distributed
from stvit_video.engine.uploads import Uploads


def main(name, *ways, end=None):
    device = distributed.start(name)
    for parallel in ways:
        task, run = start(make_model("vit_tiny_patch16_224"), device, parallel=parallel)
        run.model.train()
        losses = []
        for i in range(3):
            if end and i == 1 and distributed.rank() == 1:
                if end == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("injected into rank 1")
            batch = make_batch(i + 10 * distributed.rank())
            losses.append(run.make_update(task, Uploads([batch], device), 1, seed=0).losses["loss"])
        if distributed.is_main():
            print(f"{parallel} losses:", *losses, flush=True)
    distributed.stop()


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    try:
        words = sys.argv[1:]
        end = words.pop() if words[-1] in ("raise", "kill") else None
        main(*words, end=end)
    except Exception:  # as a command does: told, and left at once
        traceback.print_exc()
        distributed.leave(1)
