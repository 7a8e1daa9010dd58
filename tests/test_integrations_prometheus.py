"""What Prometheus reads of a live monitor: names that stay, through its own parser, beside a running model."""

from __future__ import annotations

import gc
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import batchnorm as bn
from batchnorm.integrations.prometheus import register

# a shift makes neighbouring observations alike, of which a monitor warns
PINNED = {
    "batchnorm_shift_log_evidence": ("gauge", ()),
    "batchnorm_shift_limit": ("gauge", ()),
    "batchnorm_shift_alarm": ("gauge", ()),
    "batchnorm_shift_alarm_timestamp_seconds": ("gauge", ()),
    "batchnorm_shift_observations_total": ("counter", ()),
    "batchnorm_shift_examples_total": ("counter", ()),
    "batchnorm_shift_examples_looked_total": ("counter", ()),
    "batchnorm_shift_cost_ratio": ("gauge", ()),
    "batchnorm_shift_autocorrelation": ("gauge", ()),
    "batchnorm_shift_layer_log_evidence": ("gauge", ("layer",)),
    "batchnorm_shift_layer_distance": ("gauge", ("layer",)),
}


def made(channels: int = 8, layers: int = 3) -> nn.Module:
    norms = [nn.BatchNorm1d(channels) for _ in range(layers)]
    return nn.Sequential(*norms).eval()


def watching(model: nn.Module, **more: object) -> bn.ShiftMonitor:
    return bn.ShiftMonitor(model, **{"examples": None, "budget": None, **more})


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """By name and layer, through the text that Prometheus reads and its own parser."""
    text = generate_latest(registry).decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, sample.labels.get("layer", "")): sample.value for sample in found}


def test_names_types_and_labels_are_pinned() -> None:
    registry = CollectorRegistry()
    register(watching(made()), registry, {"model": "a"})
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    found = {
        sample.name: (family.type, tuple(sorted(set(sample.labels) - {"model"})))
        for family in families
        for sample in family.samples
    }
    assert found == PINNED
    assert all(family.documentation.endswith(".") for family in families)
    assert all(sample.labels["model"] == "a" for family in families for sample in family.samples)


def test_the_documentation_lists_the_names() -> None:
    text = Path(__file__).parents[1].joinpath("docs/shift.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(batchnorm_shift_\w+)(?:\{(\w+)\})?` \| (\w+) \|", text, re.MULTILINE)
    assert {name: (kind, (label,) if label else ()) for name, label, kind in rows} == PINNED


def test_values_are_those_of_the_monitor_before_and_after_the_alarm() -> None:
    registry, model = CollectorRegistry(), made()
    monitor = watching(model)
    register(monitor, registry)
    with monitor, torch.no_grad():
        model(torch.randn(24, 8))
        before = samples(registry)
        assert before["batchnorm_shift_alarm", ""] == before["batchnorm_shift_alarm_timestamp_seconds", ""] == 0
        assert before["batchnorm_shift_limit", ""] == pytest.approx(math.log(100))
        for _ in range(10):
            model(torch.randn(16, 8) + 3)
        after = samples(registry)
    assert monitor.alarm is not None
    assert after["batchnorm_shift_alarm", ""] == 1
    assert after["batchnorm_shift_alarm_timestamp_seconds", ""] == monitor.alarm.seconds
    assert after["batchnorm_shift_log_evidence", ""] == monitor.log_evidence
    assert after["batchnorm_shift_observations_total", ""] == after["batchnorm_shift_examples_total", ""] == 184
    assert after["batchnorm_shift_cost_ratio", ""] > 0
    for layer in monitor.table():
        assert after["batchnorm_shift_layer_log_evidence", layer.name] == layer.log_evidence
        assert after["batchnorm_shift_layer_distance", layer.name] == layer.w2
    monitor.reset()
    assert samples(registry)["batchnorm_shift_alarm", ""] == 0


def test_a_scrape_changes_nothing() -> None:
    registry, model = CollectorRegistry(), made()
    monitor = watching(model, examples=4)
    register(monitor, registry)
    with monitor, torch.no_grad():
        model(torch.randn(5, 8))  # waits for the next round
        before = monitor.stream.state()
        assert samples(registry)["batchnorm_shift_observations_total", ""] == 0
        assert samples(registry)["batchnorm_shift_examples_total", ""] == 5
        assert samples(registry)["batchnorm_shift_examples_looked_total", ""] == monitor.stream.looked == 4
        after = monitor.stream.state()
    assert before.about == after.about
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_several_monitors_share_a_registry_and_leave_it() -> None:
    registry = CollectorRegistry()
    Gauge("other", "Something else.", registry=registry).set(1)
    leave = register(watching(made()), registry, {"model": "a", "stage": "1"})
    register(watching(made()), registry, {"stage": "2", "model": "b"})
    text = generate_latest(registry).decode()
    assert text.count("# TYPE batchnorm_shift_alarm gauge") == 1
    assert 'batchnorm_shift_alarm{model="a",stage="1"} 0.0' in text
    assert 'batchnorm_shift_alarm{model="b",stage="2"} 0.0' in text
    leave()
    leave()
    text = generate_latest(registry).decode()
    assert 'model="a"' not in text
    assert 'model="b"' in text
    assert "other 1.0" in text


