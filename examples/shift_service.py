"""A service that answers with a model and watches what it is asked: POST /predict, GET /metrics, GET /healthz.

    pip install 'batchnorm[torch,live,prometheus]'
    uvicorn shift_service:app --port 8000 --app-dir examples

One thread runs the model. That keeps the event loop free, and a ShiftMonitor takes one forward pass at a time: passes
in several threads at once would mix their observations. More throughput comes from more processes; each saves its
state to a file of its own, and ``batchnorm shift --merge FOLDER`` judges them together.

/healthz stays 200 after an alarm and says so in a field. The process is as able to answer as before, a restart would
mend nothing, and since all replicas get the same inputs, 503 would take all of them out of service at once. Who should
know is told by the alert on batchnorm_shift_alarm, and by the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.integrations.prometheus import register
from batchnorm.shift import Alarm

LOGGER = logging.getLogger("uvicorn.error")
SHAPE = (3, 12, 12)
STATE = Path(os.environ.get("SHIFT_STATE", "service.bnshift.safetensors"))
WATCHED = os.environ.get("SHIFT_MONITOR", "1") == "1"


def images(count: int, seed: int) -> Tensor:
    """Smooth colours with some noise: what this service is made for."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.randn(count, 3, 3, 3, generator=random).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return colours + 0.3 * torch.randn(count, *SHAPE, generator=random)


def make_model() -> nn.Module:
    """The same small model each time; yours comes from a file."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    bn.recalibrate(model, [images(256, seed) for seed in range(4)])
    return model.eval()


def tell(alarm: Alarm) -> None:
    """Called once, in the thread of the model: keep the alarm, whatever happens to the process next."""
    LOGGER.error("%s", alarm)
    monitor.save(STATE)


torch.set_num_threads(1)
model = make_model()
# looking costs far less than HTTP does, but more than a hundredth of so small a model: no budget here
monitor = bn.ShiftMonitor(model, budget=None, on_alarm=tell)
metrics = CollectorRegistry()
register(monitor, metrics, {"model": "example"})
worker = ThreadPoolExecutor(1, "model")


@torch.inference_mode()
def answer(instances: list) -> list[int]:
    """The class of each image."""
    x = torch.tensor(instances, dtype=torch.float32)
    if x.ndim != 4 or x.shape[1:] != SHAPE or not len(x):
        raise ValueError(f"instances must be images of shape {SHAPE}, got {tuple(x.shape)}.")
    return model(x).argmax(1).tolist()


async def predict(request: Request) -> JSONResponse:
    """POST {"instances": [image, ...]}."""
    try:
        instances = (await request.json())["instances"]
        classes = await asyncio.get_running_loop().run_in_executor(worker, answer, instances)
    except (ValueError, TypeError, KeyError) as error:
        return JSONResponse({"error": str(error)}, 400)
    return JSONResponse({"classes": classes})


async def scrape(_: Request) -> Response:
    """What Prometheus reads. It changes nothing, so it need not wait for the model's thread."""
    return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)


async def health(_: Request) -> JSONResponse:
    """Able to answer; and whether the inputs moved, which is no reason to be restarted."""
    alarm = monitor.alarm
    shift = None if alarm is None else {"examples": alarm.examples, "first": alarm.first, "seconds": alarm.seconds}
    return JSONResponse({"status": "ok", "shift": shift})


def resume() -> None:
    """Go on from the last process, if it left something that fits this model."""
    try:
        monitor.load(STATE)
        LOGGER.info("went on from %s", STATE)
    except FileNotFoundError:
        LOGGER.info("no %s: a new stream", STATE)
    except (ValueError, OSError) as error:
        LOGGER.warning("a new stream, since %s", error)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Load at the start; at the end let the model's thread finish, and save."""
    if WATCHED:
        resume()
        monitor.start()
    yield
    worker.shutdown(wait=True)
    if WATCHED:
        monitor.save(STATE)  # before stop(), which counts what is waiting: so the next process goes on bit for bit
        monitor.stop()


routes = [
    Route("/predict", predict, methods=["POST"]),
    Route("/metrics", scrape),
    Route("/healthz", health),
]
app = Starlette(routes=routes, lifespan=lifespan)
