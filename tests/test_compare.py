"""stvit-compare: intervals and p values against reference values, and what it says of runs."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from test_end_to_end import run
from test_report import NORMALISE, Page, browser, made, multilabel, no_picture, opened, three_classes  # noqa: F401

from stvit_video import cli
from stvit_video.reports import statistics
from stvit_video.reports.compare import Verdict, read_scoring
from stvit_video.tasks.multilabel import MultiLabel


def resampled(videos, count, seed=0):
    """Every resample as a list of videos, and as weights."""
    weights = np.concatenate(list(statistics.resamples(videos, count, seed)))
    assert (weights.sum(1) == videos).all()
    return [np.repeat(np.arange(videos), drawn) for drawn in weights], weights


def test_accuracies_are_those_of_a_loop_over_resamples():
    generator = np.random.default_rng(1)
    labels, right = generator.integers(5, size=40), generator.random(40) < 0.6
    lists, weights = resampled(40, 50)
    top1 = [right[drawn].mean() for drawn in lists]
    by_class = [
        np.mean([right[drawn][labels[drawn] == c].mean() for c in np.unique(labels[drawn])])
        for drawn in lists
    ]
    np.testing.assert_allclose(statistics.accuracy(right)(weights), top1)
    np.testing.assert_allclose(statistics.mean_class_accuracy(right, labels)(weights), by_class)


def test_mean_average_precisions_are_those_of_a_loop_over_resamples():
    generator = np.random.default_rng(2)
    scores = generator.integers(8, size=(30, 4)) / 8  # with ties
    labels = generator.random((30, 4)) < (0.5, 0.2, 0.05, 0.0)  # some resamples lack the third class
    lists, weights = resampled(30, 40)
    assert any(not labels[drawn, 2].any() for drawn in lists)
    expected = [
        np.mean([
            average_precision_score(labels[drawn, c], scores[drawn, c])
            for c in range(4) if labels[drawn, c].any()
        ])
        for drawn in lists
    ]  # fmt: skip
    np.testing.assert_allclose(statistics.mean_average_precision(scores, labels)(weights), expected)


def test_the_interval_is_that_of_a_bootstrap_written_out():
    right = np.random.default_rng(3).random(60) < 0.7
    values = statistics.bootstrap([statistics.accuracy(right)], 60, count=4000)
    assert values.shape == (1, 4000)
    generator = np.random.default_rng(99)  # another one: the interval does not hang on the draw
    reference = sorted(np.mean([right[generator.integers(60)] for _ in range(60)]) for _ in range(4000))
    low, high = statistics.interval(values[0])
    assert low == pytest.approx(reference[100], abs=1.01 / 60)  # one video
    assert high == pytest.approx(reference[3899], abs=1.01 / 60)
    spread = math.sqrt(right.mean() * (1 - right.mean()) / 60)  # of the mean, by the binomial distribution
    assert values.std() == pytest.approx(spread, rel=0.05)


def test_memory_does_not_grow_with_the_resamples():
    first = next(statistics.resamples(20_000, 10_000, 0))
    assert first.shape == (100, 20_000)


def test_mcnemar_by_hand():
    """Of 10 videos that one run alone has right, 9 are the same one's: 2 (C(10, 0) + C(10, 1)) / 2^10."""
    a = np.array([True] * 9 + [False] + [True] * 5 + [False] * 4)
    b = np.array([False] * 9 + [True] + [True] * 5 + [False] * 4)
    assert statistics.mcnemar(a, b) == pytest.approx(22 / 1024)
    assert statistics.mcnemar(b, a) == pytest.approx(22 / 1024)
    assert statistics.mcnemar(a, a) == 1


def test_p_values_of_several_comparisons_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert statistics.two_sided(np.array([1.0] * 98 + [-1.0])) == pytest.approx(4 / 100)
    assert statistics.two_sided(np.zeros(99)) == 1


def test_the_verdict_in_words():
    verdict = Verdict("A", "B", 0.031, 0.012, 0.05, 0.003)
    assert verdict.sentence("top-1") == (
        "A is better than B: +3.1 points of top-1, 95% interval 1.2 to 5.0, p = 0.003"
    )
    same = verdict._replace(p=0.2, low=-0.01)
    assert same.sentence("top-1").startswith("no difference shown between A and B: +3.1 points")


