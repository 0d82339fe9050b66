"""The server: whoever says what, those who watch lose nothing."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from stream_r1.cli import main
from stream_r1.sampling.video import VideoWriter, read_video
from stream_r1.serve.client import LiveClient
from stream_r1.serve.engine import encode
from stream_r1.serve.protocol import MAX_PROMPT, MAX_TEXT, Frame

ROOT = Path(__file__).parents[2]


def until(live: LiveClient, wanted: Callable[[Any], bool], most: int = 2000) -> Any:
    """The first event that is wanted."""
    for _ in range(most):
        event = live.receive()
        if wanted(event):
            return event
    raise AssertionError("it did not come")


def message(kind: str, **values: Any) -> Callable[[Any], bool]:
    def wanted(event: Any) -> bool:
        return isinstance(event, dict) and event["type"] == kind and values.items() <= event.items()

    return wanted


def frame(event: Any) -> bool:
    return isinstance(event, Frame)


def raw(url: str, **more: Any) -> ClientConnection:
    return connect(f"ws{url.removeprefix('http')}/socket", max_size=None, **more)


def test_frames_come_in_order_and_a_prompt_changes_them(served: str) -> None:
    with LiveClient(served, prompt="snow") as live:
        assert live.hello["size"] == [16, 32]
        frames = [until(live, frame) for _ in range(30)]
        assert [one.number for one in frames] == list(range(frames[0].number, frames[0].number + 30))
        assert Image.open(io.BytesIO(frames[0].picture)).size == (32, 16)
        due = [one.due for one in frames]
        assert due == sorted(due)
        for request, recache in ((7, False), (8, True)):
            live.prompt(f"a tree {request}", recache=recache, request=request)
            changed = until(live, message("changed", request=request))
            assert {"wait", "text", "model", "decode", "encode"} == changed["stages"].keys()
            assert until(live, frame).prompt == changed["prompt"]  # what waited is gone


def test_the_stream_is_the_pipelines_own(served: str) -> None:
    """Denoised and decoded apart, sent and unpacked: the video that the pipeline makes in one go."""
    from sampling_models import SIZE, WordEncoder, tiny_student, tiny_vae

    from stream_r1.sampling.pipeline import StreamR1Pipeline

    pipeline = StreamR1Pipeline(tiny_student(), tiny_vae(), WordEncoder(), size=SIZE, fps=24)
    expected = pipeline("a tree in snow", num_frames=33, seed=11).frames[0]
    with LiveClient(served, prompt="a tree in snow", seed=11) as live:
        frames = {one.number: one for one in (until(live, frame) for _ in range(33))}
    pictures = encode((expected * 255).round().to(torch.uint8).movedim(1, -1))
    assert len(frames) == 33
    for number, one in frames.items():
        assert number >= 33 or one.picture == pictures[number].jpeg, number


def test_pause_restart_and_the_same_seed_again(served: str) -> None:
    with LiveClient(served, prompt="a butterfly", seed=5) as live:
        first = until(live, frame)
        live.pause()
        until(live, message("state", paused=True))
        live.say({"type": "seen", "frame": 10**6})
        quiet = [live.receive() for _ in range(3)]  # figures continue, a frame or two may have been under way
        assert sum(map(frame, quiet[1:])) <= 1
        live.restart(5, request=3)
        until(live, message("changed", request=3))
        again = until(live, frame)
        assert again.number > first.number
        assert again.picture == first.picture
        live.restart(6, request=4)
        until(live, message("changed", request=4))
        assert until(live, frame).picture != first.picture


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_a_stream_begins_with_an_upload_of_any_size(kind: str, served: str, tmp_path: Path) -> None:
    if kind == "picture":
        path = tmp_path / "red.png"
        Image.new("RGB", (90, 90), (200, 30, 30)).save(path)
    else:
        path = tmp_path / "red.mp4"
        with VideoWriter(path, 24) as writer:
            writer.write(torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).expand(40, 3, 48, 64))
    with LiveClient(served, prompt="snow") as live:
        until(live, frame)
        live.begin_with(path.read_bytes(), request=9)
        until(live, message("changed", request=9))
        until(live, frame)
        live.begin_with(b"no picture at all", request=10)
        refused = until(live, message("error", code="refused", request=10))
        assert refused["message"].startswith("read_video: what was uploaded cannot be read as a video")
        until(live, frame)  # what was there continues


def malformed() -> list[str | bytes]:
    texts: list[str | bytes] = [
        "",
        "{",
        "[]",
        "null",
        "1e999",
        '"prompt"',
        "{}",
        "[" * 2000,
        b"",
        b"\x00" * 99,
    ]
    kinds = ("join", "prompt", "pause", "restart", "upload", "seen", "quit", "", "__proto__")
    values: list[Any] = [None, -1, 2**70, 1.5, True, "", "x" * (MAX_PROMPT + 1), [], {}, "\x00"]
    for kind in kinds:
        for value in values:
            texts.append(
                json.dumps({"type": kind, "text": value, "paused": value, "seed": value, "bytes": value})
            )
    return [*texts, "x" * (MAX_TEXT + 1), '{"type":"prompt","text":"\\ud800"}', b"\xff" * 70_000]


def test_a_hundred_malformed_messages_harm_nobody(served: str) -> None:
    said = malformed()
    assert len(said) >= 100
    with LiveClient(served, stream="own", prompt="a tree") as live:
        until(live, frame)
        answered = 0
        for start in range(0, len(said), 40):
            with LiveClient(served, stream=live.hello["stream"]) as other:
                for text in said[start : start + 40]:
                    other._socket.send(text)
                for _ in said[start : start + 40]:
                    until(other, message("error"))
                    answered += 1
        assert answered == len(said)
        for text in (said[1], said[4], b"\x01", '{"type":"pause","paused":true}'):  # as the first word
            with raw(served) as socket:
                socket.send(text)
                assert json.loads(socket.recv(10))["type"] == "error"
                with pytest.raises(ConnectionClosed):
                    socket.recv(10)
        numbers = [until(live, frame).number for _ in range(24)]
        assert numbers == list(range(numbers[0], numbers[0] + 24))


def flooded(live: LiveClient) -> None:
    for _ in range(3000):
        live.pause()
    while True:
        live.receive()


def test_a_flood_is_shown_the_door_and_a_wrong_version_too(served: str) -> None:
    with LiveClient(served, prompt="a tree") as live:
        flood = LiveClient(served, stream=live.hello["stream"])
        with pytest.raises((ConnectionError, ConnectionClosed)):
            flooded(flood)
        with raw(served) as old:
            old.send('{"type":"join","version":99}')
            assert json.loads(old.recv(10))["code"] == "version"
        until(live, frame)


def test_fifty_viewers_lose_nothing_while_one_stalls_and_others_go(served: str) -> None:
    with LiveClient(served, prompt="a fat rabbit") as live:
        until(live, frame)
        stream = live.hello["stream"]
        stalled = LiveClient(served, stream=stream)
        until(stalled, frame)
        seen: list[list[int]] = []

        def watch(frames: int) -> None:
            one = LiveClient(served, stream=stream)
            seen.append([until(one, frame).number for _ in range(frames)])
            if frames == 120:
                one.close()
            else:
                one._socket.socket.close()  # without a word

        threads = [threading.Thread(target=watch, args=(frames,)) for frames in [120] * 44 + [9] * 5]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert sorted(map(len, seen)) == [9] * 5 + [120] * 44
        for numbers in seen:
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        frames = [until(stalled, frame).number for _ in range(110)]
        assert max(later - one for one, later in itertools.pairwise(frames)) > 1
        assert until(stalled, message("stats"))["dropped"] > 0
        stalled.close()


def test_limits_streams_and_who_controls_them(served: str) -> None:
    own = [LiveClient(served) for _ in range(3)]
    with pytest.raises(ConnectionError, match="all streams are taken, 3"):
        LiveClient(served)
    with LiveClient(served, stream="any") as watching:
        assert watching.hello["key"] is None
        watching.prompt("mine now")
        until(watching, message("error", code="watching"))
    with pytest.raises(ConnectionError, match="no stream nowhere"):
        LiveClient(served, stream="nowhere")
    hello = own[0].hello
    own[0].close()  # a lost connection comes back to its stream
    with LiveClient(served, stream=hello["stream"], key=hello["key"]) as back:
        assert back.hello["key"] == hello["key"]
        back.prompt("a tree", request=5)
        until(back, message("changed", request=5))
    for one in own:
        one.close()


def test_the_download_is_what_was_shown(served: str, tmp_path: Path) -> None:
    with LiveClient(served, prompt="snow on the meadow") as live:
        until(live, lambda event: frame(event) and event.number >= 40)
        path = tmp_path / "seen.mp4"
        path.write_bytes(urllib.request.urlopen(live.recording, timeout=10).read())
    video, fps = read_video(path)
    assert fps == 24
    assert len(video) >= 30
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served}/recordings/nobody.mp4", timeout=10)


def test_other_origins_other_names_and_a_missing_token_get_nothing(served: str) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(served, headers=headers), timeout=10)
    with pytest.raises(InvalidStatus, match="403"), raw(served, origin="http://evil.example"):
        pass
    with raw(served, origin=served):
        pass

    from stream_r1.pages.application import refusal

    host, guarded = {"host": "machine:8600"}, ("secret", ("https://friend.example",))
    assert refusal(host, {}, *guarded) is not None
    assert refusal(host, {"token": "wrong"}, *guarded) is not None
    assert refusal(host | {"origin": "https://friend.example"}, {"token": "secret"}, *guarded) is None
    assert refusal(host | {"origin": "https://enemy.example"}, {"token": "secret"}, *guarded) is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "huge"], "--size: expected height x width as 64x112, got 'huge'"),
        (["--models", "/nowhere", "--port", "1"], "/nowhere"),
        (["--models", "/nowhere", "--workers", "2"], "/nowhere"),
        (["--prompt", "a" * 100_000], "--prompt: expected at most"),
        (["--host", "192.0.2.1"], "--host, --port: expected an address of this machine"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_command_refuses_to_be_one_of_several(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else each of torchrun's processes would load models, and all but one find the port taken."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        main(["serve"])
    assert "serve: expected one process, got 4 by a launcher" in capfd.readouterr().err


def test_the_command_refuses_a_port_that_is_taken(served: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--port", served.rpartition(":")[2]])
    assert "that nothing listens on" in capfd.readouterr().err


def test_two_workers_serve_one_folder(tmp_path: Path) -> None:
    from sampling_models import save_tiny_wan

    save_tiny_wan(tmp_path / "wan")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "stream_r1",
        "serve",
        "--port",
        str(port),
        "--workers",
        "2",
        "--prompt",
        "a fat",
    ]
    command += ["--models", str(tmp_path / "wan"), "--size", "16x32", "--text-cache", str(tmp_path / "texts")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    try:
        workers: dict[int, LiveClient] = {}
        deadline = time.monotonic() + 400
        while len(workers) < 2:
            assert time.monotonic() < deadline, "no two workers"
            assert process.poll() is None
            try:
                live = LiveClient(f"http://127.0.0.1:{port}")
            except OSError:
                time.sleep(0.3)
                continue
            if live.hello["worker"] in workers:
                live.close()
            else:
                workers[live.hello["worker"]] = live
        for live in workers.values():
            until(live, lambda event: frame(event) and event.number >= 20)
        time.sleep(1)
        for live in workers.values():  # whichever worker answers
            assert urllib.request.urlopen(live.recording, timeout=10).status == 200
            live.close()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(120)
