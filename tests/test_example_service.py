"""The example service as its users run it: a process of its own, many requests at once, a shift, and a restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

EXAMPLES = Path(__file__).parents[1] / "examples"
REQUESTS, AT_ONCE = 100, 16


def images(count: int, seed: int, by: float = 0.0) -> list:
    """What the service is made for, darker by ``by``; numbers of few digits, as JSON of pictures has."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.randn(count, 3, 3, 3, generator=random).repeat_interleave(4, 2).repeat_interleave(4, 3)
    pixels = colours + 0.3 * torch.randn(count, 3, 12, 12, generator=random) - by
    return ((100 * pixels).round() / 100).tolist()


@contextlib.contextmanager
def service(folder: Path, **settings: str):
    """The service on loopback; ended as an orchestrator ends it, by SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "shift_service:app", "--app-dir", str(EXAMPLES), "--port", str(port)]
    # a shift makes neighbours alike, of which the monitor warns
    strict = "error,ignore:ShiftMonitor:RuntimeWarning"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": strict} | settings
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [*command, "--no-access-log"], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield _ready(process, f"http://127.0.0.1:{port}", folder)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=30)
    assert code in {0, -signal.SIGTERM}, (folder / "log.txt").read_text()


def _ready(process: subprocess.Popen, address: str, folder: Path) -> str:
    for _ in range(300):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/healthz", trust_env=False).status_code == 200:
                return address
        assert process.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.1)
    raise TimeoutError((folder / "log.txt").read_text())


def load(address: str, bodies: list[bytes]) -> tuple[list[int], float]:
    """Status codes and requests per second, so many at once."""

    async def all_of_them() -> list[int]:
        gate = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=address, timeout=30, trust_env=False) as client:

            async def one(body: bytes) -> int:
                async with gate:
                    answer = await client.post("/predict", content=body)
                    assert len(answer.json()["classes"]) == 1
                    return answer.status_code

            return await asyncio.gather(*map(one, bodies))

    start = time.perf_counter()
    codes = asyncio.run(all_of_them())
    return codes, len(bodies) / (time.perf_counter() - start)


def bodies(seed: int, by: float = 0.0) -> list[bytes]:
    requests = [httpx.Request("POST", "http://x/", json={"instances": [x]}) for x in images(REQUESTS, seed, by)]
    return [request.content for request in requests]


def metrics(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics", trust_env=False).text
    families = text_string_to_metric_families(text)
    return {
        sample.name: sample.value for family in families for sample in family.samples if "layer" not in sample.labels
    }


WRONG = (b'{"instances": [[1.0]]}', b'{"instances": "x"}', b'{"instances": []}', b"{}", b"[]", b"{")


@pytest.mark.slow
def test_the_service_rings_after_a_shift_and_goes_on_after_a_restart(tmp_path: Path, capsys) -> None:
    for name in ("watched", "alone"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "watched"
    (folder / "service.bnshift.safetensors").write_bytes(b"something else")  # no obstacle
    with service(folder) as address:
        with service(tmp_path / "alone", SHIFT_MONITOR="0") as other:
            speeds = compared(address, other)
        assert_clean(address)
        codes, _ = load(address, bodies(9, by=1.5))
        assert set(codes) == {200}
        rung = assert_rung(address)
    with service(folder) as address:
        assert {name: value for name, value in metrics(address).items() if "cost" not in name} == rung
    log = (folder / "log.txt").read_text()
    assert "a new stream, since" in log
    assert "went on from" in log
    assert "Traceback" not in log
    assert len(re.findall("the inputs' distribution moved", log)) == 1
    watched, alone = (statistics.median(values) for values in zip(*speeds, strict=True))
    with capsys.disabled():  # a figure to look at, and no criterion: the machine has other work
        sys.stdout.write(f"\n{watched:.0f} requests/s with the monitor, {alone:.0f} without: {watched / alone:.2f}\n")


def compared(address: str, other: str) -> list[tuple[float, float]]:
    """Requests per second of both services, in rounds that take turns."""
    for each in (address, other):
        load(each, bodies(0)[:20])
    speeds = []
    for seed in range(1, 4):
        codes, first = load(address, bodies(seed))
        codes_of_other, second = load(other, bodies(seed))
        assert {*codes, *codes_of_other} == {200}
        speeds.append((first, second))
    return speeds


def assert_clean(address: str) -> None:
    found = metrics(address)
    assert found["batchnorm_shift_alarm"] == 0
    assert found["batchnorm_shift_examples_total"] == 3 * REQUESTS + 20
    assert httpx.get(f"{address}/healthz", trust_env=False).json() == {"status": "ok", "shift": None}
    for body in WRONG:
        answer = httpx.post(f"{address}/predict", content=body, trust_env=False)
        assert answer.status_code == 400, body
        assert answer.json()["error"]


def assert_rung(address: str) -> dict[str, float]:
    found = metrics(address)
    assert found["batchnorm_shift_alarm"] == 1
    assert found["batchnorm_shift_log_evidence"] >= found["batchnorm_shift_limit"]
    assert abs(found["batchnorm_shift_alarm_timestamp_seconds"] - time.time()) < 300
    health = httpx.get(f"{address}/healthz", trust_env=False)
    assert health.status_code == 200
    assert health.json()["shift"]["examples"] > 3 * REQUESTS
    return {name: value for name, value in found.items() if "cost" not in name}
