"""Streams: chunks of a clip are computed once, and what a stream says is what the clip says."""

import http.server
import itertools
import re
import socket
import threading
import time
import warnings
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from stvit_video import Recognizer, create_model
from stvit_video.cli import train
from stvit_video.cli.drawing import _of_video
from stvit_video.data import live
from stvit_video.data.decode import open_video
from stvit_video.data.demo import write_mp4
from stvit_video.data.stream import open_stream
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.data.views import Sampling
from stvit_video.errors import DecodeError
from stvit_video.weights import load_weights

SIZES = {
    **{"num_classes": 5, "num_frames": 8, "image_size": 16, "patch_size": (2, 8, 8)},
    **{"embed_dim": 24, "depth": 5, "num_heads": 2, "semantic_tokens": (4, 1, 1), "base_depth": 2},
}

OF_CLIPS = ("num_classes", "num_frames", "image_size")


def make(base_window=2, name="stvit_tiny_patch16_224", **more):
    torch.manual_seed(0)
    model = create_model(name, **SIZES | more, base_window=base_window).eval()
    if model.chunk_embed is not None:
        torch.nn.init.normal_(model.chunk_embed)
    return model


@pytest.mark.parametrize("base_window", [1, 2, 4])
@pytest.mark.parametrize("name", ["stvit_tiny_patch16_224", "pool_vit_tiny_patch16_224"])
@pytest.mark.parametrize("class_token", [False, True])
def test_chunks_joined_are_the_clip(name, base_window, class_token):
    model, clips = make(base_window, name, class_token=class_token), torch.randn(3, 3, 8, 16, 16)
    chunks = clips.unflatten(2, (model.chunks, -1)).transpose(1, 2)
    tokens = model.chunk_tokens(chunks.flatten(0, 1)).unflatten(0, (3, -1))
    assert model.chunks == 4 // base_window
    assert torch.allclose(model.join(tokens), model(clips), atol=1e-6)
    assert model.forward_features(clips).shape == (3, 4, 1, 1, 24)
    assert [grid.shape for grid in model.grids(clips, [1, 2, 5])] == [(3, 4, 2, 2, 24)] * 3


def test_superpatches_within_chunks_joined_are_the_clip():
    clips = torch.rand(2, 3, 8, 16, 16) * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    model = make(2, superpatches="contrast", superpatch_threshold=0.01)
    chunks = clips.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)
    tokens = model.chunk_tokens(chunks).unflatten(0, (2, 2))
    assert torch.allclose(model.join(tokens), model(clips), atol=1e-6)
    assert [grid.shape for grid in model.grids(clips, [1, 2, 5])] == [(2, 4, 2, 2, 24)] * 3
    plain = make(2)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(model(clips[1:]), plain(clips[1:]), atol=1e-6)  # nothing of noise is merged


def test_a_chunk_knows_nothing_of_the_others_before_they_are_joined():
    model, clips = make(), torch.randn(1, 3, 8, 16, 16)
    changed = clips.clone()
    changed[:, :, 4:] += 1
    before, after = (model.grids(x, [1, 2])[1] for x in (clips, changed))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:], atol=1e-2)
    assert not torch.allclose(model(clips), model(changed), atol=1e-3)
    swapped = torch.cat([clips[:, :, 4:], clips[:, :, :4]], 2)
    assert not torch.allclose(model(swapped), model(clips), atol=1e-4)
    torch.nn.init.zeros_(model.chunk_embed)  # which is all that tells their order
    assert torch.allclose(model(swapped), model(clips), atol=1e-6)


@pytest.mark.parametrize("budget", [{}, {"superpatch_tokens": 5}])
def test_chunks_with_superpatches_joined_are_the_clip(budget):
    model = make(superpatches="contrast", image_size=32, **budget)
    clips = 0.02 * torch.randn(2, 3, 8, 32, 32)
    clips[..., 16:] = torch.randn(2, 3, 8, 32, 16)
    chunks = clips.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)
    assert model.embed(chunks).x.shape[1] < 32
    tokens = model.chunk_tokens(chunks).unflatten(0, (2, 2))
    assert torch.allclose(model.join(tokens), model(clips), atol=1e-6)


