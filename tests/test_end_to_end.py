"""From lists to reports, through the commands; small enough to run in seconds."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import finish, launch

import stvit_video
from stvit_video import cli
from stvit_video.engine import checkpoint
from stvit_video.files import write_torch
from stvit_video.resume import discard_run

TRAIN_NET = str(Path(__file__).parents[1] / "tools" / "train_net.py")
SMALL = """
device: cpu
model: {name: stvit_tiny_patch16_224, patch_size: [2, 8, 8], embed_dim: 24, depth: 4, num_heads: 2,
  base_depth: 1, semantic_tokens: [2, 2, 2], drop_path: 0.1}
data: {preset: custom, num_frames: 4, stride: 2, image_size: 24, flip: swap, rand_augment: [1, 5],
  repeats: 2, workers: 0}
train: {epochs: 2, batch_size: 4, accumulate: 2, lr: 1e-3, lr_per: 8, warmup_epochs: 1, clip_grad: 1.0,
  label_smoothing: 0.1, erasing: 0.25, mixup: 0.8, cutmix: 1.0, ema: 0.9, layer_decay: 0.8, log_every: 1}
eval: {clips: 2, crops: 3, batch_size: 3, view_batch: 5}
"""


def settings(folder, demo_root, text=SMALL):
    path = folder / "small.yaml"
    path.write_text(text)
    return ["--cfg", str(path), f"--data.train={demo_root}/train", f"--data.val={demo_root}/test"]


def run(command, *args):
    """A command as the shell would run it; -> exit code."""
    try:
        command([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_root):
    folder = tmp_path_factory.mktemp("trained")
    args = settings(folder, demo_root)
    torch.manual_seed(0)
    assert run(cli.train, *args, f"--output={folder}/run") == 0
    return folder / "run", args


def figures(run_folder):
    """A run's log without timings."""
    entries = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        for key in ("seconds", "clips_per_second", "data_wait"):
            entry.pop(key, None)
    return entries


def assert_same(a, b):
    """Two nested states, equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_runs(a, b):
    """Model, averages, optimiser and schedule to the last bit; the log without timings."""
    for name in ("last.pt", "best.pt"):
        states = [checkpoint.load(folder / name) for folder in (a, b)]
        for state in states:
            del state["config"]
        assert_same(*states)
    assert figures(a) == figures(b)


def train_in_two(args, output, monkeypatch, saves=2):
    """A run that is interrupted when so many checkpoints are written, one an update; and then resumed."""
    save_last, written = checkpoint.save_last, []

    def stopped(folder, values):
        save_last(folder, values)
        written.append(values["update"])
        if written == list(range(1, saves + 1)):
            raise KeyboardInterrupt

    given = [*args, f"--output={output}", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_last", stopped)
        assert run(cli.train, *given, "--train.checkpoint_minutes=0") == 130
    assert run(cli.train, *given) == 0


def test_scoring_with_other_class_names_is_refused(trained, tmp_path, capsys):
    """Videos would be scored as classes that the model does not know."""
    folder, args = trained
    names = torch.load(folder / "last.pt")["class_names"]
    for listed, code in ((names, 0), ([*names[:-1], "skating"], 2)):
        (tmp_path / "names.txt").write_text("\n".join(listed))
        given = [f"--checkpoint={folder}/last.pt", f"--data.class_names={tmp_path}/names.txt"]
        assert run(cli.test, *args, *given, f"--output={tmp_path}/out", "--eval.clips=1") == code
    assert "names other classes than the checkpoint's" in capsys.readouterr().err


def test_training_leaves_checkpoints_logs_and_pictures(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    wanted = {"last.pt", "best.pt", "log.jsonl", "curves.png", "config.yaml", "tensorboard"}
    assert wanted <= names
    entries = figures(folder)
    assert [e["kind"] for e in entries] == ["step"] * 3 + ["epoch"] + ["step"] * 3 + ["epoch"]
    assert entries[-1]["step"] == 6  # 24 videos, batches of 4, two an update
    assert 0 <= entries[-1]["val_top1"] <= 1
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["epoch"] == 2
    assert state["class_names"][2] == "move_left"
    assert state["random"] == {"seed": 0, "rule": "(seed, update, rank)"}
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])


def test_a_run_is_not_overwritten_or_resumed_by_accident(trained, tmp_path, capsys):
    folder, args = trained
    before = (folder / "last.pt").read_bytes()
    assert run(cli.train, *args, f"--output={folder}") == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert run(cli.train, *args, f"--output={folder}", "--resume", "--model.depth=5") == 2
    assert "model.depth=4" in capsys.readouterr().err
    assert run(cli.train, *args, f"--output={folder}", "--resume", "--seed=5") == 2
    assert "began with seed=0" in capsys.readouterr().err
    assert (folder / "last.pt").read_bytes() == before


def score(trained, output, *more):
    folder, args = trained
    assert run(cli.test, *args, f"--checkpoint={folder}/best.pt", f"--output={output}", *more) == 0
    return json.loads((output / "report.json").read_text())


def test_scoring(trained, tmp_path, demo_root):
    report = score(trained, tmp_path)
    assert report["num_videos"] == 11
    assert report["num_failed"] == 0
    assert report["views"] == {"clips": 2, "crops": 3}
    assert report["checkpoint"].endswith("best.pt")
    assert {"top1", "top5", "mean_class_accuracy", "per_clip_top1", "seconds"} <= report.keys()
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows) == 11
    right = [row["label"] == row["prediction"] for row in rows]
    assert report["top1"] == pytest.approx(sum(right) / 11)
    for row in rows:
        assert row["label_name"] == Path(row["path"]).parent.name
        assert row["prediction_name"] == row["top1_name"]
        shares = [float(row[f"top{i}_score"]) for i in range(1, 6)]
        assert shares == sorted(shares, reverse=True)
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_what_the_model_says_view_by_view(trained, tmp_path, demo_root):
    """The scorer's scores against a loop over views written out here."""
    folder, _ = trained
    score(trained, tmp_path)
    recognize = stvit_video.Recognizer(folder / "best.pt", device="cpu")
    state = torch.load(folder / "best.pt", weights_only=True)
    assert_same(dict(recognize.model.state_dict()), dict(state["ema"]))
    with open(tmp_path / "predictions.csv", newline="") as file:
        row = list(csv.DictReader(file))[4]
    with stvit_video.open_video(row["path"]) as video:
        last = video.num_frames - 7
        frames = video.read([0, 2, 4, 6, *range(last, last + 7, 2)])
    frames = torch.nn.functional.interpolate(frames, size=(24, 32), mode="bilinear", antialias=True)
    total = 0
    for clip in (frames[:4], frames[4:]):
        for left in (0, 4, 8):
            view = clip[..., left : left + 24].float().transpose(0, 1)[None] / 255
            view = view - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
            view = view / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
            with torch.no_grad():
                total = total + recognize.model(view).softmax(-1)[0] / 6
    assert float(row["top1_score"]) == pytest.approx(total.max().item(), abs=1e-4)
    name, found = recognize(row["path"])[0]
    assert (name, found) == (row["top1_name"], pytest.approx(float(row["top1_score"]), abs=1e-5))


