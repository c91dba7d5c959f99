"""Damaged copies of good files: no crash, no hang, no wrong count or order, nothing that was flagged.

The reference is a decode of the damaged file packet by packet, on after errors, with everything that the
decoder raised and flagged noted down. What it neither raised nor flagged nobody can see; that is measured.
"""

import collections
import contextlib
import hashlib
import io
import random

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import KINDS, SHARED, picture, render

from stvit_video.data.decode import open_video
from stvit_video.data.guard import GivenUp, guarded_map
from stvit_video.errors import DecodeError

RENDERED = ("b_frames.mp4", "open_groups.mkv", "stream.ts", "hevc.mp4", "mpeg4_b.avi", "vp8.webm",
            "vp9.webm", "mjpeg.avi", "10bit.mp4", "reordered.avi")  # fmt: skip
REAL = ("h264_10bit.mp4", "h265_128x128.mp4", "rotated_90.mov", "vp9_odd_dimensions.webm",
        "video_desks.3gp", "android_slow_motion.mp4", "av1_640x360.mkv")  # fmt: skip


def mutated(content, seed):
    """-> (kind, damaged content): bits flipped, cut off or cut out, or two pieces swapped."""
    rng = random.Random(seed)
    data, size = bytearray(content), len(content)
    kind = ("flip", "cut", "swap")[seed % 3]
    if kind == "flip":
        for _ in range(2 ** rng.randrange(7)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        start = rng.randrange(size)
        end = size if rng.random() < 0.5 else start + rng.randrange(1, 2000)
        del data[start:end]
    else:
        length = rng.randrange(1, min(2000, size // 4))
        a, b = sorted(rng.randrange(size - length) for _ in range(2))
        data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
    return kind, bytes(data)


def reference(path):
    """-> (frames as shown, packets, whether all went well).

    A frame is (pts, sound, picture digest), a packet (pts, whether a key frame, content digest).
    """
    frames, contents, broken, well = [], [], False, True
    end, pts = cut_in_two(path)
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        packets = container.demux(stream)
        while True:
            try:
                try:
                    packet = next(packets, None)
                except IndexError:  # after its flush: PyAV and a stream that damage has made
                    break
                if packet is None:
                    break
                if end is not None and packet.pos == end:
                    well = False
                    continue
                if packet.size and not packet.is_discard:
                    contents.append((packet.pts, packet.is_keyframe, digest(bytes(packet))))
                shown = packet.decode()
            except av.FFmpegError:
                broken, well = True, False
                if packet is None or not packet.size:
                    break
                continue
            for frame in shown:
                broken = frame.is_corrupt or (broken and not frame.key_frame)
                well = well and not frame.is_corrupt
                image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                frames.append((frame.pts, not broken, digest(image)))
    if end is not None:  # others before those that are shown after it are missing
        frames = [frame for frame in frames if frame[0] is None or pts is None or frame[0] < pts]
        contents = [packet for packet in contents if packet[0] is None or pts is None or packet[0] < pts]
    return frames, contents, well


def cut_in_two(path):
    """Place and time of the last packet, if the end of the file cuts it in two; else None twice."""
    with av.open(str(path), metadata_errors="ignore") as container, contextlib.suppress(IndexError):
        packets = [p for p in container.demux(container.streams.best("video")) if p.size]
        if len(packets) > 1 and packets[-1].is_corrupt:
            return packets[-1].pos, packets[-1].pts
    return None, None


def digest(data):
    data = data if isinstance(data, bytes) else np.ascontiguousarray(data)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def harmed(i, packets, clean):
    """Whether frame i's packet, or one from its key frame on, is none of the clean file's.

    What is left of such a frame a decoder may fill with what it had before: with other things after a seek.
    """
    packets = sorted(packets)
    key = max((k for k in range(i + 1) if packets[k][1]), default=0)
    return not {content for *_, content in packets[key : i + 1]} <= clean


def sound_from_its_key_frame(path, pts):
    """Whether a decode that begins there flags nothing: flags depend on what came before."""
    end, _ = cut_in_two(path)
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        container.seek(pts, stream=stream)
        with contextlib.suppress(IndexError):  # as above
            for packet in container.demux(stream):
                for frame in () if end is not None and packet.pos == end else packet.decode():
                    if frame.is_corrupt or frame.pts == pts:
                        return not frame.is_corrupt
    return False


def read(path, indices):
    """-> [digest or the DecodeError] of frames, each read for itself."""
    found = []
    with open_video(path, threads=1) as video:
        for index in indices:
            try:
                found.append(digest(video.read([index])[0].permute(1, 2, 0).numpy()))
            except DecodeError as error:
                found.append(error)
    return found


def examine(item):
    """What is wrong with the reading of one damaged file: -> (kind, faults, what became of it)."""
    source, (clean, clean_packets), target, seed = item
    kind, content = mutated(source.read_bytes(), seed)
    target.write_bytes(content)
    try:
        with open_video(target, threads=1) as video:
            count = video.num_frames
    except DecodeError as error:
        return kind, [] if str(target) in str(error) else [f"{error} names no file"], "refused"
    frames, packets, well = reference(target)
    faults = []
    if count < len(frames) or (well and count != len(frames) and count != len(packets)):
        faults.append(f"count {count}, shown {len(frames)}")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    order = order[:12]
    found = dict(zip(order, read(target, order), strict=True))
    if count == len(frames):
        expected = dict(enumerate(frames))
    else:  # some do not come out: by their times
        by_time = {pts: (pts, *rest) for pts, *rest in frames}
        known = sorted(pts for pts, *_ in packets if pts is not None)
        expected = {i: by_time[pts] for i, pts in enumerate(known) if pts in by_time}
    given = {i: value for i, value in found.items() if isinstance(value, str)}
    for i, value in given.items():
        if i not in expected:
            faults.append(f"frame {i} of {count} does not come out of a full decode")
        elif not expected[i][1] and not sound_from_its_key_frame(target, expected[i][0]):
            faults.append(f"frame {i} of {count} was flagged")
        elif expected[i][2] != value:
            places = [k for k, frame in enumerate(frames) if frame[2] == value]
            if places or not harmed(i, packets, clean_packets):
                faults.append(f"frame {i} of {count} is not that of a full decode, but {places}")
    whole = count == len(clean) and all(clean[i] == value for i, value in given.items())
    if len(given) < len(found) or not well:
        return kind, faults, "told" if whole or count != len(clean) else "told, others differ"
    if whole:
        return kind, faults, "unharmed"
    return kind, faults, "shorter" if count < len(clean) else "unseen"


def examine_all(tmp_path, number):
    """-> a table {(file, kind): Counter of what became of it}, and all faults."""
    sources = [render(tmp_path / name, KINDS[name][0], **KINDS[name][1]) for name in RENDERED]
    sources += [SHARED / name for name in REAL if (SHARED / name).exists()]
    clean = {}
    for path in sources:
        frames, packets, _ = reference(path)
        clean[path] = [picture for *_, picture in frames], {content for *_, content in packets}
    items = []
    for seed in range(number):
        source = sources[seed % len(sources)]
        target = tmp_path / f"damaged_{seed}{source.suffix}"
        items.append((source, clean[source], target, seed))
    table, faults = collections.defaultdict(collections.Counter), []
    for item, result in guarded_map(examine, items, workers=2, timeout=60):
        source, _, target, seed = item
        if isinstance(result, GivenUp):
            result = ("any", [str(result)], "lost")
        kind, wrong, became = result
        table[source.name, kind][became] += 1
        faults += [f"{source.name}, seed {seed}, {kind}: {fault}" for fault in wrong]
        if not wrong:
            target.unlink()
    return table, faults


def report(table):
    for column in (1, 0):
        for name in sorted({key[column] for key in table}):
            counts = (count for key, count in table.items() if key[column] == name)
            total = sum(counts, collections.Counter())
            print(f"{name:<26}{total.total():>5}  {dict(total.most_common())}")


def test_damaged_files_give_sound_frames_or_none(tmp_path):
    table, faults = examine_all(tmp_path, 60)
    report(table)
    assert faults == []


@pytest.mark.slow
def test_a_thousand_damaged_files_give_sound_frames_or_none(tmp_path):
    table, faults = examine_all(tmp_path, 1000)
    report(table)
    assert faults == []


def damaged_image(item):
    target, content, seed = item
    target.write_bytes(mutated(content, seed)[1])
    try:
        with open_video(target) as video:
            return tuple(video.read([0]).shape[:2])
    except DecodeError:
        return None


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_images_are_read_or_refused(tmp_path, number):
    items = []
    for seed in range(number):
        form, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"))[seed % 4]
        content = io.BytesIO()
        Image.fromarray(picture(seed % 256)).save(content, form)
        items.append((tmp_path / f"{seed}.{suffix}", content.getvalue(), seed))
    results = [result for _, result in guarded_map(damaged_image, items, workers=2, timeout=60)]
    assert set(results) <= {None, (1, 3)}
    assert len(set(results)) == 2


def test_a_damaged_reference_frame_spoils_what_is_shown_before_it(tmp_path):
    """B-frames are decoded after the frame behind them, which they refer to."""
    params = "keyint=20:min-keyint=20:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none"
    source = render(tmp_path / "a.mp4", options={"x264-params": params})
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size]
    unit = sorted(pts for *_, pts in packets)[1]
    position, size, _ = next(p for p in packets if p[2] == 8 * unit)  # frames 5, 6, 7 refer to 8
    content = bytearray(source.read_bytes())
    content[position + size // 2 : position + size] = bytes(size - size // 2)
    path = tmp_path / "b.mp4"
    path.write_bytes(content)
    with open_video(source) as clean, open_video(path, threads=1) as video:
        for sound in (0, 3, 4, 20, 39):
            assert torch.equal(video.read([sound]), clean.read([sound]))
        for spoilt in (5, 6, 7, 8, 9, 15, 19):
            with pytest.raises(DecodeError, match=f"frame {spoilt} of 40"):
                video.read([spoilt])
