"""The allocator keeps freed memory when asked to, says so when it cannot, and gives it back."""

import platform
import subprocess
import sys

import pytest

from batchnorm import allocator
from batchnorm.allocator import tune_allocator

FAULTS = """
import resource, torch, batchnorm as bn
def faults(size=10 << 20):
    for _ in range(30):  # until there is room between what else the process allocates
        torch.ones(size)  # 40 MB, filled and freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
tuning = bn.tune_allocator()
tuned = faults()
tuning.undo()
# larger than what was kept: glibc fills a hole that it has before it asks for new memory
print(first, tuned, faults(30 << 20), bool(tuning))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_large_tensors_are_made_of_kept_memory_while_tuned_and_of_new_memory_before_and_after():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, tuned, after, still = done.stdout.split()
    pages = 5 * (40 << 20) // 4096  # with huge pages a fault maps 512 of them
    assert int(tuned) < pages // 512 // 5
    assert min(int(before), int(after)) >= pages // 512
    assert still == "False"


@pytest.mark.parametrize(("name", "said"), [("", "needs glibc, got Plan9"), ("musl", "needs glibc, got musl")])
def test_elsewhere_nothing_is_done_and_the_reason_is_told(monkeypatch, name, said):
    monkeypatch.setattr(platform, "libc_ver", lambda: (name, ""))
    monkeypatch.setattr(platform, "system", lambda: "Plan9")
    with tune_allocator() as tuning:
        assert not tuning
        assert said in repr(tuning)


def test_settings_that_are_refused_are_told(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(allocator, "_set", lambda *_, **__: False)
    assert tune_allocator().reason == "glibc refused the settings: nothing was done"