def test_unreadable_videos_count_as_wrong(trained, tmp_path, demo_root):
    lines = [f"{path} {i % 8}" for i, path in enumerate(sorted(demo_root.glob("test/*/*.mp4")))]
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 99)
    lines.insert(3, f"{tmp_path}/broken.mp4 1")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    report = score(trained, tmp_path, f"--data.test={tmp_path}/list.txt")
    assert (report["num_videos"], report["num_failed"]) == (12, 1)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[3]["prediction"] == "-1"
    assert rows[3]["failure"].startswith("Invalid data found")
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert report["top1"] == pytest.approx(right / 12)


def test_two_processes_train_like_one(tmp_path, demo_root):
    """Without what is drawn by rank, two ranks of half the batch make the same updates as one."""
    plain = SMALL.replace("repeats: 2", "repeats: 1").replace("drop_path: 0.1", "drop_path: 0.0")
    plain = plain.replace("erasing: 0.25, mixup: 0.8, cutmix: 1.0,", "")
    args = [*settings(tmp_path, demo_root, plain), "--train.accumulate=1"]
    assert run(cli.train, *args, f"--output={tmp_path}/one", "--train.batch_size=4") == 0
    two = [*args, f"--output={tmp_path}/two", "--train.batch_size=2"]
    assert finish(launch(cli.train, *two, ranks=2)) == [0, 0]
    states = [torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("one", "two")]
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(value, states[1]["model"][name], atol=1e-4, rtol=1e-3)
    logs = [figures(tmp_path / name) for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    assert logs[0][-1]["loss"] == pytest.approx(logs[1][-1]["loss"], abs=1e-4)


def test_the_checkpoint_decides_what_the_model_is(trained, tmp_path, capsys):
    folder, args = trained
    given = [*args, f"--checkpoint={folder}/best.pt", f"--output={tmp_path}"]
    assert run(cli.test, *given, "--data.num_frames=8") == 2
    assert "the checkpoint was made with 4" in capsys.readouterr().err
    assert run(cli.test, *given, "--seed=5") == 2, "it says which rows are held back"
    assert capsys.readouterr().err == "error: --seed 5: the checkpoint was made with 0\n"
    text = Path(args[1]).read_text().replace("embed_dim: 24", "embed_dim: 48")
    (tmp_path / "other.yaml").write_text(text)
    args = ["--cfg", str(tmp_path / "other.yaml"), *args[2:]]
    assert score((folder, args), tmp_path)["num_videos"] == 11


@pytest.mark.parametrize("command", [cli.train, cli.check])
def test_a_number_that_is_no_class_id_does_not_take_all_memory(tmp_path, demo_root, capsys, command):
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 123456789\n")
    args = settings(tmp_path, demo_root)
    assert run(command, *args, f"--data.train={tmp_path}/list.txt", f"--output={tmp_path}/run") == 2
    assert "list.txt: 123456790 classes by the highest label, expected" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_into_is_refused_before_the_work(
    trained, tmp_path, monkeypatch, capsys
):
    folder, args = trained
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))  # as root
    monkeypatch.setattr("stvit_video.cli.scoring.score", lambda *args, **options: pytest.fail("scored"))
    assert run(cli.test, *args, f"--checkpoint={folder}/best.pt", f"--output={tmp_path}") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no file can be written into this folder\n"