def scored(folder, right, *, labels=None, paths=None, failures=None, on_failure="wrong"):
    """A scoring of three classes that has these videos right."""
    folder.mkdir()
    labels = [i % 3 for i in range(len(right))] if labels is None else labels
    guesses = [label if hit else (label + 1) % 3 for label, hit in zip(labels, right, strict=True)]
    made(
        folder,
        three_classes(on_failure=on_failure),
        labels,
        np.eye(3)[guesses] * 0.6 + 0.1,
        paths=paths,
        failures=failures,
    )
    return folder


def compared(capsys, *args):
    code = run(cli.compare, *args, "--resamples=2000")
    out = capsys.readouterr()
    return code, out.out.splitlines(), out.err.strip()


def test_runs_with_the_same_figures_show_no_difference_and_others_do(tmp_path, capsys):
    generator = np.random.default_rng(0)
    good, same, bad = (generator.random(90) < share for share in (0.9, 0.9, 0.5))
    folders = [scored(tmp_path / n, r) for n, r in (("good", good), ("same", same), ("bad", bad))]
    code, lines, _ = compared(capsys, *folders[:2], "--to", tmp_path / "a" / "page.html")
    assert code == 0
    assert sum("no difference shown between" in line for line in lines) == 1
    code, lines, _ = compared(capsys, *folders, "--to", tmp_path / "page.html")
    better = [line for line in lines if "is better than" in line]
    assert [line.split(":")[0] for line in better] == ["good is better than bad", "same is better than bad"]
    assert any("corrected for 3 comparisons (Holm)" in line for line in lines)

    page = Page(tmp_path / "page.html")
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    keys = "top1", "top5", "mean_class_accuracy"
    assert page.values == pytest.approx([report[key] for report in reports for key in keys])
    differing = (good != same) | (good != bad)
    assert len(page.data["paths"]) == differing.sum()
    hits = [[video[2] for video in said] for said in page.data["said"]]
    np.testing.assert_array_equal(hits, [good[differing], same[differing], bad[differing]])


def test_the_difference_is_that_of_paired_resamples(tmp_path, capsys):
    """Runs that differ on few videos differ by little, however wide the interval of each."""
    right = np.arange(60) % 2 == 0
    other = right.copy()
    other[:2] = False
    folders = [scored(tmp_path / "a", right), scored(tmp_path / "b", other)]
    _, lines, _ = compared(capsys, *folders, "--to", tmp_path / "page.html")
    line = next(line for line in lines if "between a and b" in line)
    low, high = (float(word) for word in line.split("interval ")[1].split(",")[0].split(" to "))
    assert (low, high) == (0, 5)  # 0 or 3 of 60 videos, instead of 25 points


def test_of_several_labels_mean_average_precision_is_compared(tmp_path, capsys):
    generator = np.random.default_rng(0)
    targets = [tuple(np.flatnonzero(generator.random(4) < 0.4).tolist()) for _ in range(50)]
    targets[7] = None
    chosen = np.array([[c in (target or ()) for c in range(4)] for target in targets])
    reports = []
    for name, noise in (("sharp", 0.3), ("dull", 3)):
        (tmp_path / name).mkdir()
        noisy = chosen + noise * generator.random((50, 4))
        reports.append(made(tmp_path / name, multilabel(), targets, noisy, failures={3: "gone"}))
    code, lines, _ = compared(capsys, tmp_path / "dull", tmp_path / "sharp", "--to", tmp_path / "page.html")
    assert code == 0
    assert Page(tmp_path / "page.html").values == pytest.approx([r["mAP"] for r in reversed(reports)])
    assert lines[1].startswith("sharp is better than dull: +")
    assert "points of mAP" in lines[1]
    (tmp_path / "dull" / "scores.npz").unlink()
    code, _, error = compared(capsys, tmp_path / "dull", tmp_path / "sharp", "--to", tmp_path / "p.html")
    assert (code, "has no scores.npz" in error) == (2, True)
    scored(tmp_path / "one", [True] * 50)
    code, _, error = compared(capsys, tmp_path / "one", tmp_path / "sharp", "--to", tmp_path / "p.html")
    assert (code, "not alike" in error) == (2, True)


