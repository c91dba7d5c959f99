"""A process that opens and reads thousands of clips stays as large as it was; workers own no rows."""

import subprocess
import sys
from pathlib import Path

import pytest

READ = """
import os, sys
from pathlib import Path
from stvit_video.data.annotations import Row
from stvit_video.data.dataset import VideoDataset
from stvit_video.data.transforms import TrainTransform
from stvit_video.data.views import Sampling, TrainViews

folder, decoder, number, after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rows = [Row(str(path), 0) for path in sorted(folder.glob("*/*.mp4"))]
data = VideoDataset(rows, TrainViews(Sampling("dense", 8, 2), TrainTransform(48)), decoder=decoder)
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
for i in range(number):
    if i == after:
        start = pages()
    assert data[i, i % len(rows)].clips is not None
print((pages() - start) * os.sysconf("SC_PAGE_SIZE") / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("number", "after"), [(300, 100), pytest.param(5000, 500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_reading_clips_does_not_grow_the_process(demo_root, decoder, number, after):
    command = [sys.executable, "-c", READ, str(demo_root / "train"), decoder, str(number), str(after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout)
    print(f"{decoder}: {number - after} clips after the first {after} grow the process by {grown:.1f} MB")
    assert grown < 50


WORKER = """
import gc, random
from torch.utils.data import Dataset
from stvit_video.data.annotations import Row, Rows
from stvit_video.data.batch import Sample
from stvit_video.data.dataset import TestSampler, make_loader

class Probe(Dataset):
    rows = Rows(Row(f"/data/videos/class/{i:011d}_000001_000011.mp4", i % 400) for i in range(300_000))

    def __getitem__(self, item):
        order = list(range(len(self.rows)))
        random.shuffle(order)
        assert all(self.rows[i].target == i % 400 for i in order)
        del order
        gc.collect()
        lines = [line.split() for line in open("/proc/self/smaps_rollup")]
        private = sum(int(line[1]) for line in lines if line[0].startswith("Private_"))
        return Sample(item[1], None, [], [("private", str(private / 1024))])

loader = make_loader(Probe(), TestSampler(1), batch_size=1, workers=1, pin_memory=False)
print(next(iter(loader)).failures[0][1])
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_rows_do_not_multiply_in_workers():
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20  # MB