@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_bad_checkpoints_end_in_one_line(trained, tmp_path, capsys, damage):
    folder, args = trained
    path = tmp_path / "bad.pt"
    if damage == "truncated":
        path.write_bytes((folder / "best.pt").read_bytes()[:5000])
    elif damage == "text":
        path.write_text("not a checkpoint")
    assert run(cli.test, *args, f"--checkpoint={path}", f"--output={tmp_path}/out") == 2
    assert run(cli.predict, f"--checkpoint={path}", "a.mp4") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {path}: ") for line in lines)


def test_predict(trained, tmp_path, demo_root, capsys):
    folder, _ = trained
    videos = sorted(demo_root.glob("test/*/*.mp4"))[:2]
    features, maps = tmp_path / "features.npz", tmp_path / "maps"
    code = run(
        cli.predict,
        f"--checkpoint={folder}/best.pt",
        "--json",
        f"--features={features}",
        f"--maps={maps}",
        *videos,
    )
    assert code == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["path"] for entry in found] == [str(path) for path in videos]
    for entry in found:
        scores = [guess["score"] for guess in entry["predictions"]]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
    saved = np.load(features)
    assert saved[str(videos[0])].shape == (24,)
    assert {path.stem for path in maps.iterdir()} == {path.stem for path in videos}

    assert run(cli.predict, f"--checkpoint={folder}/best.pt", demo_root / "test") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 * 6
    assert lines[1].split()[1] == found[0]["predictions"][0]["name"]

    assert run(cli.predict, f"--checkpoint={folder}/best.pt", "gone.mp4", videos[0]) == 1
    captured = capsys.readouterr()
    assert "gone.mp4" in captured.err
    assert captured.out.splitlines()[0] == str(videos[0])


@pytest.mark.parametrize("flags", [["--json"], [], ["--timeline"]])
def test_scores_that_are_no_numbers_are_no_prediction(trained, tmp_path, demo_root, capsys, flags):
    """NaN is no JSON, and its best class is no answer."""
    values = torch.load(trained[0] / "best.pt", weights_only=True)
    values["ema"]["head.bias"].fill_(float("nan"))
    write_torch(tmp_path / "nan.pt", values)
    flags = [*flags, *[f"{tmp_path}/timeline"] * (flags == ["--timeline"])]
    video = next(demo_root.glob("test/*/*.mp4"))
    assert run(cli.predict, f"--checkpoint={tmp_path}/nan.pt", *flags, video) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("error: the model's scores are no numbers: it diverged")


def test_features_are_what_the_head_sees(trained, demo_root):
    recognize = stvit_video.Recognizer(trained[0] / "best.pt", clips=1, crops=1, device="cpu")
    path = next(demo_root.glob("test/*/*.mp4"))
    scores = recognize.model.head(recognize.features(path)).softmax(-1)
    best = recognize(path)[0]
    assert best.score == pytest.approx(scores.max().item(), abs=1e-5)
    assert recognize.class_names[scores.argmax()] == best.name


def test_image_mode(tmp_path, demo_root):
    text = SMALL.replace("num_frames: 4", "num_frames: 1").replace("[2, 8, 8]", "[1, 8, 8]")
    text = text.replace("semantic_tokens: [2, 2, 2]", "semantic_tokens: [1, 2, 2]")
    args = settings(tmp_path, demo_root, text)
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--data.sampling=middle") == 0
    report = score((tmp_path / "run", args), tmp_path)  # the settings say dense, and two clips
    assert report["num_videos"] == 11
    assert report["views"] == {"clips": 1, "crops": 3}, "all clips would be the middle one"