@pytest.mark.parametrize("sizes", [{}, {"class_token": True}, {"semantic_proportional": True}])
def test_one_chunk_without_a_vector_is_the_plain_model(sizes):
    plain, one = (make(window, **sizes) for window in (None, 4))
    clips = torch.randn(2, 3, 8, 16, 16)
    one.load_state_dict(plain.state_dict() | {"chunk_embed": torch.zeros(1, 1, 1, 24)})
    assert torch.equal(one(clips), plain(clips))


def test_maps_of_chunks_lie_on_their_own_patches():
    maps = make().semantic_maps(torch.randn(2, 3, 8, 16, 16))
    assert maps.shape == (2, 4, 4, 2, 2)
    assert torch.allclose(maps.sum((2, 3, 4)), torch.ones(2, 4), atol=1e-6)
    assert maps[:, :2, 2:].count_nonzero() == maps[:, 2:, :2].count_nonzero() == 0


def test_every_parameter_of_a_chunked_model_learns():
    model = make().train()
    model(torch.randn(2, 3, 8, 16, 16)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_weights_of_a_model_without_chunks_come_in():
    report = load_weights(make(), make(None, centres=False).state_dict())
    assert set(report.fresh) == {"chunk_embed"} | {n for n in report.fresh if "centres" in n}
    assert set(report.resized) == {"pos_embed"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"base_window": 3}, "base_window=3: a clip of 4 tubelets does not divide"),
        ({"semantic_tokens": (2, 1, 1), "base_window": 1}, r"semantic_tokens=\(2, 1, 1\): 2 in time"),
        ({"semantic_tokens": None}, "base_window=2: chunks are joined by one reducer"),
        ({"name": "tome_vit_tiny_patch16_224"}, "base_window=2: chunks are joined by one reducer"),
    ],
)
def test_sizes_that_make_no_chunks(sizes, message):
    with pytest.raises(ValueError, match=message):
        make(**{"base_window": 2} | sizes)


def test_a_moment_costs_an_eighth_of_a_dense_clip():
    clip = {"num_classes": 400, "num_frames": 16, "image_size": 224}
    with torch.device("meta"):
        dense = create_model("vit_base_patch16_224", **clip).eval()
        model = create_model("stvit_base_patch16_224", base_window=2, **clip).eval()
        frames, tokens = torch.empty(1, 3, 16, 224, 224), torch.empty(1, 4, 32, 768)

    def cost(run):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    moment = cost(lambda: model.chunk_tokens(frames[:, :, :4])) + cost(lambda: model.join(tokens))
    assert 8 * moment <= cost(lambda: dense(frames))


@pytest.fixture(scope="module")
def recognize(tmp_path_factory):
    """A checkpoint with chunks: 8 frames, every second one, in chunks of 4."""
    folder = tmp_path_factory.mktemp("stream")
    for name in ("a", "b"):
        (folder / name).mkdir()
        write_mp4(folder / name / "clip.mp4", video(20))
    (folder / "train.csv").write_text("a/clip.mp4 0\nb/clip.mp4 1\n")
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in SIZES.items() if k not in OF_CLIPS}
    train(
        [
            *(f"--data.train={folder / 'train.csv'}", f"--output={folder / 'run'}", "--device=cpu"),
            *("--model.name=stvit_tiny_patch16_224", *(f"--model.{k}={v}" for k, v in sizes.items())),
            *("--model.base_window=2", "--data.num_frames=8", "--data.image_size=16", "--data.stride=2"),
            *("--train.epochs=1", "--train.batch_size=2", "--data.workers=0"),
        ]
    )
    return Recognizer(folder / "run" / "last.pt", device="cpu", timeout=30)


def video(frames, height=32, width=48):
    rng = np.random.default_rng(frames)
    start, step = rng.integers(0, 100, (1, height, width, 3)), rng.integers(0, 6, (1, 1, 1, 3))
    return ((start + np.arange(frames)[:, None, None, None] * step) % 256).astype(np.uint8)


def offline(recognize, path, first):
    """What the model says of the clip that begins with this frame."""
    with open_video(path) as frames:
        (clip,) = recognize._test_views(1, 1).transform(frames.read(range(first, first + 16, 2)))
    return recognize._scores(clip.transpose(0, 1)[None, None])[0, 0].numpy()


