"""Frame i of a rendered video reads back as frame i, whatever holds it, or a DecodeError says why.

Each rendered frame shows its own number in eight blocks, light or dark, that survive compression.
"""

import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stvit_video.data import decode, hidden
from stvit_video.data.decode import _Listed, _without_end, open_video
from stvit_video.data.media import VIDEO_SUFFIXES
from stvit_video.errors import DecodeError

FRAMES = 40
SIZE = (96, 64)  # width, height
SHARED = Path(__file__).parents[2] / "shared" / "videos"
BROKEN = ("corrupted.mp4", "vp9_invalid_bitstream.webm")


def picture(number, size=SIZE):
    """-> uint8 (H, W, 3): block b of two rows of four is light where bit b of the number is 1."""
    bits = np.array([number >> bit & 1 for bit in range(8)], np.uint8).reshape(2, 4)
    blocks = np.kron(36 + 184 * bits, np.ones((size[1] // 2, size[0] // 4), np.uint8))
    rest = [(0, whole - part) for whole, part in zip(size[::-1], blocks.shape, strict=True)]
    return np.repeat(np.pad(blocks, rest, "edge")[..., None], 3, axis=2)


def numbers(clip):
    """(N, 3, H, W) -> the N numbers shown."""
    blocks = torch.nn.functional.adaptive_avg_pool2d(clip.float().mean(1), (2, 4)).flatten(1)
    return ((blocks > 128) * 2 ** torch.arange(8)).sum(1).tolist()


def render(path, codec="libx264", n=FRAMES, size=SIZE, pixels="yuv420p", options=None, times=None):
    """Encode n counted frames, a key frame at least every tenth, at 25/s or at `times` in ms."""
    form = {".h264": "h264", ".wmv": "asf"}.get(path.suffix)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.bit_rate = 2_000_000
        stream.codec_context.gop_size = 10
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(n):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, 1000 if times else 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == "libsvtav1":  # as root it makes this process a real-time one, which starves all others
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def remux(source, target, change):
    """Copy a video; change(place, packet) gives the packets to write in the place of one."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        new.start_encoding()  # writes the header, also where no packet follows
        for place, packet in enumerate(p for p in old.demux(video=0) if p.size):
            for changed in change(place, packet):
                changed.stream = stream
                new.mux(changed)
    return target


def patch(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def spoil(source, target, spoilt):
    """Copy a video, the packet at one place (in the file's order) overwritten but for its start."""

    def change(place, packet):
        if place != spoilt:
            return [packet]
        other = av.Packet(bytes(packet)[:12] + bytes([0x5A]) * (packet.size - 12))
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        return [other]

    return remux(source, target, change)


def full_decode(path):
    """Every frame in order, upright, by the plainest means -> uint8 (N, 3, H, W)."""
    with av.open(str(path), metadata_errors="ignore") as container:
        frames = [
            np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            for frame in container.decode(container.streams.best("video"))
        ]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def assert_exact(path, n):
    """Any read, in any order, is what a full decode has at those places."""
    whole = full_decode(path)
    generator = torch.Generator().manual_seed(0)
    with open_video(path) as video:
        assert video.num_frames == len(whole) == n
        assert torch.equal(video.read(range(n)), whole)
        for _ in range(4):
            some = torch.randint(n, (5,), generator=generator)
            assert torch.equal(video.read(some), whole[some])
        for index in (n - 1, n // 2):
            assert torch.equal(video.read([index]), whole[[index]])


def assert_one_line(error, path):
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


X264 = "keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0"
X265 = "log-level=none:keyint=10:min-keyint=10"
TIMES = [1000 + 7 * i + 3 * i * i for i in range(FRAMES)]
KINDS = {
    "b_frames.mp4": ("libx264", {"options": {"x264-params": X264}}),
    "open_groups.mkv": ("libx264", {"options": {"x264-params": X264 + ":open-gop=1"}}),
    "stream.ts": ("libx264", {"options": {"x264-params": X264}}),
    "reordered.avi": ("libx264", {"options": {"x264-params": X264}}),
    "flash.flv": ("libx264", {}),
    "no_container.h264": ("libx264", {}),
    "refresh.mp4": ("libx264", {"options": {"intra-refresh": "1"}}),
    "uneven.mkv": ("libx264", {"times": TIMES}),
    "uneven.mp4": ("libx264", {"times": TIMES}),
    "gray.mp4": ("libx264", {"pixels": "gray"}),
    "10bit.mp4": ("libx264", {"pixels": "yuv420p10le"}),
    "one.mp4": ("libx264", {"n": 1}),
    "hevc.mp4": ("libx265", {"options": {"x265-params": X265}}),
    "hevc_open.mkv": ("libx265", {"options": {"x265-params": X265 + ":open-gop=1"}}),
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg4_b.avi": ("mpeg4", {"options": {"bf": "2"}}),
    "mpeg2.mpg": ("mpeg2video", {"options": {"bf": "2"}}),
    "wmv2.wmv": ("wmv2", {}),
    "mjpeg.avi": ("mjpeg", {"pixels": "yuvj420p"}),
    "vp8.webm": ("libvpx", {}),
    "vp9.webm": ("libvpx-vp9", {"options": {"lag-in-frames": "16", "auto-alt-ref": "1"}}),
    "vp9_odd.webm": ("libvpx-vp9", {"size": (101, 67)}),
    "av1.mkv": ("libsvtav1", {"options": {"preset": "12"}}),
    "animated.gif": ("gif", {"pixels": "rgb8"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_frame_i_reads_back_as_frame_i(tmp_path, name):
    codec, rest = KINDS[name]
    path = render(tmp_path / name, codec, **rest)
    n = rest.get("n", FRAMES)
    assert_exact(path, n)
    with open_video(path) as video:
        assert numbers(video.read(range(n))) == list(range(n))
        order = [n - 1, 0, n // 2, n // 2, n - 1]
        assert numbers(video.read(order)) == order
        assert video.read(order).shape[1] == 3
        assert video.read(order).dtype == torch.uint8
        if name not in ("uneven.mp4", "uneven.mkv"):
            assert video.fps == pytest.approx(25, rel=0.05)


@pytest.mark.parametrize("name", ["b_frames.mp4", "mpeg4.avi", "uneven.mkv"])
def test_decord_reads_the_same_levels(tmp_path, name):
    codec, rest = KINDS[name]
    path = render(tmp_path / name, codec, **{**rest, "size": (256, 128)})
    order = [7, 30, 7, 0, FRAMES - 1]
    with open_video(path, "decord") as video, open_video(path) as exact:
        assert video.num_frames == exact.num_frames
        assert numbers(video.read(order)) == order
        assert (video.read(order).float() - exact.read(order).float()).abs().mean() <= 2
        with pytest.raises(IndexError, match=r"frame -1 is not in 0\.\.39"):
            video.read([-1])


def test_one_decoder_thread_reads_the_same(tmp_path):
    path = render(tmp_path / "a.mp4")
    assert torch.equal(
        open_video(path, threads=1).read(range(FRAMES)), open_video(path).read(range(FRAMES))
    )


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("b_frames.mp4", 1),
        ("uneven.mp4", 1),
        ("open_groups.mkv", 1),
        ("stream.ts", 1),
        ("hevc.mp4", 1),
        ("refresh.mp4", 2),  # to the container its later frames are key frames, to the decoder not
    ],
)
def test_a_seek_saves_a_pass_over_the_file(tmp_path, monkeypatch, name, passes):
    codec, rest = KINDS[name]
    path = render(tmp_path / name, codec, **rest)
    done = []
    one_pass = decode.AvVideo._pass
    monkeypatch.setattr(
        decode.AvVideo, "_pass", lambda self, runs: done.append(runs) or one_pass(self, runs)
    )
    with open_video(path) as video:
        assert numbers(video.read([35, 3])) == [35, 3]
    assert len(done) == passes
    assert [run for _, run in done[0]] == [[3], [35]]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "ffv1")]
)
def test_near_frames_are_decoded_on_to_and_damage_between_them_is_left_out(
    tmp_path, monkeypatch, name, codec
):
    options = {"x264-params": X264} if codec == "libx264" else {}
    source = render(tmp_path / name, codec, options=options)
    whole, done = full_decode(source), []
    one_pass = decode.AvVideo._pass
    monkeypatch.setattr(
        decode.AvVideo, "_pass", lambda self, runs: done.append(runs) or one_pass(self, runs)
    )
    with open_video(source) as video:
        assert torch.equal(video.read([2, 8, 12, 20]), whole[[2, 8, 12, 20]])
    assert [[run for _, run in runs if run] for runs in done] == [[[2, 8, 12, 20]]]
    path = spoil(source, tmp_path / f"spoilt_{name}", 17)
    with open_video(path) as video:
        assert torch.equal(video.read([12, 20]), whole[[12, 20]])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_spoilt_frame_is_an_error_until_the_next_key_frame(tmp_path, suffix):
    options = {"x264-params": X264.replace("bframes=3", "bframes=0")}
    source = render(tmp_path / f"a{suffix}", options=options)
    whole = full_decode(source)
    path = spoil(source, tmp_path / f"b{suffix}", 13)
    with open_video(path) as video:
        assert video.num_frames == FRAMES
        good = [0, 12, 20, 39, 30, 11]
        assert torch.equal(video.read(good), whole[good])
        for bad in (13, 14, 19):
            with pytest.raises(DecodeError, match=f"frame {bad} of 40: ") as error:
                video.read([0, bad, 39])
            assert_one_line(error, path)


def test_packets_that_show_nothing_are_no_frames(tmp_path):
    def hide(place, packet):  # in front of a key frame the same one, not shown
        if not packet.is_keyframe or not place:
            return [packet]
        hidden = bytearray(bytes(packet))
        hidden[0] &= ~0x10
        hidden = av.Packet(bytes(hidden))
        hidden.pts = hidden.dts = packet.pts - 5
        hidden.time_base, hidden.is_keyframe = packet.time_base, True
        return [hidden, packet]

    path = remux(render(tmp_path / "a.webm", "libvpx"), tmp_path / "b.webm", hide)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > FRAMES
    assert_exact(path, FRAMES)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mp4"])
def test_a_picture_of_mpeg4_that_is_not_coded_is_no_frame(tmp_path, name):
    def skip(place, packet):
        if place not in (3, 17):
            return [packet]
        nothing = av.Packet(vop(coded=0))
        nothing.pts, nothing.dts, nothing.time_base = packet.pts, packet.dts, packet.time_base
        return [nothing]

    path = remux(render(tmp_path / name, "mpeg4"), tmp_path / f"b{name}", skip)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == FRAMES
    assert_exact(path, FRAMES - 2)


# Headers of a stream of MPEG-4 at 25 frames/s, so that a time within a second has five bits
LAYER = bytes.fromhex("00000100 00000120 00c48d8800cd030408144300")


def vop(coded, kind=0b01, marker=1, seconds=0b0):
    """The start code, the kind, no second, a marker, the time, another, whether it is coded, stuffing."""
    bits = f"{kind:02b}{seconds:b}1{0:05b}{marker}{coded}01111"
    return b"\0\0\1\xb6" + int(bits, 2).to_bytes(len(bits) // 8)


@pytest.mark.parametrize(
    ("packets", "shows"),
    [
        ([vop(1), vop(0), LAYER + vop(1)], [True, False, True]),
        ([vop(1, kind=0b10), vop(1, kind=0b11)], [None, True]),  # B, sprites
        ([vop(1, marker=0), vop(1, seconds=0b111111110)], [None, True]),
        ([vop(1)[:5], vop(1) + vop(0), b"", LAYER], [None] * 4),
        ([LAYER.replace(b"\x8d\x88", b"\x8d\xa8") + vop(1)], [None]),  # no rectangle
    ],
)
def test_what_the_headers_of_mpeg4_tell(packets, shows):
    assert list(map(hidden.Mpeg4(LAYER), packets)) == shows
    assert hidden.Mpeg4(b"")(vop(1)) is None


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.webm"])
def test_what_headers_tell_is_not_decoded_to_be_counted(tmp_path, monkeypatch, name):
    path, decoded = render(tmp_path / name, "libvpx" if name == "a.webm" else "mpeg4"), []
    frames = decode.AvVideo._frames
    monkeypatch.setattr(decode.AvVideo, "_count", lambda self: pytest.fail("decodes all of the file"))
    monkeypatch.setattr(
        decode.AvVideo,
        "_frames",
        lambda *args, **options: (decoded.append(frame) or frame for frame in frames(*args, **options)),
    )
    with open_video(path) as video:
        assert video.num_frames == FRAMES
        assert numbers(video.read([FRAMES - 1])) == [FRAMES - 1]
    assert 0 < len(decoded) <= 10  # from the last key frame on


def test_a_stream_that_appears_midway(tmp_path, monkeypatch):
    """PyAV may want to flush it, last of all, and does not know it: that is chance, here it always does."""

    class Container:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def demux(self, stream):
            yield from self.container.demux(stream)
            raise IndexError("list index out of range")

    plain = av.open
    paths = [render(tmp_path / "by_time.ts"), render(tmp_path / "by_place.h264")]
    monkeypatch.setattr(decode.av, "open", lambda *args, **options: Container(plain(*args, **options)))
    for path in paths:
        with open_video(path) as video:
            assert numbers(video.read(range(FRAMES))) == list(range(FRAMES))
            assert numbers(video.read([FRAMES - 1])) == [FRAMES - 1]


def test_repeated_timestamps(tmp_path):
    def repeat(place, packet):
        if place == 10:
            packet.pts = packet.dts = packet.pts - 40
        return [packet]

    path = remux(render(tmp_path / "a.mkv", "libvpx-vp9"), tmp_path / "b.mkv", repeat)
    assert_exact(path, FRAMES)


def test_frames_in_front_of_the_first_key_frame_are_not_counted(tmp_path):
    source = render(tmp_path / "a.mkv", options={"x264-params": X264})
    path = remux(source, tmp_path / "b.mkv", lambda place, packet: [packet] * (place >= 5))
    assert_exact(path, 30)
    assert numbers(open_video(path).read([0, 29])) == [10, 39]


def test_a_wrong_frame_count_in_the_header(tmp_path):
    path = render(tmp_path / "a.avi", "mpeg4")
    place = path.read_bytes().index(b"strh") + 8 + 32  # dwLength of the stream
    for count in (7, 99):
        patch(path, place, struct.pack("<I", count))
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == count
        assert_exact(path, FRAMES)


@pytest.mark.parametrize("bframes", [0, 3])
def test_an_edit_list_cuts(tmp_path, bframes):
    params = f"keyint=10:min-keyint=10:scenecut=0:bframes={bframes}:b-adapt=0"
    path = render(tmp_path / "a.mp4", options={"x264-params": params})
    place = path.read_bytes().index(b"elst") + 12  # of the duration (ms), then the begin (1/12800)
    duration, begin = struct.unpack_from(">Ii", path.read_bytes(), place)
    patch(path, place, struct.pack(">Ii", duration - 20 * 40, begin + 15 * 512))
    assert_exact(path, 20)
    assert numbers(open_video(path).read(range(20))) == list(range(15, 35))


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2), ((1, 0, 0, 1), 0)],
)
def test_frames_are_upright(tmp_path, matrix, turns):
    path = render(tmp_path / "a.mp4", n=12, size=(256, 128))
    stored = open_video(path).read([3, 11])
    a, b, c, d = (number << 16 for number in matrix)
    place = path.read_bytes().index(b"tkhd") + 44
    patch(path, place, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    upright = open_video(path).read([3, 11])
    assert torch.equal(upright, stored.rot90(turns, (2, 3)))
    with open_video(path, "decord") as video:
        assert torch.equal(video.read([3, 11]), upright)


@pytest.mark.parametrize(
    ("pixels", "space", "full"),
    [("yuv420p", "ITU709", 1), ("yuv420p", "ITU601", 1), ("yuvj420p", "ITU601", 2)],
)
def test_colours_are_those_that_went_in(tmp_path, pixels, space, full):
    path = tmp_path / "a.mp4"
    colours = np.array([(200, 40, 30), (30, 180, 60), (40, 60, 210), (128, 128, 128)], np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        stream.codec_context.colorspace = {"ITU709": 1, "ITU601": 6}[space]
        stream.codec_context.color_range = full
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour), format="rgb24")
            container.mux(
                stream.encode(frame.reformat(format=pixels, dst_colorspace=space, dst_color_range=full))
            )
        container.mux(stream.encode(None))
    for decoder in ("av", "decord"):
        with open_video(path, decoder) as video:
            read = video.read(range(4)).float().mean((2, 3))
        assert (read - torch.from_numpy(colours).float()).abs().max() <= 4


def test_the_video_is_read_and_not_its_cover(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 200, 200, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = SIZE
        image = av.VideoFrame.from_ndarray(picture(255, (200, 200)), format="rgb24")
        container.mux(cover.encode(image))
        container.mux(cover.encode(None))
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode(None))
    assert numbers(open_video(path).read(range(5))) == list(range(5))


def test_what_is_asked_for_is_checked(tmp_path):
    path = render(tmp_path / "a.mp4")
    with open_video(str(path)) as video:
        for index in (-1, 40):
            with pytest.raises(IndexError, match=rf"frame {index} is not in 0\.\.39"):
                video.read([0, index])
        with pytest.raises(ValueError, match="no frame asked for"):
            video.read([])
    with pytest.raises(ValueError, match="did you mean 'decord'"):
        open_video(path, decoder="decor")


def test_decord_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match="pip install decord"):
        open_video(render(tmp_path / "a.mp4", n=2), "decord")


def _write(path, content=b""):
    path.write_bytes(content)
    return path


def _sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


def _no_frames(path):
    return remux(render(path.with_name("full.mkv"), n=3), path, lambda place, packet: [])


def _cut_off(path):
    render(path)
    return _write(path, path.read_bytes()[: path.stat().st_size // 2])


def _folder(path, *names):
    path.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(path / name)
    return path


def _two_sizes(path):
    _folder(path, "1.png")
    Image.new("L", (9, 5)).save(path / "2.png")
    return path


def _bad_exif(path):
    """A text in the place of the width."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return _write(path, path.read_bytes().replace(b"\0\x02\x01\x0e", b"\0\x02\x01\0"))


def _of_floats(path):
    Image.new("F", (8, 8)).save(path)
    return path


UNREADABLE = {
    "missing.mp4": (lambda path: path, "no such file"),
    "empty.mp4": (_write, "empty file"),
    "text.mp4": (lambda path: _write(path, b"to be a video\n" * 50), "Invalid data"),
    "sound.mp4": (_sound_only, "no video stream"),
    "no_frames.avi": (_no_frames, "holds no frame"),
    "cut_off.mp4": (_cut_off, "Invalid data"),
    "pipe.mp4": (lambda path: os.mkfifo(path) or path, "not a regular file"),
    "empty": (_folder, "without images"),
    "holes": (lambda path: _folder(path, "img_01.png", "img_02.png", "img_04.png"), "frame 3 is"),
    "exif.jpg": (_bad_exif, "required argument is not an integer"),
    "floats.tif": (_of_floats, "one number of 32 bits a pixel"),
    "text.jpg": (lambda path: _write(path, b"to be an image\n"), "cannot identify"),
    "sizes": (_two_sizes, "frame 1 of 2: its size is 9x5, that of others 8x8"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_says_why(tmp_path, name):
    make, cause = UNREADABLE[name]
    path = make(tmp_path / name)
    with pytest.raises(DecodeError, match=cause) as error, open_video(path) as video:
        video.read(range(video.num_frames))
    assert_one_line(error, path)


@pytest.mark.parametrize("name", ["missing.mp4", "empty.mp4", "text.mp4", "sound.mp4"])
def test_what_decord_cannot_read_says_why(tmp_path, name):
    path = UNREADABLE[name][0](tmp_path / name)
    with pytest.raises(DecodeError) as error:
        open_video(path, "decord")
    assert_one_line(error, path)


def test_a_change_of_size_is_an_error(tmp_path):
    small, large = render(tmp_path / "a.h264"), render(tmp_path / "b.h264", size=(128, 96))
    path = _write(tmp_path / "c.h264", small.read_bytes() + large.read_bytes())
    with open_video(path) as video:
        assert numbers(video.read([39, 3])) == [39, 3]
        assert numbers(video.read([43, 79])) == [3, 39]
        with pytest.raises(DecodeError, match="its size is 128x96, that of others 96x64"):
            video.read([3, 43])


@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_nothing_stays_open(tmp_path, decoder):
    def is_open(path):
        table = Path("/proc/self/fd")
        links = [os.path.realpath(link) for link in table.iterdir()] if table.is_dir() else []
        return str(path.resolve()) in links

    source = render(tmp_path / "a.mp4", options={"tune": "zerolatency"})
    with open_video(source, decoder) as video:
        video.read([5])
    assert not is_open(source)
    path = spoil(source, tmp_path / "b.mp4", 5)
    with open_video(path) as video, pytest.raises(DecodeError) as error:
        video.read([5])
    assert not is_open(path)  # though the error still holds its traceback
    assert_one_line(error, path)


def test_a_folder_of_frames_in_natural_order(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(picture(number)).save(folder / f"img_{number}.png")
    (folder / "labels.txt").write_text("not an image")
    (folder / "._img_1.png").write_text("not an image either")
    with open_video(folder) as video:
        assert (video.num_frames, video.fps) == (12, 0.0)
        assert numbers(video.read([11, 2, 10, 2])) == [11, 2, 10, 2]
        with pytest.raises(IndexError, match="frame 12 is not in"):
            video.read([12])


def test_an_image_is_a_video_of_one_frame(tmp_path):
    path = tmp_path / "a.JPG"
    image = Image.fromarray(picture(0b11110000)).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image.save(path, exif=exif)
    with open_video(path) as video:
        assert video.num_frames == 1
        assert video.read([0, 0]).shape == (2, 3, SIZE[1], SIZE[0])
        assert numbers(video.read([0])) == [0b00001111]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_of_16_bits_the_higher_byte_is_taken(tmp_path, suffix):
    grey = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 17
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    clip = open_video(tmp_path / f"a.{suffix}").read([0])
    assert torch.equal(clip[0], torch.arange(256, dtype=torch.uint8).view(16, 16).expand(3, -1, -1))


def test_a_folder_that_may_not_be_looked_into_is_unreadable(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DecodeError, match="Permission denied") as error:
        open_video(tmp_path)
    assert_one_line(error, tmp_path)


def test_names_with_colons_and_percents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    render(tmp_path / "a.mp4", n=3).rename("clip-00:01 %03d.mp4")
    assert numbers(open_video("clip-00:01 %03d.mp4").read([2])) == [2]


@pytest.mark.parametrize("path", sorted(SHARED.glob("*.*")), ids=lambda path: path.name)
def test_real_files(path):
    if path.suffix not in VIDEO_SUFFIXES:
        return
    with open_video(path) as video:
        if path.name in BROKEN:
            with pytest.raises(DecodeError, match=f"frame 30 of {video.num_frames}: ") as error:
                video.read([30])
            assert_one_line(error, path)
        else:
            whole = full_decode(path)
            assert video.num_frames == len(whole)
            some = [len(whole) - 1, 0, len(whole) // 2, 0]
            assert torch.equal(video.read(some), whole[some])


REAL = {  # frames, height, width, as players show them
    "nasa_13013_two_video_streams.mp4": (390, 270, 480),  # the default one of two streams
    "h265_128x128.mp4": (10, 128, 128),
    "h264_10bit.mp4": (30, 200, 200),
    "av1_640x360.mkv": (125, 360, 640),
    "vp9_odd_dimensions.webm": (30, 121, 161),
    "h264_fragmented.mp4": (30, 720, 1080),
    "android_slow_motion.mp4": (7, 720, 1280),
    "sample_mpeg4.avi": (96, 400, 960),  # the header says 98
    "video_desks.3gp": (71, 288, 352),
    "rotated_90.mov": (3, 568, 320),
    "unordered.mov": (4, 50, 50),
    "vp8_bbb.webm": (24, 720, 1280),
    "no_duration.webm": (74, 720, 1280),
    "action_340x256_10s.mp4": (300, 256, 340),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_have_the_frames_they_are_known_for(name):
    if not (SHARED / name).exists():
        pytest.skip("the real files are not at hand")
    with open_video(SHARED / name) as video:
        assert (video.num_frames, *video.read([video.num_frames - 1]).shape[2:]) == REAL[name]


def test_what_comes_before_the_damage_of_a_real_file_is_read():
    if not SHARED.is_dir():
        pytest.skip("the real files are not at hand")
    with open_video(SHARED / "corrupted.mp4", threads=1) as video:
        assert video.read([0, 20]).shape == (2, 3, 720, 1280)
        for lost in (28, 49):
            with pytest.raises(DecodeError, match=f"frame {lost} of 50"):
                video.read([lost])


def test_what_a_cut_off_file_leaves_unknown_stays_unknown():
    """A packet of which only the decoder can tell, before the packet within which the file ends."""
    packet = _Listed(0, 0, True, False, False, 0, 100, 1)
    packets = [packet, packet._replace(pts=1, discard=None), packet._replace(pts=3), packet._replace(pts=2)]
    kept, place = _without_end([*packets[:3], packets[3]._replace(corrupt=True, place=300)])
    assert [p.discard for p in kept] == [False, None, True]
    assert place == 300
