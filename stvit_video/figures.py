"""What people would rather look at than read: learning curves, the confusion matrix, where time goes."""

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

WATCHED = "val_"  # begins the keys of a validation's figures in the log
LEGIBLE = 240  # pixels: the short side of a frame with letters in it
BORDER = 255  # in a map of tokens: between two of them
COLOURS = ("#ffd54f", "#4fc3f7", "#aed581", "#ff8a65", "#ce93d8", "#80cbc4")
PLAYED, FRAME_MS = 192, 125  # a clip that plays: its height at least, and milliseconds of a frame


def draw_curves(entries: Sequence[dict], picture: Path) -> None:
    """Entries of `log.jsonl` -> loss by epoch, and the validation's figures by epoch."""
    steps, epochs = ([e for e in entries if e["kind"] == kind] for kind in ("step", "epoch"))
    figure, (left, right) = _axes(1, 2, figsize=(10, 3.6))
    left.plot([e["at"] for e in steps], [e["loss"] for e in steps], color="0.8", label="step")
    left.plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs], "C0", label="epoch mean")
    left.set(title="training loss", xlabel="epoch", ylim=(0, None))
    left.legend(frameon=False)
    for key in _watched(epochs):
        right.plot(*_validated(epochs, key), marker=".", label=_label(key))
    right.set(title="validation, one view", xlabel="epoch", ylabel="%", ylim=(0, 101))
    if right.lines:
        right.legend(frameon=False, loc="lower right")
    _finish(figure, (left, right), picture)


def draw_comparison(runs: Mapping[str, Sequence[dict]], picture: Path) -> None:
    """Entries of several runs' `log.jsonl` -> losses and the first validation figure in one picture."""
    figure, (left, right) = _axes(1, 2, figsize=(10, 3.6))
    keys = []
    for name, entries in runs.items():
        epochs = [entry for entry in entries if entry["kind"] == "epoch"]
        left.plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs], marker=".")
        keys += _watched(epochs)[:1]
        right.plot(*(_validated(epochs, keys[-1]) if keys else ([], [])), marker=".", label=name)
    title = " or ".join(_label(key) for key in dict.fromkeys(keys))
    left.set(title="training loss, mean of an epoch", xlabel="epoch", ylim=(0, None))
    right.set(title=f"validation {title}, one view", xlabel="epoch", ylabel="%", ylim=(0, 101))
    right.legend(frameon=False, loc="lower right")
    _finish(figure, (left, right), picture)


def draw_confusion(
    labels: Sequence[int], predictions: Sequence[int], class_names: Sequence[str], picture: Path
) -> None:
    """Rows: true class, columns: predicted class, each row in percent of its videos.

    Names and figures are written out where they are few enough to be read.
    """
    size = len(class_names)
    labels, predictions = np.asarray(labels, int), np.asarray(predictions, int)
    read = (labels >= 0) & (predictions >= 0)
    counts = np.bincount(labels[read] * size + predictions[read], minlength=size**2).reshape(size, size)
    videos = np.bincount(labels[labels >= 0], minlength=size)
    matrix = 100 * counts / np.maximum(videos, 1)[:, None]
    side = min(3 + 0.45 * size, 14)
    figure, axis = _axes(figsize=(side + 0.8, side))
    image = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, shrink=0.8, label="% of the true class")
    axis.set(xlabel="predicted", ylabel="true")
    class_names = [name.replace("$", r"\$") for name in class_names]  # no mathematics in names
    if size <= 40:
        axis.set_xticks(range(size), class_names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(size), class_names)
    if size <= 20:
        for row, column in np.argwhere(matrix >= 0.5):
            colour = "white" if matrix[row, column] > 55 else "black"
            axis.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color=colour)
    figure.savefig(picture, dpi=120)


@functools.cache
def palette() -> np.ndarray:
    """A colour for each of 256 classes: uint8 (256, 3), Pascal VOC's without its first, black."""
    ids = np.arange(1, 257)
    channels = [[(ids >> (3 * i + c) & 1) << (7 - i) for i in range(3)] for c in range(3)]
    return np.array(channels).sum(1).T.astype(np.uint8)