def test_a_stream_says_what_the_clip_of_the_same_frames_says(recognize, tmp_path):
    path = tmp_path / "long.mp4"
    write_mp4(path, video(50), fps=10)
    moments = list(recognize.stream(path))
    assert len(moments) == 5  # 25 frames are taken: 6 chunks of 4, a clip from the second on
    for k, moment in enumerate(moments):
        first = 8 * k
        assert np.allclose(moment.scores, offline(recognize, path, first), atol=1e-5)
        assert moment.start == pytest.approx(first / 10)
        assert moment.end == pytest.approx((first + 15) / 10)
        assert moment.dropped == 0
        assert moment.latency > 0
    second = list(recognize.stream(path, every=8))
    assert [m.start for m in second] == pytest.approx([0.0, 1.6, 3.2])
    assert np.array_equal(second[1].scores, moments[2].scores)
    with pytest.raises(ValueError, match="every=6: must be whole chunks of 4 frames"):
        recognize.stream(path, every=6)


def test_a_folder_that_grows(recognize, tmp_path, monkeypatch):
    monkeypatch.setattr("stvit_video.data.live.IDLE", 1.5)
    frames, folder = video(24), tmp_path / "frames"
    folder.mkdir()

    def write():
        for i, pixels in enumerate(frames):
            Image.fromarray(pixels).save(folder / f".{i}.png")
            (folder / f".{i}.png").rename(folder / f"img_{i}.png")
            time.sleep(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    moments = list(recognize.stream(folder))
    writer.join()
    assert len(moments) == 2
    for first, moment in zip((0, 8), moments, strict=True):
        assert np.allclose(moment.scores, offline(recognize, folder, first), atol=1e-5)


def test_an_address_is_read_at_its_own_pace(recognize, tmp_path, monkeypatch):
    """More comes than a slow model takes: the oldest is dropped and counted, the rest is in order."""
    write_mp4(tmp_path / "a.mp4", video(160), fps=10)
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    model, tokens = recognize.model, recognize.model.chunk_tokens
    monkeypatch.setattr(model, "chunk_tokens", lambda x: (time.sleep(0.1), tokens(x))[1])
    address = f"http://127.0.0.1:{server.server_port}/a.mp4"
    moments = list(recognize.stream(address))
    assert moments
    assert all(a.end < b.end for a, b in itertools.pairwise(moments))
    taken = len(moments) + 1  # chunks, of 20
    assert sum(m.dropped for m in moments) >= 4 * (20 - taken) - 8 > 0
    with pytest.raises(DecodeError, match=r"http://127.0.0.1:\d+/none.mp4: "):
        list(recognize.stream(address.replace("a.mp4", "none.mp4")))
    server.shutdown()


def reader(source, sampling, frames=4):
    return live.LiveReader(source, sampling, CropTransform(16), frames)


@pytest.mark.parametrize("fps", [5, 12, 15])
def test_a_source_slower_than_the_sampling_repeats_frames_as_a_clip_does(fps, tmp_path):
    path, sampling = tmp_path / "slow.mp4", Sampling("dense", 8, 1, target_fps=15.0)
    write_mp4(path, video(20), fps=fps)
    read = reader(path, sampling)
    pixels = np.concatenate([chunk.pixels for _ in range(2) for chunk in read()], 1)
    with open_video(path) as frames:
        (clip,) = CropTransform(16)(frames.read(sampling.test(frames, 0.0)))
    assert np.array_equal(pixels, clip.transpose(0, 1))


def test_a_folder_has_no_rate_that_the_sampling_could_count_at(tmp_path):
    for i, pixels in enumerate(video(8)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    sampling = Sampling("dense", 8, 2, target_fps=10.0)
    with warnings.catch_warnings(action="error"):
        (chunk,) = reader(tmp_path, sampling)()
    with open_video(tmp_path) as frames:
        (clip,) = CropTransform(16)(frames.read(sampling.test(frames, 0.0)[:4]))
    assert np.array_equal(chunk.pixels, clip.transpose(0, 1))


def test_the_first_moment_waits_for_a_clip_and_no_longer(recognize, tmp_path):
    write_mp4(tmp_path / "long.mp4", video(50), fps=10)
    moments = list(recognize.stream(tmp_path / "long.mp4", every=12))
    assert [m.start for m in moments] == pytest.approx([0.0, 2.4])


def test_what_was_dropped_is_said_with_the_chunk_behind_it(monkeypatch):
    """Chunks 1 to 3 are lost, between 0 and 4."""
    read, go, done = reader("udp://camera", Sampling("dense", 8)), threading.Event(), threading.Event()

    def chunks():
        for i in range(6):
            yield live.Chunk(i, i + 1, np.zeros(1), 0.0, 0)
            go.wait(10)
        done.set()

    monkeypatch.setattr(read, "_read", chunks)
    first = read()
    go.set()
    assert done.wait(10)
    chunks = [chunk for chunks in (first, read(), read()) for chunk in chunks]
    assert [(chunk.start, chunk.dropped) for chunk in chunks] == [(0, 0), (4, 12), (5, 0)]
    assert read() is None


def test_no_error_of_the_thread_that_reads_is_waited_for_in_vain(monkeypatch):
    read = reader("udp://camera", Sampling("dense", 8))

    def fail():
        raise MemoryError("too large")
        yield

    monkeypatch.setattr(read, "_read", fail)
    with pytest.raises(MemoryError, match="too large"):
        read()


def test_an_address_that_does_not_answer_and_one_that_ends_are_named_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "PATIENCE", 0.3)
    with av.open(str(tmp_path / "cut.ts"), "w", format="mpegts") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.height, stream.width = 32, 48
        for pixels in video(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())

    def serve(content):
        link, _ = server.accept()
        with link:
            link.sendall(content)
            if not content:
                link.recv(10_000)
                time.sleep(1)

    http = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/camera"
        for content, message in (
            (b"", "no answer in 0.3 s"),
            (http + (tmp_path / "cut.ts").read_bytes(), "after 0.80 s: "),
        ):
            threading.Thread(target=serve, args=(content,), daemon=True).start()
            read = reader(address, Sampling("dense", 8))
            with pytest.raises(DecodeError, match=f"^{re.escape(address)}: {message}"):
                list(iter(read, None))


def test_an_image_that_is_being_written_has_time_however_late_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "IDLE", 0.6)
    monkeypatch.setattr(live, "LOOK", 0.01)
    pictures, begun = live._growing(tmp_path), time.monotonic()
    while time.monotonic() - begun < 0.45:
        assert next(pictures) is None
    image = tmp_path / "1.png"
    Image.fromarray(video(1)[0]).save(image)
    content = image.read_bytes()
    image.write_bytes(content[:-40])
    begun = time.monotonic()
    while time.monotonic() - begun < 0.25:
        assert next(pictures) is None
    image.write_bytes(content)
    assert np.array_equal(next(filter(None, pictures)).pixels, video(1)[0])
    image.with_name("2.png").write_bytes(content[:-40])
    with pytest.raises(DecodeError, match=r"2\.png"):
        list(pictures)


