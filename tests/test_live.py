"""What the live page is told of a log, and who is told: everything but the browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from batchnorm.live import Feed, page, server, write
from batchnorm.live.log_feed import PagePosition
from batchnorm.live.page_data import MOST, new_data
from batchnorm.live.run_status import status
from batchnorm.record import QUANTITIES, Log, Record, Writer

TOKEN = "a-token-of-these-tests"
PORT = 8421
OWN = f"127.0.0.1:{PORT}"
EVIL = "<img src=x onerror=\"document.title='taken'\">"


def layers(names):
    return [{"name": name, "channels": 8, "kind": "BatchNorm2d"} for name in names]


def look(step, names, tier="free", arrays=None, model=None, **values):
    """A record; a number stands for all layers."""
    rows = {q: v if isinstance(v, list) else [v] * len(names) for q, v in values.items()}
    return Record(step, names, rows, model or {}, tier, time.time(), arrays or {})


def percentiles(count, scale=1.0):
    rows = np.tile(np.array([-2.0, -1, 0, 1, 2]) * scale, (count, 1))
    return dict.fromkeys(("quantiles_input", "quantiles_output", "running_mean", "batch_mean", "running_var"), rows)


def small_log(folder, names=("stem.bn", "block.bn", "head.bn"), steps=20, end="finished"):
    """A log of every kind of line: free looks with a gap in the middle, probes with arrays, events."""
    writer = Writer(folder, layers(names))
    for step in range(1, steps + 1):
        gap = [None if 8 <= step <= 10 else 0.1 * step] * len(names)
        writer.progress(step, time.time(), {"loss": 1 / step, "accuracy": 1 - 1 / step}, 0.008)
        writer.write(look(step, names, shift=gap, noise=0.04, gap=0.2 + 0.01 * step, gamma=1.0, beta=0.0, dead=0.0))
        if step % 5 == 0:
            model = {"loss_train": 1 / step, "loss_eval": 1.1 / step}
            writer.write(look(step, names, "probe", percentiles(len(names)), model, drift=0.3))
    writer.event(steps, "stored means are 6.1 standard errors from the batches'", layer=names[0], code="BN116")
    if end:
        writer.end(steps, end)
    return writer


@pytest.fixture
def folder(tmp_path):
    small_log(tmp_path / "run").close()
    return tmp_path / "run"


@pytest.fixture
def client(folder):
    app = server.application(Feed(folder), port=PORT, token=TOKEN)
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}")


def get(client, path, token=TOKEN, **settings):
    return client.get(path, params={"token": token, **settings.pop("params", {})}, **settings)


def data(message):
    return json.loads(message.text)


def inside(html, name):
    """The JSON of a script element."""
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.DOTALL)[1])


# -- who is let in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/events", "/layer", "/page.html", "/nothing"])
@pytest.mark.parametrize("token", ["", "other", TOKEN[:-1], TOKEN + "x", "é", "\udcff"])
def test_no_route_answers_without_the_token(client, path, token):
    answer = client.get(path, params={"token": token.encode(errors="surrogateescape")})
    assert answer.status_code == 403
    assert "batchnorm watch printed" in answer.text
    assert client.get(path).status_code == 403


@pytest.mark.parametrize(
    "host",
    ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", f"[::1]:{PORT}", f"127.0.0.1.a:{PORT}"],
)
def test_another_host_name_is_refused_even_with_the_token(client, host):
    answer = get(client, "/", headers={"host": host})
    assert answer.status_code == 400
    assert "Open that address" in answer.text


@pytest.mark.parametrize("hosts", [[], ["evil.example"], [OWN, OWN], [OWN, "evil.example"], ["evil.example", OWN]])
def test_a_request_that_does_not_name_its_host_once_is_refused(folder, hosts):
    headers = [(b"host", host.encode()) for host in hosts]
    query = f"token={TOKEN}".encode()
    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": query, "headers": headers}
    sent = []

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    asyncio.run(server.application(Feed(folder), port=PORT, token=TOKEN)(scope, receive, send))
    assert sent[0]["status"] == 400


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"LOCALHOST:{PORT}"])
def test_the_two_names_of_this_machine_are_answered(client, host):
    assert get(client, "/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/layer?index=0", "/page.html", "/nothing", "/refused"])
def test_every_answer_has_the_headers_that_keep_it_here(client, path):
    answer = client.get(path) if path == "/refused" else client.get(path, params={"token": TOKEN, "index": 0})
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("method", ["post", "put", "delete", "options"])
def test_nothing_can_be_sent(client, method):
    assert getattr(client, method)("/", params={"token": TOKEN}).status_code == 405


def test_the_policy_allows_the_page_s_own_script_and_style_by_their_hashes_and_nothing_else(client):
    answer = get(client, "/")
    policy = answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert not re.search(r'\s(?:style|on\w+)="', answer.text)  # neither would be allowed


def test_the_page_does_not_hold_its_own_secret(client):
    assert TOKEN not in get(client, "/").text
    assert TOKEN not in get(client, "/page.html").text


# -- what is told -------------------------------------------------------------------------------------------------


def test_a_page_is_told_everything_and_then_only_what_is_new(folder):
    feed = Feed(folder)
    first = feed.news(PagePosition())
    assert first.kind == "log"
    assert [row["step"] for row in data(first)["tiers"]["free"]] == list(range(1, 21))
    assert data(first)["layers"] == ["stem.bn", "block.bn", "head.bn"]
    assert feed.news(first.seen).kind == "beat"
    writer = Writer(folder, layers(("stem.bn", "block.bn", "head.bn")))
    begun = feed.news(first.seen)
    assert begun.kind == "log"  # a new start may name other layers
    writer.write(look(21, writer.layers, shift=0.5))
    writer.close()
    more = feed.news(begun.seen)
    assert more.kind == "more"
    assert data(more)["tiers"]["free"] == [{"step": 21, "values": {"shift": [0.5] * 3}, "model": {}}]


def test_a_restarted_server_tells_what_the_page_has_missed(folder):
    writer = Writer(folder, layers(("stem.bn", "block.bn", "head.bn")))
    seen = str(Feed(folder).news(PagePosition()).seen)
    writer.write(look(21, writer.layers, shift=0.5))
    writer.close()
    again = Feed(folder).news(PagePosition.parse(seen))
    assert again.kind == "more"
    assert [row["step"] for row in data(again)["tiers"]["free"]] == [21]


@pytest.mark.parametrize("text", ["", "x", "0" * 16, "0" * 16 + "-1" * 7, "0" * 16 + "-1" * 8, "-" * 99, "\n"])
def test_an_id_that_nobody_gave_begins_anew(folder, text):
    assert Feed(folder).news(PagePosition.parse(text)).kind == "log"


def test_pages_that_open_close_together_are_told_the_same_and_then_the_rest(tmp_path):
    writer = small_log(tmp_path, end=None)
    feed = Feed(tmp_path)
    first = feed.news(PagePosition())
    writer.write(look(21, writer.layers, shift=0.5))
    second = feed.news(PagePosition())
    assert second is first
    assert [row["step"] for row in data(feed.news(second.seen))["tiers"]["free"]] == [21]
    writer.close()


def test_missing_values_stay_missing(folder):
    rows = {row["step"]: row["values"]["shift"] for row in data(Feed(folder).news(PagePosition()))["tiers"]["free"]}
    assert rows[9] == [None, None, None]
    assert rows[11] == pytest.approx([1.1] * 3)


def test_a_long_log_is_thinned_and_keeps_its_last_look(tmp_path):
    writer = Writer(tmp_path, layers(["bn"]))
    for step in range(1, 3 * MOST):
        writer.write(look(step, ["bn"], shift=1.0))
    writer.close()
    rows = new_data(Log(tmp_path), {})["tiers"]["free"]
    assert MOST / 2 < len(rows) <= MOST
    assert rows[-1]["step"] == 3 * MOST - 1


def test_a_layer_s_percentiles_come_in_full_or_from_a_place_on(client):
    found = get(client, "/layer", params={"index": 1}).json()
    assert found["steps"] == [5, 10, 15, 20]
    assert found["count"] == 4
    assert found["names"]["quantiles_input"][0] == [-2, -1, 0, 1, 2]
    assert found["names"]["batch_var"] == [None] * 4  # was not written
    assert get(client, "/layer", params={"index": 1, "first": 3}).json()["steps"] == [20]


@pytest.mark.parametrize("index", ["3", "-1", "x", "", "1e3", "9" * 5000])
def test_a_layer_that_is_none_is_refused(client, index):
    assert get(client, "/layer", params={"index": index}).status_code == 404


def test_status_tells_speed_cost_and_how_it_ended(tmp_path):
    writer = Writer(tmp_path, layers(["bn"]))
    now = time.time()
    for i in range(5):
        writer.progress(50 * i, now + i, {"loss": 1.0}, 0.0123)
    writing = status(Log(tmp_path))
    assert (writing["step"], writing["rate"], writing["cost"]) == (200, 50.0, 0.0123)
    assert writing["state"] == "writing"
    writer.end(200, "raised KeyboardInterrupt")
    ended = status(Log(tmp_path))
    assert (ended["state"], ended["reason"]) == ("finished", "raised KeyboardInterrupt")


def test_the_speed_leaves_out_the_time_before_a_log_was_continued(tmp_path):
    writer = Writer(tmp_path, layers(["bn"]))
    writer.progress(10, time.time() - 3600, {}, 0.0)
    writer.progress(20, time.time() + 1, {}, 0.0)
    writer.close()
    assert status(Log(tmp_path))["rate"] is None


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not tell its locks")
def test_a_silent_training_is_told_from_a_killed_one_by_the_lock_of_its_log(tmp_path, monkeypatch):
    writer = Writer(tmp_path, layers(["bn"]))
    writer.write(look(1, ["bn"], shift=1.0))
    an_hour_later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: an_hour_later)
    if not any(
        f":{(tmp_path / 'record.jsonl').stat().st_ino} " in line
        for line in Path("/proc/locks").read_text().splitlines()
    ):
        pytest.skip("the locks of this process are hidden here")
    assert status(Log(tmp_path))["state"] == "writing"
    writer.close()  # as a kill does it: no end is written
    assert status(Log(tmp_path))["state"] == "silent"


# -- folders that change under the page ---------------------------------------------------------------------------


def test_a_log_that_vanishes_is_told_and_comes_back(folder, tmp_path):
    feed = Feed(folder)
    seen = feed.news(PagePosition()).seen
    folder.rename(tmp_path / "away")
    gone = feed.news(seen)
    assert gone.kind == "beat"
    assert "The log is gone" in data(gone)["problem"]
    (tmp_path / "away").rename(folder)
    assert feed.news(seen).kind == "beat"
    assert "problem" not in data(feed.news(seen))


@pytest.mark.parametrize("steps", [5, 60])
def test_a_log_that_was_replaced_is_told_anew(folder, tmp_path, steps):
    feed = Feed(folder)
    seen = feed.news(PagePosition()).seen
    folder.rename(tmp_path / "away")
    small_log(folder, names=("other.bn",), steps=steps)
    new = feed.news(seen)
    assert new.kind == "log"
    assert data(new)["layers"] == ["other.bn"]
    assert data(new)["status"]["step"] == steps


def test_a_line_that_is_torn_waits_for_its_end(tmp_path):
    small_log(tmp_path, end=None).close()
    feed = Feed(tmp_path)
    seen = feed.news(PagePosition()).seen
    with (tmp_path / "record.jsonl").open("a") as file:
        file.write('{"kind":"free","step":21,"seconds":1,"val')
        file.flush()
        assert feed.news(seen).kind == "beat"
        file.write('ues":{"shift":[1,2,3]},"model":{}}\n')
    assert data(feed.news(seen))["tiers"]["free"][0]["values"] == {"shift": [1, 2, 3]}


def test_damaged_lines_are_counted(folder):
    with (folder / "record.jsonl").open("ab") as file:
        file.write(b'garbage\n{"kind":"free","step":\xff}\n')
    assert data(Feed(folder).news(PagePosition()))["status"]["damaged"] == 2


def test_a_newer_schema_is_told_and_the_server_goes_on(tmp_path):
    (tmp_path / "record.jsonl").write_text('{"kind":"start","schema_version":99,"layers":[]}\n')
    message = Feed(tmp_path).news(PagePosition())
    assert "schema version 99" in data(message)["problem"]
    with pytest.raises(ValueError, match="schema version 99"):
        page.saved(Feed(tmp_path))


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a log, got .*Give the folder that"):
        Feed(tmp_path)


# -- logs that were made to do harm -------------------------------------------------------------------------------

START = '{"kind":"start","schema_version":1,"layers":[{"name":"a"},{"name":"b"}]}\n'


@pytest.mark.parametrize(
    "line",
    [
        '{"kind":"free","step":1}',
        '{"kind":"free","step":1,"values":[]}',
        '{"kind":"free","step":1,"values":{"shift":{"a":1}}}',
        '{"kind":"free","step":1,"values":{"shift":[1]}}',
        '{"kind":"free","step":1,"values":{"shift":["<b>",true]}}',
        '{"kind":"free","step":1,"values":{"shift":[NaN,Infinity]}}',
        '{"kind":"free","step":1,"values":{"shift":[1e999,-1e999]}}',
        '{"kind":"free","step":1,"step":"x","values":{}}',
        '{"kind":"free","step":1,"step":-5,"values":{}}',
        f'{{"kind":"free","step":{9**40},"values":{{}}}}',
        f'{{"kind":"free","step":1,"values":{{"shift":[{9**400},1]}}}}',
        '{"kind":"progress","step":1,"seconds":"x","cost":[],"values":{"loss":"x"}}',
        '{"kind":"event","step":1,"message":{"a":1},"layer":5,"code":[]}',
        '{"kind":"end","step":1,"reason":5}',
        '{"kind":"arrays","step":1,"file":5}',
    ],
)
def test_a_line_of_anything_is_told_as_numbers_texts_or_not_at_all(tmp_path, line):
    (tmp_path / "record.jsonl").write_text(START + line + "\n")
    message = Feed(tmp_path).news(PagePosition())
    assert message.kind == "log"
    assert not re.search(r"NaN|Infinity|<b>", message.text)
    for row in data(message)["tiers"]["free"]:
        assert all(v is None or isinstance(v, int | float) for of in row["values"].values() for v in of)
    assert page.saved(Feed(tmp_path))


@pytest.mark.parametrize(
    "start",
    [
        '"layers":5',
        '"layers":[1]',
        '"layers":[{}]',
        '"layers":[{"name":5}]',
        '"layers":{"name":"a"}',
        '"layers":null',
        '"time":"x","layers":[]',
    ],
)
def test_a_start_of_anything_does_not_stop_the_server(tmp_path, start):
    (tmp_path / "record.jsonl").write_text(f'{{"kind":"start","schema_version":1,{start}}}\n')
    message = Feed(tmp_path).news(PagePosition())
    assert message.kind in {"log", "beat"}


def test_lines_nested_without_end_do_not_stop_the_server(tmp_path):
    deep = '{"kind":"free","step":1,"values":' + "[" * 200_000 + "]" * 200_000 + "}"
    (tmp_path / "record.jsonl").write_text(START + deep + "\n")
    assert "problem" in data(Feed(tmp_path).news(PagePosition()))


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "arrays/../../secret.safetensors", "record.jsonl", ""]
)
def test_arrays_are_read_from_the_log_s_folder_alone(folder, file):
    with (folder / "record.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "arrays", "step": 30, "file": file}, separators=(",", ":")) + "\n")
    found = Feed(folder).layer(0)
    assert found["steps"][-1] == 30
    assert {rows[-1] for rows in map(tuple, found["names"].values())} == {None}


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    target = folder / "arrays" / "000000020.safetensors"
    target.rename(tmp_path / "secret.safetensors")
    target.symlink_to(tmp_path / "secret.safetensors")
    assert Feed(folder).layer(0)["names"]["quantiles_input"][-1] is None


def test_a_pipe_in_place_of_arrays_is_not_waited_for(folder):
    target = folder / "arrays" / "000000020.safetensors"
    target.unlink()
    os.mkfifo(target)
    assert Feed(folder).layer(0)["names"]["quantiles_input"][-1] is None


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_arrays_that_are_none_are_a_gap(folder, content):
    (folder / "arrays" / "000000020.safetensors").write_bytes(content)
    assert Feed(folder).layer(0)["names"]["quantiles_input"][-1] is None


def test_texts_of_a_log_stay_inside_of_the_saved_page_s_data(tmp_path):
    evil = "</script><script>alert(1)</script>"
    writer = small_log(tmp_path / "run", names=(EVIL, evil, "\ud800"))
    assert writer.layers
    html = page.saved(Feed(tmp_path / "run"))
    assert evil not in html
    assert EVIL not in html
    assert inside(html, "data")["layers"] == [EVIL, evil, "\ud800"]


def test_a_folder_s_name_is_escaped(tmp_path):
    small_log(tmp_path / "<b>run")
    assert "&lt;b&gt;run" in page.render(Feed(tmp_path / "<b>run").name)


# -- the saved page -----------------------------------------------------------------------------------------------


def test_the_saved_page_has_its_data_and_asks_no_server(folder, tmp_path):
    write(Feed(folder), tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "connect-src" not in html
    assert str(tmp_path) not in html
    saved = inside(html, "data")
    assert [row["step"] for row in saved["tiers"]["free"]] == list(range(1, 21))
    assert [found["steps"] for found in saved["percentiles"]] == [[5, 10, 15, 20]] * 3


def test_the_saved_page_is_what_the_server_hands_out(client):
    answer = get(client, "/page.html")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert inside(answer.text, "data")["name"] == "run"


def test_a_page_cannot_be_saved_while_the_log_is_gone(client, folder, tmp_path):
    folder.rename(tmp_path / "away")
    answer = get(client, "/page.html")
    assert answer.status_code == 503
    assert "cannot be read now" in answer.text


def test_without_safetensors_the_page_says_what_to_install(client, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    assert "pip install safetensors" in get(client, "/layer", params={"index": 0}).json()["problem"]
    assert get(client, "/page.html").status_code == 200


def test_the_page_knows_the_words_of_every_quantity_and_rule(client):
    words = inside(get(client, "/").text, "words")
    assert words["quantities"].keys() == QUANTITIES.keys()
    assert words["rules"]["BN116"] == "stale-statistics"


def test_colours_are_those_of_the_report():
    templates = Path(page.__file__).parents[1] / "templates"
    ours, theirs = ((templates / name).read_text() for name in ("live.css", "page.css"))
    for name in (
        "ground",
        "ink",
        "muted",
        "rule",
        "grid",
        "axis",
        "without",
        "with",
        "neutral",
        "supported",
        "opposite",
    ):
        pattern = rf"--{name}: (#\w+);"
        assert re.findall(pattern, ours) == re.findall(pattern, theirs)[:2]


def test_an_event_of_the_stream_has_its_id_and_one_line_of_data(folder):
    message = Feed(folder).news(PagePosition())
    lines = server.as_event(message).split("\n")
    assert lines[0] == "event: log"
    assert lines[1] == f"id: {message.seen}"
    assert lines[2].startswith("data: {")
    assert lines[3:] == ["", ""]


def test_a_port_that_is_taken_is_told_and_the_next_free_one_is_found():
    first, second = server.listen(), server.listen()
    with first, second:
        port = first.getsockname()[1]
        assert second.getsockname()[1] > port
        with pytest.raises(OSError, match=rf"expected port {port} .* Choose another with --port N"):
            server.listen(port)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({}, ""),
        ({"rank": 0, "ranks": [0, 1, 2, 3], "synchronized": 0}, "rank 0 of 4"),
        ({"rank": 2, "ranks": [2, 3], "synchronized": 1}, "rank 2 of ranks 2, 3; all ranks in 1 synchronized layers"),
        ({"rank": 0, "ranks": [0, 1], "synchronized": 3}, "all 2 ranks"),
        ({"rank": "<b>", "ranks": 7}, ""),
    ],
)
def test_the_status_says_whose_batches_were_measured(tmp_path, about, words):
    Writer(tmp_path, layers(("a", "b", "c")), **about).close()
    assert status(Log(tmp_path))["measured_on"] == words