def test_labels_that_cannot_be_told_apart_are_refused() -> None:
    registry, monitor = CollectorRegistry(), watching(made())
    register(monitor, registry, {"model": "a"})
    with pytest.raises(ValueError, match=r"a monitor with labels \{'model': 'a'\} is registered already"):
        register(watching(made()), registry, {"model": "a"})
    with pytest.raises(ValueError, match=r"labels must have the names \['model'\] .* got \['stage'\]"):
        register(watching(made()), registry, {"stage": "1"})
    with pytest.raises(ValueError, match=r"labels must have other names than 'layer'"):
        register(watching(made()), CollectorRegistry(), {"layer": "1"})
    with pytest.raises(ValueError, match=r"Duplicated timeseries"):
        Gauge("batchnorm_shift_alarm", "Somebody else's.", registry=registry)


def test_names_of_layers_are_escaped() -> None:
    model = made(layers=1)
    model[0].add_module("x", nn.BatchNorm1d(3))
    odd = nn.Sequential()
    odd._modules['a"b\\c\nd'] = model[0]
    registry = CollectorRegistry()
    register(watching(odd.eval()), registry)
    assert any(layer.startswith('a"b\\c\nd') for name, layer in samples(registry) if name.endswith("distance"))


def test_the_registry_of_the_process_is_the_default() -> None:
    leave = register(watching(made()), labels={"model": "default"})
    try:
        assert b'batchnorm_shift_alarm{model="default"} 0.0' in generate_latest(REGISTRY)
    finally:
        leave()
    assert b'model="default"' not in generate_latest(REGISTRY)


@pytest.mark.slow
def test_a_registry_that_is_gone_is_forgotten() -> None:
    from batchnorm.integrations.prometheus import _collectors

    before = len(_collectors)
    register(watching(made()), CollectorRegistry())
    gc.collect()
    assert len(_collectors) == before


@pytest.mark.slow
def test_scrapes_beside_a_running_model_are_whole_and_find_every_shift() -> None:
    registry, model, stop = CollectorRegistry(), made(), threading.Event()
    monitor = watching(model)
    register(monitor, registry)
    found, problems = [], []

    def scrape() -> None:
        while not stop.is_set():
            try:
                found.append(samples(registry))
            except Exception as error:  # noqa: BLE001 - told below
                problems.append(error)

    threads = [threading.Thread(target=scrape) for _ in range(3)]
    with monitor, torch.no_grad():
        for thread in threads:
            thread.start()
        try:
            for step in range(150):
                model(torch.randn(8, 8) + (3 if step > 100 else 0))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert problems == []
    assert len(found) > 3
    assert all({name for name, _ in each} == set(PINNED) for each in found)
    assert all(math.isfinite(value) for each in found for value in each.values())
    assert samples(registry)["batchnorm_shift_alarm", ""] == 1
    assert monitor.stream.evidence.observations == 1200


def test_a_scrape_of_a_model_as_large_as_resnet_50_is_timed(capsys: pytest.CaptureFixture) -> None:
    model = nn.ModuleList(nn.BatchNorm1d(512) for _ in range(53)).eval()  # 27,136 channels
    monitor, registry, times = watching(model), CollectorRegistry(), []
    register(monitor, registry)
    for is_new in (True, True, False, False):
        if is_new:
            monitor.stream.observe(torch.randn(8, 53 * 512).double(), torch.ones(8, 53 * 512).double())
        start = time.perf_counter()
        assert generate_latest(registry).count(b"layer=") == 2 * 53
        times.append(1000 * (time.perf_counter() - start))
    with capsys.disabled():  # a figure to look at, and no criterion: the machine has other work
        sys.stdout.write(f"\nscrape of 53 layers: {min(times[:2]):.0f} ms, {min(times[2:]):.0f} ms without news\n")


def test_it_is_named_what_to_install() -> None:
    code = "import sys\nsys.modules['prometheus_client'] = None\nimport batchnorm.integrations.prometheus"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'batchnorm[prometheus]'" in done.stderr