def test_what_cannot_be_streamed(recognize, tmp_path):
    with pytest.raises(DecodeError, match="no such file"):
        list(recognize.stream(tmp_path / "none.mp4"))
    cut = tmp_path / "cut.mp4"
    write_mp4(cut, video(50))
    cut.write_bytes(cut.read_bytes()[:-4000])
    with pytest.raises(DecodeError, match="cut.mp4"):
        list(recognize.stream(cut))


def test_a_folder_that_goes_is_one_line(tmp_path):
    (tmp_path / "frames").mkdir()
    pictures = live._growing(tmp_path / "frames")
    assert next(pictures) is None
    (tmp_path / "frames").rmdir()
    with pytest.raises(DecodeError, match="frames: No such file or directory"):
        next(pictures)


def test_a_video_without_a_frame_is_one_line_and_no_file(tmp_path):
    """Its header is sound: what is to be drawn is looked at before a file is begun."""
    path = tmp_path / "a.mp4"
    write_mp4(path, video(8))
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4 if content.index(b"moov") > start else len(content)
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])
    frames = SimpleNamespace(frames=lambda path: ((p.time, p.lasts, None, None) for p in shown(path)))

    def shown(path):
        with open_stream(path) as stream:
            yield from stream

    with pytest.raises(DecodeError, match=r"a\.mp4"):
        list(_of_video(frames, path, tmp_path / "drawn.mp4"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