def test_other_lists_are_compared_on_what_they_share(tmp_path, capsys):
    paths = [f"/v/{i}.mp4" for i in range(8)] + ["/v/0.mp4"]  # one stands there twice
    scored(tmp_path / "a", [True] * 9, labels=[0] * 9, paths=paths)
    scored(tmp_path / "b", [True, False] * 3, labels=[0] * 6, paths=["/w.mp4", *paths[4:]])
    code, lines, _ = compared(capsys, tmp_path / "a", tmp_path / "b", "--to", tmp_path / "page.html")
    assert code == 0
    [line] = [line for line in lines if "Compared are the 5 labelled videos" in line]
    assert "a has 9, b has 6" in line
    scored(tmp_path / "c", [True], labels=[1], paths=["/v/0.mp4"])
    code, _, error = compared(capsys, tmp_path / "a", tmp_path / "c", "--to", tmp_path / "page.html")
    assert (code, error.count("\n")) == (2, 0)
    assert "/v/0.mp4: its label is" in error


@pytest.mark.parametrize(("on_failure", "top1"), [("wrong", 0.8), ("exclude", 1.0)])
def test_what_could_not_be_read_counts_as_the_report_says(tmp_path, capsys, on_failure, top1):
    for name, failures in (("a", {0: "gone", 5: "gone"}), ("b", {})):
        scored(tmp_path / name, [True] * 10, failures=failures, on_failure=on_failure)
    compared(capsys, tmp_path / "a", tmp_path / "b", "--to", tmp_path / "page.html")
    assert Page(tmp_path / "page.html").values[0] == pytest.approx(top1)


def test_wrong_runs_end_in_one_line(tmp_path, capsys):
    scored(tmp_path / "a", [True] * 4)
    scored(tmp_path / "b", [True] * 4, paths=[f"/elsewhere/{i}.mp4" for i in range(4)])
    (tmp_path / "empty").mkdir()
    scored(tmp_path / "cut", [True] * 4)
    (tmp_path / "cut" / "report.json").write_text("{")
    scored(tmp_path / "text", [True] * 4)
    (tmp_path / "text" / "predictions.csv").write_text("not,a\ntable,!\n")
    for name in ("old", "torn", "list"):
        scored(tmp_path / name, [True] * 4)
    table = (tmp_path / "old" / "predictions.csv").read_text()
    (tmp_path / "old" / "predictions.csv").write_text(table.replace("top1_name", "name"))
    (tmp_path / "torn" / "predictions.csv").write_text(table[:-20])
    (tmp_path / "list" / "report.json").write_text("[]")
    (tmp_path / "zip").mkdir()
    made(tmp_path / "zip", multilabel(), [(0,)] * 4, np.eye(4))
    arrays = (tmp_path / "zip" / "scores.npz").read_bytes()
    (tmp_path / "zip" / "scores.npz").write_bytes(arrays[:-30])
    shutil.copytree(tmp_path / "zip", tmp_path / "hole")
    damaged = arrays[:100] + bytes(byte ^ 255 for byte in arrays[100:140]) + arrays[140:]
    (tmp_path / "hole" / "scores.npz").write_bytes(damaged)
    shutil.copytree(tmp_path / "zip", tmp_path / "npy")
    with open(tmp_path / "npy" / "scores.npz", "wb") as file:
        np.save(file, np.eye(4))
    for args, cause in (
        (["a", "hole"], "not a scoring that can be read"),
        (["a", "npy"], "not a scoring that can be read"),
        (["a"], "to compare takes two or more"),
        (["a", "empty"], "holds no scoring (no report.json)"),
        (["a", "missing"], "holds no scoring (no report.json)"),
        (["a", "cut"], "not a scoring that can be read"),
        (["a", "text"], "not a scoring that can be read"),
        (["a", "old"], "not a scoring that can be read (no top1_name)"),
        (["a", "torn"], "not a scoring that can be read (no failure)"),
        (["a", "list"], "holds no report"),
        (["a", "zip"], "not a scoring that can be read"),
        (["a", "b"], "no video in common"),
        (["a", "a"], "another run is named a, too"),
    ):
        folders = [tmp_path / name for name in args]
        code, _, error = compared(capsys, *folders, "--to", tmp_path / "page.html")
        assert (code, error.count("\n")) == (2, 0)
        assert error.startswith("error: ")
        assert cause in error


