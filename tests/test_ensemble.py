"""Scores averaged from dumps are those of one scoring over all their views."""

import csv
import io
import json

import numpy as np
import pytest
from test_end_to_end import run, score, trained  # noqa: F401

from stvit_video import cli
from stvit_video.cli import ensembling


def views_of(path):
    with np.load(path / "views.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def scorings(trained, tmp_path_factory, demo_root):  # noqa: F811
    """By two and by one clip, which together are the three of the last; one video cannot be read."""
    folder = tmp_path_factory.mktemp("scorings")
    lines = [f"{path} {i % 8}" for i, path in enumerate(sorted(demo_root.glob("test/*/*.mp4")))]
    (folder / "broken.mp4").write_bytes(b"\0" * 99)
    (folder / "list.txt").write_text("\n".join([*lines, f"{folder}/broken.mp4 1"]))
    for name, clips in (("ends", 2), ("middle", 1), ("all", 3)):
        given = [f"--eval.clips={clips}", "--eval.dump_views=true", f"--data.test={folder}/list.txt"]
        score(trained, folder / name, *given)
    return folder


def test_two_dumps_are_one_scoring_over_all_views(scorings, tmp_path, monkeypatch):
    kept = []
    real = ensembling.write_report
    monkeypatch.setattr(
        ensembling, "write_report", lambda *args, **options: kept.append(args[2]) or real(*args, **options)
    )
    assert (
        run(cli.ensemble, scorings / "ends", scorings / "middle" / "views.npz", "--output", tmp_path) == 0
    )
    expected = views_of(scorings / "all")["scores"].mean(1)
    for i, record in enumerate(kept[0].records[:-1]):
        np.testing.assert_allclose(record["scores"], expected[i], atol=1e-6, rtol=0)
    assert kept[0].records[-1] is None
    ours, theirs = (json.loads((path / "report.json").read_text()) for path in (tmp_path, scorings / "all"))
    for key in ("top1", "top5", "mean_class_accuracy", "num_videos", "num_failed"):
        assert ours[key] == theirs[key], key
    assert ours["per_clip_top1"] == pytest.approx(theirs["per_clip_top1"])
    tables = [(path / "predictions.csv").read_text() for path in (tmp_path, scorings / "all")]
    rows = [list(csv.DictReader(io.StringIO(table))) for table in tables]
    for one, other in zip(*rows, strict=True):
        assert (one["path"], one["label"], one["prediction"]) == (
            other["path"], other["label"], other["prediction"]
        )  # fmt: skip


@pytest.mark.parametrize("key", ["class_names", "paths", "labels"])
def test_dumps_of_other_videos_or_classes_are_refused(scorings, tmp_path, capsys, key):
    dump = views_of(scorings / "middle")
    dump[key] = dump[key][::-1]
    np.savez(tmp_path / "other.npz", **dump)
    assert run(cli.ensemble, scorings / "ends", tmp_path / "other.npz", f"--output={tmp_path}/out") == 2
    assert f"other.npz: has other {key.replace('_', ' ')} than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_dump_is_one_line(scorings, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("scores")
    (tmp_path / "empty.npz").write_text("")
    np.save(tmp_path / "array.npy", np.eye(2))
    whole = (scorings / "ends" / "views.npz").read_bytes()
    damaged = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]  # within the deflated scores
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for path in (*tmp_path.iterdir(), tmp_path / "none", tmp_path):
        assert run(cli.ensemble, path, f"--output={tmp_path}/out") == 2
        assert "no scores of views (stvit-test --eval.dump_views" in capsys.readouterr().err
    assert run(cli.ensemble, scorings / "ends", f"--output={scorings}/ends") == 2
    assert "its report would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("scores", lambda scores: scores[:, :0]),
        ("scores", lambda scores: scores[0]),
        ("scores", lambda scores: scores.astype(str)),
        ("labels", lambda labels: labels[1:]),
        ("labels", lambda labels: labels + 100),
        ("labels", lambda labels: labels.astype(str)),
        ("class_names", lambda names: names[1:]),
    ],
)
def test_a_dump_whose_parts_do_not_fit_is_one_line(scorings, tmp_path, capsys, key, change):
    dump = views_of(scorings / "middle")
    np.savez(tmp_path / "other.npz", **{**dump, key: change(dump[key])})
    assert run(cli.ensemble, tmp_path / "other.npz", f"--output={tmp_path}/out") == 2
    assert "other.npz: scores of shape" in capsys.readouterr().err


def test_several_labels_a_video(tmp_path):
    scores = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)  # dumps, videos, views, classes
    labels = np.array([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [-1] * 5])
    names = {"paths": np.array(list("abc")), "class_names": np.array(list("vwxyz")), "labels": labels}
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", scores=scores[i], **names)
    assert run(cli.ensemble, tmp_path / "0.npz", tmp_path / "1.npz", f"--output={tmp_path}/out") == 0
    with np.load(tmp_path / "out" / "scores.npz") as file:
        np.testing.assert_allclose(file["scores"], scores.mean((0, 2)), atol=1e-6)
        np.testing.assert_array_equal(file["labels"], labels)