def overlay(frame: np.ndarray, mask: np.ndarray, share: float = 0.55) -> np.ndarray:
    """uint8 (H, W, 3) under the colours of a mask (H, W); 255, no class, leaves the frame as it is."""
    out, known = frame.copy(), mask != 255
    out[known] = np.round((1 - share) * frame[known] + share * palette()[mask[known]])
    return out


def draw_scenes(
    scenes: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    picture: Path,
) -> None:
    """Title, frame (H, W, 3), true and predicted mask (H, W) of each row -> one picture."""
    from matplotlib.patches import Patch

    present = sorted({int(c) for _, _, *masks in scenes for mask in masks for c in np.unique(mask)})
    present = [c for c in present if c < len(class_names)]
    legend = -(-len(present) // 8)
    height = 2.6 * len(scenes) + 0.4 * legend
    figure, axes = _axes(len(scenes), 3, figsize=(8, height), squeeze=False)
    for line, (title, frame, *masks) in zip(axes, scenes, strict=True):
        pictures = (frame, *(overlay(frame, mask) for mask in masks))
        for axis, pixels, name in zip(line, pictures, (title, "truth", "prediction"), strict=True):
            axis.imshow(pixels)
            axis.set_title(name.replace("$", r"\$"), fontsize=8)
            axis.axis("off")
    marks = [Patch(color=palette()[c] / 255) for c in present]
    names = [class_names[c].replace("$", r"\$") for c in present]
    figure.legend(marks, names, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    figure.savefig(picture, dpi=110)


def show_tokens(frame: np.ndarray, tokens: np.ndarray, share: float = 0.6) -> np.ndarray:
    """uint8 (H, W, 3) and a map of tokens (h, w): 0: it stays, n: it left at the n-th exit, `BORDER`
    between two -> the frame with the map over it, enlarged where lines would hide it."""
    out, tokens = _enlarged(frame, tokens)
    left = (tokens > 0) & (tokens < BORDER)
    colours = np.array([ImageColor.getrgb(colour) for colour in COLOURS])
    out[left] = np.round((1 - share) * out[left] + share * colours[(tokens[left] - 1) % len(COLOURS)])
    out[tokens == BORDER] = out[tokens == BORDER] // 2
    return out


def draw_tokens(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], exits: Sequence[str], picture: Path
) -> None:
    """Title, frame (H, W, 3), predicted mask and map of tokens of each row -> one picture.

    exits: what each colour of the map means, in order.
    """
    from matplotlib.patches import Patch

    figure, axes = _axes(len(rows), 2, figsize=(7, 3.2 * len(rows) + 0.4), squeeze=False)
    for line, (title, frame, mask, tokens) in zip(axes, rows, strict=True):
        pictures = (overlay(frame, mask), show_tokens(frame, tokens))
        for axis, pixels, name in zip(line, pictures, (title, "tokens"), strict=True):
            axis.imshow(pixels)
            axis.set_title(name.replace("$", r"\$"), fontsize=8)
            axis.axis("off")
    marks = [Patch(color=COLOURS[i % len(COLOURS)]) for i in range(len(exits))]
    if marks:
        figure.legend(marks, exits, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(picture, dpi=110)


def draw_trade(tables: Mapping[str, Sequence[Mapping]], picture: Path) -> None:
    """Accuracy against measured speed, a panel a table: rows with model, clips/s, top-1 (mean), low, high.
    A colour for each reducer, a marker for each of its models."""
    figure, axes = _axes(1, len(tables), figsize=(1.8 + 3.6 * len(tables), 5), squeeze=False)
    models = list(dict.fromkeys(row["model"] for rows in tables.values() for row in rows))
    reducers = list(dict.fromkeys(model.partition(":")[0] for model in models))
    looks = {}
    for model in models:
        reducer = model.partition(":")[0]
        turn = sum(other.partition(":")[0] == reducer for other in looks)
        looks[model] = {"color": f"C{reducers.index(reducer)}", "marker": "os^Dv*PX<>"[turn % 10]}
    for axis, (title, rows) in zip(axes[0], tables.items(), strict=True):
        for row in rows:
            value, low, high, speed = (row[key] for key in ("top-1", "low", "high", "clips/s"))
            spread = [[value - low], [high - value]]
            axis.errorbar(speed, value, spread, capsize=3, label=row["model"], **looks[row["model"]])
        axis.set(title=title, xlabel="forward clips/s", ylabel="top-1, %: mean and range over seeds")
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    _finish(figure, axes[0], picture)


def draw_quality(rows: Sequence[Mapping], picture: Path) -> None:
    """mIoU against measured images/s and against multiply-adds; rows of `bench.step`'s checkpoints."""
    figure, axes = _axes(1, 2, figsize=(10, 4.2 + 0.2 * len(rows)), sharey=True)
    for axis, key in zip(axes, ("images/s", "G multiply-adds"), strict=True):
        for i, row in enumerate(rows):
            axis.plot(row[key], 100 * row["mIoU"], "os^Dv*PX<>"[i % 10], color=f"C{i}", label=row["model"])
        axis.set(xlabel=f"{key}{' an image' if axis is axes[1] else ''}", xlim=(0, None), ylabel="mIoU, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8)
    _finish(figure, axes, picture)


def draw_conversion(rows: Sequence[Mapping], picture: Path) -> None:
    """Share of the dense model's classes that stay, and their probability, against cost; rows of
    `bench.convert`. A colour for each start; the more layers before, the darker."""
    figure, axes = _axes(1, 2, figsize=(10, 4.6))
    dense, mirrored, *rows = rows
    kinds = dict.fromkeys((row["start"], row["base depth"]) for row in rows)
    starts = list(dict.fromkeys(start for start, _ in kinds))
    depths = sorted({depth for _, depth in kinds if depth is not None})
    for axis, key in zip(axes, ("kept", "probability"), strict=True):
        axis.axhline(100 * dense[key], color="0.4", linestyle=":", label="dense")
        axis.axhline(100 * mirrored[key], color="0.7", linestyle=":", label="dense, on mirrored views")
        for start, depth in kinds:
            of_kind = [row for row in rows if (row["start"], row["base depth"]) == (start, depth)]
            points = sorted((100 * row["cost"], 100 * row[key]) for row in of_kind)
            shade = 1.0 if depth is None else (depths.index(depth) + 1) / len(depths)
            label = start if depth is None else f"{start}, {depth} layers before"
            look = {"color": f"C{starts.index(start)}", "alpha": 0.3 + 0.7 * shade}
            axis.plot(*zip(*points, strict=True), marker="*" if depth is None else "o", label=label, **look)
        axis.set(xlabel="multiply-adds, % of the dense model's", ylabel="%", ylim=(0, 102))
    axes[0].set(title="the dense model's class stays")
    axes[1].set(title="mean probability of that class")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _finish(figure, axes, picture)


def draw_speeds(rows: Sequence[Mapping], picture: Path) -> None:
    """Bars of clips/s over those of the first model, for each mode and batch size; the ratio on them."""
    cases = list(dict.fromkeys((row["mode"], row["batch"]) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    size = max(6, 1.5 + 0.55 * len(cases) * len(models)), 3.6 + 0.2 * len(models)
    figure, axis = _axes(figsize=size)
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        timed = {(row["mode"], row["batch"]): row for row in rows if row["model"] == model}
        at = [k + (i - (len(models) - 1) / 2) * width for k in range(len(cases))]
        bars = axis.bar(at, [timed[case]["ratio"] for case in cases], 0.92 * width, label=model)
        texts = [f"{timed[case]['ratio']:.2f}x\n{timed[case]['clips/s']:.3g}/s" for case in cases]
        axis.bar_label(bars, texts, fontsize=7)
    axis.set(title=f"clips/s over those of {models[0]}", ylabel="ratio")
    axis.set_xticks(range(len(cases)), [f"{mode}\nbatch {batch}" for mode, batch in cases])
    axis.margins(y=0.2)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    _finish(figure, [axis], picture)


def draw_maps(
    frames: np.ndarray, maps: np.ndarray | None, groups: np.ndarray | None, picture: Path
) -> None:
    """Which patches are one token, and where semantic tokens look. A column a time slice: its frame, then a
    row of superpatches, then one row a semantic token of that time; None: without these rows.

    frames: uint8 (T, H, W, 3), one of each slice of patches; maps: (t, h, w, T, H', W'), each summing to 1.
    A token's map is drawn over the frame, brighter where it took more; its share of the slice stands above.
    groups: (T, H', W'), the number of the token that each patch is part of; see `show_groups`.
    """
    slices, height, width = (groups if maps is None else maps[0, 0, 0]).shape
    tokens = np.zeros((1, 0)) if maps is None else maps.reshape(len(maps), -1, *maps.shape[3:])[:, :8]
    shown, above = min(slices, 8), 1 + (groups is not None)
    columns = [round(i * (slices - 1) / max(shown - 1, 1)) for i in range(shown)]
    lines = tokens.shape[1] + above
    size = 1.7 * shown, 1.8 * lines + 0.5 * (above - 1)
    figure, axes = _axes(lines, shown, figsize=size, squeeze=False)
    sides, kind = zip(frames.shape[1:3], (height, width), strict=True), ("token", "semantic")[above - 1]
    patch = np.ix_(*(np.arange(pixels) * patches // pixels for pixels, patches in sides))  # of each pixel
    for axis, at in zip(axes.T, columns, strict=True):
        axis[0].imshow(frames[at])
        axis[0].set_title(f"time {at}, {height * width} patches", fontsize=8)
        for row, token in enumerate(tokens[at * len(tokens) // slices], above):
            share = token[at] / token.max()
            shade = (0.25 + 0.75 * share[patch])[..., None]
            axis[row].imshow((frames[at] * shade).astype(np.uint8))
            axis[row].set_title(f"{kind} {row - above + 1}: {token[at].sum():.0%} from here", fontsize=8)
    if groups is not None:
        _draw_groups(figure, axes[1], frames[columns], groups, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(picture, dpi=120)


def _draw_groups(figure, axes: Sequence, frames: np.ndarray, groups: np.ndarray, columns: Sequence[int]):
    """Superpatches in a row of axes, with a legend and how many tokens there are."""
    from matplotlib.patches import Patch

    before = np.zeros(0, groups.dtype)
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    for axis, frame, at in zip(axes, frames, columns, strict=True):
        there = np.unique(groups[at])
        new = there[~np.isin(there, before)]
        alone = [token for token in there if sizes[token] == 1]
        axis.imshow(show_groups(frame, groups[at], alone, np.setdiff1d(there, new)))
        axis.set_title(f"{len(new)} new tokens", fontsize=8)
        before = np.union1d(before, there)
    marks = [
        Patch(facecolor="none", edgecolor=COLOURS[0], linewidth=1.5),
        Patch(facecolor="none", edgecolor="0.5"),
        Patch(facecolor="0.2"),
    ]
    words = (
        "superpatch: these patches share one token",
        "a single patch, one token",
        "dark: the same token as in a picture to the left",
    )
    figure.legend(
        marks,
        words,
        loc="outside upper center",
        ncols=3 if len(columns) > 5 else 1,
        fontsize=8,
        frameon=False,
        title=f"{groups.size} patches are {len(sizes)} tokens ({len(sizes) / groups.size:.0%})",
        title_fontsize=11,
    )


def show_groups(
    frame: np.ndarray, groups: np.ndarray, alone: Sequence[int] = (), seen: Sequence[int] = ()
) -> np.ndarray:
    """uint8 (H, W, 3) and the number of each patch's token (h, w) -> the frame, enlarged where lines would
    hide it, with an outline around each superpatch.

    alone: tokens of a single patch, which have a thin line; seen: tokens whose patches are dark.
    """
    out, token = _enlarged(frame, groups)
    single, dark = np.isin(token, alone), np.isin(token, seen)
    thin = single & _near_edge(token, 1)
    thick = ~single & _near_edge(token, max(min(out.shape[:2]) // 110, 1))
    out[thin] //= 2
    out[thick] = ImageColor.getrgb(COLOURS[0])
    out[dark] //= 3
    return out


def _enlarged(frame: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) and a value for each cell of a grid over it -> the frame, enlarged where lines would hide
    it, and the value at each of its pixels."""
    times = max(LEGIBLE // min(frame.shape[:2]), 1)
    out = frame.repeat(times, 0).repeat(times, 1)
    rows, columns = (np.arange(n) * m // n for n, m in zip(out.shape[:2], cells.shape, strict=True))
    return out, cells[rows[:, None], columns]


def _near_edge(token: np.ndarray, width: int) -> np.ndarray:
    """(H, W) -> bool (H, W): pixels at most `width` from one of another number, or from the frame's end."""
    padded, near = np.pad(token, width, constant_values=-1), np.zeros(token.shape, bool)
    height, length = token.shape
    for step in range(2 * width + 1):
        near |= padded[step : step + height, width:-width] != token
        near |= padded[width:-width, step : step + length] != token
    return near


def play_maps(frames: np.ndarray, maps: np.ndarray | None) -> bytes:
    """Clips that play, one after the other; beside them, what semantic tokens took: an animated WebP.

    frames: uint8 (clips, T, H, W, 3); maps: (clips, n, T', H', W'), None: the clips alone. A patch is the
    brighter, the more all tokens together took from it.
    """
    enlarged = max(PLAYED // frames.shape[2], 1)
    frames = frames.repeat(enlarged, 2).repeat(enlarged, 3)
    clips, times, height, width = frames.shape[:4]
    if maps is not None:
        taken = maps.sum(1)  # (clips, T', H', W')
        taken /= taken.max((1, 2, 3), keepdims=True)
        for axis, size in enumerate((times, height, width), 1):
            taken = taken.take(np.arange(size) * taken.shape[axis] // size, axis)
        shaded = (frames * (0.25 + 0.75 * taken[..., None])).astype(np.uint8)
        gap = np.full((clips, times, height, width // 32, 3), 128, np.uint8)
        frames = np.concatenate([frames, gap, shaded], 3)
    first, *rest = [Image.fromarray(frame) for frame in frames.reshape(-1, *frames.shape[2:])]
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, quality=80, method=2
    )
    return file.getvalue()


def draw_boxes(frame: np.ndarray, boxes: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """uint8 (H, W, 3), boxes (n, 4) as shares of it, what each says -> the same frame with them drawn in.

    A frame too small for letters comes out enlarged, by a whole number.
    """
    enlarged = max(LEGIBLE // min(frame.shape[:2]), 1)
    image = Image.fromarray(frame.repeat(enlarged, 0).repeat(enlarged, 1))
    brush, font = ImageDraw.Draw(image), ImageFont.load_default(max(image.height // 24, 10))
    for i, (box, text) in enumerate(zip(boxes, texts, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        corners = [float(share * side) for share, side in zip(box, image.size * 2, strict=True)]
        brush.rectangle(corners, outline=colour, width=max(image.height // 150, 2))
        left, top, right, bottom = brush.multiline_textbbox((0, 0), text, font=font)
        x = min(max(corners[0], 0), max(image.width - right, 0))
        y = min(max(corners[1] - bottom, 0), max(image.height - bottom, 0))
        if text:
            brush.rectangle([x + left - 1, y + top - 1, x + right + 1, y + bottom + 1], fill=colour)
        brush.multiline_text((x, y), text, "black", font)
    return np.asarray(image)


def draw_timeline(
    moments: np.ndarray,
    class_names: Sequence[str],
    segments: Sequence,
    frames: Sequence[np.ndarray | None],
    picture: Path,
) -> None:
    """Scores of the best classes over time, the segments as a coloured band, frames at even times below.

    moments: (n,) with start, end (seconds), scores (K,). segments: with start, end, name.
    """
    longest: dict[str, float] = {}
    for segment in segments:
        longest[segment.name] = longest.get(segment.name, 0) + segment.end - segment.start
    peaks = moments["scores"].max(0) if len(moments) else np.zeros(len(class_names))
    order = sorted(longest, key=longest.get, reverse=True)
    order += [class_names[i] for i in np.argsort(-peaks, kind="stable") if class_names[i] not in longest]
    colours = {name: f"C{i}" for i, name in enumerate(order[:8])}
    end = float(moments["end"][-1]) if len(moments) else 1.0
    figure, (top, band, strip) = _axes(3, 1, figsize=(12, 5.4), height_ratios=(4, 0.5, 1.1))
    groups = np.array_split(moments, min(len(moments), 300) or 1)  # more points than this hide each other
    at = [(group["start"].mean() + group["end"].mean()) / 2 for group in groups if len(group)]
    for name, colour in colours.items():
        label = list(class_names).index(name)
        scores = [group["scores"][:, label].mean() for group in groups if len(group)]
        top.plot(
            at, scores, colour, label=name.replace("$", r"\$"), lw=1.2, marker="." if len(at) < 60 else None
        )
    top.set(xlim=(0, end), ylim=(0, 1.02), ylabel="score")
    top.xaxis.set_major_formatter(lambda seconds, _: _hours(seconds))
    top.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    for segment in segments:
        colour = colours.get(segment.name, "0.6")
        band.axvspan(segment.start, segment.end, color=colour, lw=0)
    band.set(xlim=(0, end), ylim=(0, 1))
    strip.set(xlim=(0, len(frames)), ylim=(0, 1))
    for i, frame in enumerate(frames):
        if frame is not None:
            inset = strip.inset_axes((i / len(frames), 0, 0.96 / len(frames), 1))
            inset.imshow(frame)
            inset.set_axis_off()
    for axis in (band, strip):
        axis.set_axis_off()
    top.grid(alpha=0.3)
    top.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120, format="png")


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def draw_loading(rows: Sequence[dict], picture: Path) -> None:
    """Rows of `bench_data` -> where the time of a sample goes, and samples/s by the number of workers."""
    figure, (left, right) = _axes(1, 2, figsize=(10, 3.6))
    kinds = {row["what"]: row for row in rows}
    stages = [key for key in rows[0] if key.endswith(" ms") and key != "all ms"]
    start = np.zeros(len(kinds))
    for stage in stages:
        widths = np.array([row[stage] for row in kinds.values()])
        left.barh(list(kinds), widths, left=start, height=0.5, label=stage.removesuffix(" ms"))
        start += widths
    left.set(title="a sample, one process", xlabel="ms", ylim=(len(kinds) - 0.5, -0.9))
    left.set_axisbelow(True)
    left.legend(frameon=False, ncols=len(stages), loc="upper left", fontsize=8, columnspacing=1)
    for kind in kinds:
        columns = ("workers", "samples/s", "lowest", "highest")
        workers, rate, *ends = np.array([[r[key] for key in columns] for r in rows if r["what"] == kind]).T
        right.errorbar(workers, rate, np.abs(ends - rate), marker="o", capsize=3, label=kind)
    right.set(title="loader (bars: lowest and highest round)")
    right.set(xlabel="workers", ylabel="samples/s", ylim=(0, None))
    right.set_xticks(sorted({row["workers"] for row in rows}))
    right.legend(frameon=False)
    _finish(figure, (left, right), picture)


def _axes(*shape: int, figsize: tuple[float, float], **options):
    """A figure and its axes, without pyplot: a notebook's backend and figures stay as they are."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def _finish(figure, axes: Sequence, picture: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


def _watched(epochs: Sequence[dict]) -> list[str]:
    """The keys of a validation's figures, in the log's order."""
    keys = dict.fromkeys(key for entry in epochs for key in entry if key.startswith(WATCHED))
    return [key for key in keys if key != "val_failed"]


def _validated(epochs: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    """Epochs with this figure, and its values in percent."""
    entries = [entry for entry in epochs if entry.get(key) is not None]
    return [entry["epoch"] for entry in entries], [100 * entry[key] for entry in entries]


def _label(key: str) -> str:
    return key.removeprefix(WATCHED).replace("top", "top-")