def test_folders_may_have_an_equals_sign(tmp_path, capsys):
    for name in ("lr=0.1", "lr=0.2"):
        scored(tmp_path / name, [True] * 4)
    page = tmp_path / "page.html"
    runs = [tmp_path / "lr=0.1", f"rate=0.2={tmp_path}/lr=0.2"]
    code, out, _ = compared(capsys, *runs, "--to", page)
    assert code == 0
    assert out[0].startswith("top-1: lr=0.1 100.00%")
    assert ", rate=0.2 100.00%" in out[0]
    code, _, error = compared(capsys, *runs, "--seed=-1", "--to", page)
    assert (code, error) == (2, "error: --seed -1: must be 0 or more")


def test_several_labels_by_classes_in_another_order(tmp_path, capsys):
    names, generator = ["a", "b", "c"], np.random.default_rng(0)
    scores, targets = generator.random((6, 3)), [(0, 2), (1,), (0, 1), (2,), (0,), (1, 2)]
    for name, order in (("one", [0, 1, 2]), ("two", [2, 0, 1])):
        (tmp_path / name).mkdir()
        task = MultiLabel([names[i] for i in order], normalise=NORMALISE)
        moved = [tuple(sorted(order.index(c) for c in target)) for target in targets]
        made(tmp_path / name, task, moved, scores[:, order])
    code, lines, _ = compared(capsys, tmp_path / "one", tmp_path / "two", "--to", tmp_path / "page.html")
    assert code == 0
    assert lines[1].startswith("no difference shown between one and two: +0.0 points of mAP")


def test_scores_that_are_no_numbers_have_a_page(tmp_path, capsys):
    for name, value in (("a", np.nan), ("b", 0.5)):
        (tmp_path / name).mkdir()
        made(tmp_path / name, three_classes(), [1, 1], [[value] * 3, [0.1, 0.8, 0.1]])
    assert Page(tmp_path / "a" / "report.html").data["scores"][0] == [0, 0, 0]
    code, lines, _ = compared(capsys, tmp_path / "a", tmp_path / "b", "--to", tmp_path / "page.html")
    assert (code, lines[0][:12]) == (0, "top-1: a 50.")


def test_names_and_paths_that_are_no_text_come_through(tmp_path, capsys):
    paths = ["/v/</script><img src=x>.mp4", "/v/not\udcfftext.mp4", "/v/ü.mp4"]
    for name, right in (("a", [True, True, False]), ("b", [False, False, True])):
        scored(tmp_path / name, right, paths=paths, labels=[1, 1, 2])
    assert list(read_scoring("a", tmp_path / "a").rows) == [(path, 0) for path in paths]
    name = f"<img src=x>={tmp_path}/b"
    code, _, _ = compared(capsys, tmp_path / "a", name, "--to", tmp_path / "page.html")
    assert code == 0
    page = Page(tmp_path / "page.html")
    assert "img" not in page.tags
    assert page.tags.count("script") == 3
    assert page.data["runs"] == ["a", "<img src=x>"]
    assert page.data["paths"] == [path.removeprefix("/v/") for path in paths]


def test_clicking_through_a_comparison(opened, tmp_path, capsys):  # noqa: F811
    right = np.arange(12) % 4 > 0
    scored(tmp_path / "a", right)
    scored(tmp_path / "b", ~right)
    compared(capsys, tmp_path / "a", tmp_path / "b", "--to", tmp_path / "page.html")
    page = opened(tmp_path / "page.html", width=400)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.locator("#count").inner_text() == "12"
    page.select_option("#show", "right: b")
    assert page.locator("#count").inner_text() == "3 of 12"
    page.fill("#search", "00004")
    row = page.locator(".row")
    assert row.count() == 1
    with open(tmp_path / "b" / "predictions.csv", newline="") as file:
        line = list(csv.DictReader(file))[4]
    assert [text.inner_text() for text in row.locator(".guess.true span").all()] == ["b", line["top1_name"]]
