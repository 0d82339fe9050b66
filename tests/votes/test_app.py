"""The page's server: blind, no vote lost or counted twice, hostile input refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from votes_folder import comparison, write_comparison

from stream_r1.commands.votes import prepare, report
from stream_r1.config import SettingsError
from stream_r1.sampling.video import read_video
from stream_r1.votes.app import create_app
from stream_r1.votes.damage import damaged
from stream_r1.votes.plan import Comparison, load
from stream_r1.votes.report import summarise
from stream_r1.votes.store import VoteStore

ROOT = Path(__file__).parents[2]
LOCAL = "http://localhost"
QUESTIONS = ("dynamics", "visual quality", "overall")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    made = comparison(tmp_path_factory.mktemp("votes"), attention_checks=1)
    prepare(made)
    return made


@pytest.fixture
def client(compared: Comparison) -> TestClient:
    return TestClient(create_app(compared), LOCAL)


def begin(client: TestClient) -> str:
    return client.post("/api/raters").json()["rater"]


def answers(answer: str) -> dict[str, str]:
    return dict.fromkeys(QUESTIONS, answer)


def test_a_rater_goes_from_the_first_pair_to_the_last(client: TestClient, compared: Comparison) -> None:
    rater, seen = begin(client), []
    while (found := client.get(f"/api/raters/{rater}/next").json())["item"] is not None:
        assert found["done"] == len(seen)
        for side in ("left", "right"):
            video = client.get(f"/api/raters/{rater}/items/{found['item']}/{side}.mp4")
            assert video.headers["content-type"] == "video/mp4"
            said = json.dumps([dict(video.headers), found])  # nothing tells which model is which
            assert "plain" not in said
            assert "weighted" not in said
        sent = {"item": found["item"], "answers": answers("left"), "seconds": 3.5}
        assert client.post(f"/api/raters/{rater}/votes", json=sent).json() == {"kept": True}
        seen.append(found["item"])
    assert seen == list(range(4))
    kept = [vote for vote in VoteStore(compared.database).votes() if vote.rater == rater]
    assert len(kept) == 4 * len(QUESTIONS)
    shown = {item.key: item for item in compared.items(rater)}
    assert all(vote.winner == shown[vote.item].left for vote in kept)


def test_no_vote_is_counted_twice_or_changed(client: TestClient, compared: Comparison) -> None:
    rater = begin(client)
    url, sent = f"/api/raters/{rater}/votes", {"item": 1, "answers": answers("tie")}
    assert client.post(url, json=sent).status_code == 200
    assert client.post(url, json=sent).status_code == 200  # sent again, as after a lost answer
    assert client.post(url, json=sent | {"answers": answers("left")}).status_code == 409
    votes = [vote for vote in VoteStore(compared.database).votes() if vote.rater == rater]
    assert [vote.answer for vote in votes] == ["tie"] * 3


def test_two_raters_at_once_lose_nothing(compared: Comparison) -> None:
    client = TestClient(create_app(compared), LOCAL)
    raters = [begin(client) for _ in range(8)]

    def rate(rater: str) -> None:
        for item in range(4):
            for _ in range(2):
                sent = {"item": item, "answers": answers("right")}
                assert client.post(f"/api/raters/{rater}/votes", json=sent).status_code == 200

    threads = [threading.Thread(target=rate, args=(rater,)) for rater in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = [vote for vote in VoteStore(compared.database).votes() if vote.rater in raters]
    assert len(votes) == 8 * 4 * 3


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"\xff\xfe", 422),
        (b'{"item": 0}', 422),
        (b'{"item": -1, "answers": {}}', 422),
        (b'{"item": 1e9, "answers": {}}', 422),
        (b'{"item": 0, "answers": {"overall": "left"}}', 422),
        (b'{"item": 0, "answers": {"overall": "both", "dynamics": "left", "visual quality": "left"}}', 422),
        (b'{"item": 0, "answers": 3, "more": 1}', 422),
        (b" " * 20_000, 413),
    ],
)
def test_malformed_votes_are_refused_and_leave_nothing(
    sent: bytes, status: int, client: TestClient, compared: Comparison
) -> None:
    rater = begin(client)
    before = VoteStore(compared.database).votes()
    headers = {"content-type": "application/json"}
    assert client.post(f"/api/raters/{rater}/votes", content=sent, headers=headers).status_code == status
    assert VoteStore(compared.database).votes() == before


def test_unknown_raters_items_and_sides(client: TestClient) -> None:
    rater = begin(client)
    assert client.get("/api/raters/nobody-here/next").status_code == 404
    assert client.get("/api/raters/..%2f..%2fetc/next").status_code in (404, 422)
    assert client.get(f"/api/raters/{rater}/items/99/left.mp4").status_code == 404
    assert client.get(f"/api/raters/{rater}/items/0/middle.mp4").status_code == 422
    sent = {"item": 0, "answers": answers("left")}
    assert client.post("/api/raters/nobody-here/votes", json=sent).status_code == 404


def test_away_from_this_machine_the_link_has_a_token(compared: Comparison) -> None:
    client = TestClient(create_app(compared, token="secret-of-the-link"), "http://votes.example")
    assert client.get("/").status_code == 403
    assert client.get("/?token=wrong").status_code == 403
    assert client.get("/?token=secret-of-the-link").status_code == 200
    assert client.post("/api/raters", headers={"x-token": "secret-of-the-link"}).status_code == 201


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}])
def test_other_names_and_pages_of_others_get_nothing(headers: dict[str, str], client: TestClient) -> None:
    assert client.post("/api/raters", headers=headers).status_code == 403
    assert client.post("/api/raters", headers={"origin": LOCAL}).status_code == 201


def test_videos_can_be_searched_by_players(client: TestClient) -> None:
    rater = begin(client)
    part = client.get(f"/api/raters/{rater}/items/0/left.mp4", headers={"range": "bytes=0-99"})
    assert part.status_code == 206
    assert len(part.content) == 100


def test_the_damaged_copy_is_as_long_and_far_worse(compared: Comparison) -> None:
    (index,) = compared.checked
    paths = (compared.videos["plain"][index], compared.damaged(index))
    original, copy = (read_video(path)[0] for path in paths)
    assert original.shape == copy.shape
    assert (copy[1:8] - copy[:7]).abs().max() < 0.05  # it stands still
    noise = torch.rand(9, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    worse = damaged(noise)
    assert (worse - noise).abs().mean() > 0.2
    assert worse.std() < 0.3 * noise.std()  # neither detail nor colour is left


def test_a_killed_server_loses_no_vote_that_it_said_was_kept(tmp_path: Path) -> None:
    recipe = write_comparison(tmp_path, attention_checks=0)
    code = (
        "import os, signal, sys; from fastapi.testclient import TestClient; "
        "from stream_r1.votes.app import create_app; from stream_r1.votes.plan import load; "
        f"client = TestClient(create_app(load({str(recipe)!r}, [])), {LOCAL!r}); "
        "rater = client.post('/api/raters').json()['rater']\n"
        "for item in range(3):\n"
        f"    sent = {{'item': item, 'answers': {answers('left')!r}}}\n"
        "    print(client.post(f'/api/raters/{rater}/votes', json=sent).status_code, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == ["200"] * 3
    assert len(VoteStore(tmp_path / "out/votes.sqlite").votes()) == 9


def test_votes_on_other_videos_or_prompts_are_not_mixed(tmp_path: Path) -> None:
    recipe = write_comparison(tmp_path, attention_checks=0)
    with TestClient(create_app(load(recipe, [])), LOCAL) as client:
        begin(client)
    create_app(load(recipe, ["pairs_a_rater=2"]))
    video = tmp_path / "weighted" / "clip-9.mp4"
    content = video.read_bytes()
    video.write_bytes((tmp_path / "plain" / "clip-9.mp4").read_bytes())
    for taken in (create_app, prepare):
        with pytest.raises(SettingsError, match=r"out: begun with videos\.weighted "):
            taken(load(recipe, []))
    video.write_bytes(content)
    create_app(load(recipe, []))
    (tmp_path / "prompts.txt").write_text("a star\na red ball rolls\na blue box floats\n")
    with pytest.raises(SettingsError, match="begun with prompts "):
        report(recipe, [])


def test_the_commands_serve_and_report(tmp_path: Path) -> None:
    recipe = write_comparison(tmp_path, attention_checks=0)
    with TestClient(create_app(comparison(tmp_path, attention_checks=0)), LOCAL) as client:
        rater = begin(client)
        client.post(f"/api/raters/{rater}/votes", json={"item": 0, "answers": answers("left")})
    command = [sys.executable, "-m", "stream_r1", "votes", "report", str(recipe)]
    environment = os.environ | {"COLUMNS": "160"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "3 votes of 1 raters" in done.stdout
    assert (tmp_path / "out/report.csv").read_text().count("\n") == 4
    assert "<!doctype html>" in (tmp_path / "out/report.html").read_text()
    assert summarise(VoteStore(tmp_path / "out/votes.sqlite").votes()).raters == 1