@pytest.mark.parametrize("name", ["ptv_x3d_m", "vit_tiny_patch16_224"])
def test_baselines_train_and_score_in_the_same_pipeline(tmp_path, demo_root, name):
    model = "model: {name: " + name + "}" if name.startswith("ptv") else (
        "model: {name: " + name + ", embed_dim: 24, depth: 2, num_heads: 2, patch_size: [2, 8, 8]}"
    )  # fmt: skip
    start = SMALL.index("model:")
    text = SMALL[:start] + model + SMALL[SMALL.index("\ndata:") :]
    text = text.replace("image_size: 24", "image_size: 32").replace("layer_decay: 0.8", "ema: null")
    text = text.replace("ema: 0.9, ", "").replace("epochs: 2", "epochs: 1")
    args = settings(tmp_path, demo_root, text)
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--train.layer_decay=null") == 0
    assert score((tmp_path / "run", args), tmp_path)["num_videos"] == 11


def test_no_readable_video_is_one_line(tmp_path, demo_root, capsys):
    (tmp_path / "list.txt").write_text("".join(f"gone{i}.mp4 {i}\n" for i in range(5)))
    args = settings(tmp_path, demo_root)[:2]
    code = run(cli.train, *args, f"--data.train={tmp_path}/list.txt", "--data.flip=none",
               f"--output={tmp_path}/run")  # fmt: skip
    assert code == 2
    assert "gone" in capsys.readouterr().err.splitlines()[-1]


def test_places_that_cannot_be_written_are_told_before_the_work(trained, tmp_path, capsys):
    folder, args = trained
    (tmp_path / "file").write_text("")
    best = f"--checkpoint={folder}/best.pt"
    assert run(cli.test, *args, best, f"--output={tmp_path}/file") == 2
    assert run(cli.train, *args, f"--output={tmp_path}/file/run") == 2
    assert run(cli.predict, best, f"--maps={tmp_path}/file", "a.mp4") == 2
    assert run(cli.predict, best, "--device=foo", "a.mp4") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 4


def test_a_run_cannot_both_go_on_and_be_discarded(capsys):
    assert run(cli.train, "--resume", "--overwrite") == 2
    assert capsys.readouterr().err.startswith("error: --resume or --overwrite, not both")


def test_overwrite_discards_the_former_run(tmp_path, demo_root):
    args = [*settings(tmp_path, demo_root), f"--output={tmp_path}/run", "--train.epochs=1"]
    assert run(cli.train, *args) == 0
    assert (tmp_path / "run" / "best.pt").exists()
    (tmp_path / "run" / "report.json").write_text("{}")  # of that best.pt
    assert run(cli.train, *args, "--overwrite", "--data.val=null") == 0
    assert not (tmp_path / "run" / "best.pt").exists()
    assert not (tmp_path / "run" / "report.json").exists()
    (tmp_path / "report.json").write_text("{}")
    discard_run(tmp_path)
    assert (tmp_path / "report.json").exists()  # there was no run beside it


@pytest.mark.parametrize(
    "end",
    [b'{"step": 6, "ki', b"\0" * 9, b"\xff\x80", b"6\n", b'{"step": 6}\n', b'{"kind": "step"}\n',
     b'{"kind": "step", "step": "6"}\n', b'{"kind": "x", "x": 6}\n'],
)  # fmt: skip
def test_a_log_cut_off_by_a_kill_can_be_resumed(tmp_path, end):
    from stvit_video.engine.logs import RunLog, read_log

    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 1, "kind": "epoch"}\n' + end)
    RunLog(tmp_path, epoch=1, update=7).close()
    assert read_log(tmp_path / "log.jsonl") == [{"epoch": 1, "kind": "epoch"}]


@pytest.mark.parametrize("name", ["x", "x.foo"])
def test_curves_are_a_png(tmp_path, capsys, name):
    assert run(cli.curves, tmp_path, f"--picture={tmp_path}/{name}") == 2
    assert f"{name}: must end in .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["foo,bar\n1,2\n", "epoch,path\nx,a\n", "epoch,path\n\n", "\n", 'epoch\n"1' + 200_000 * "x" + "\n"],
)
def test_of_a_damaged_list_of_trouble_nothing_is_kept(tmp_path, text):
    from stvit_video.engine.logs import cut_rows

    (tmp_path / "unreadable.csv").write_text(text)
    cut_rows(tmp_path / "unreadable.csv", "epoch", 3)
    assert not (tmp_path / "unreadable.csv").exists()


def test_trouble_with_any_name_is_cut_by_its_number(tmp_path):
    from stvit_video.engine.logs import append_rows, cut_rows

    path, names = tmp_path / "unreadable.csv", ["a\rb.mp4", "c\nd,e.mp4", 'f"\r\ng.mp4', "\udcff.mp4"]
    append_rows(path, ("epoch", "path"), [(epoch, name) for epoch in (1, 2) for name in names])
    with open(path, "a") as file:
        file.write("1,cut o")
    cut_rows(path, "epoch", 1)
    with open(path, newline="", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [["epoch", "path"], *(["1", name] for name in names)]
