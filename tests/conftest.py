"""What every test starts from: its own fixed seed, a compiler without a past, and Hypothesis without a clock."""

from __future__ import annotations

import builtins
import collections
import copyreg
import os
import shutil
import sys
import zlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# wall-clock limits fail on a busy machine and say nothing about the code
settings.register_profile("suite", deadline=None, print_blob=True)
settings.load_profile("suite")


# what test files need besides the extra `dev`; `make check` leaves them out where it is not installed
NEEDS = {
    "test_integrations_accelerate.py": "accelerate",
    "test_integrations_ignite.py": "ignite",
    "test_integrations_lightning.py": "lightning",
    "test_integrations_loggers.py": "mlflow",
    "test_integrations_skorch.py": "skorch",
    "test_integrations_transformers.py": "transformers",
    "test_live_page.py": "axe_playwright_python",
    "test_page.py": "playwright",
    "test_peers.py": "fvcore",
    "test_stats_clusters.py": "ray",
}
collect_ignore = [name for name, package in NEEDS.items() if find_spec(package) is None]


_PRINT = print


@pytest.fixture(autouse=True)
def _pickling_as_before() -> Iterator[None]:
    """Dask changes how the whole process pickles exceptions, and Ray its print. After a test both are as before."""
    yield
    builtins.print = _PRINT
    if "tblib" in sys.modules:
        ours = {kind: how for kind, how in copyreg.dispatch_table.items() if not _is_of_tblib(how)}
        copyreg.dispatch_table.clear()
        copyreg.dispatch_table.update(ours)


def _is_of_tblib(how: object) -> bool:
    return getattr(how, "__module__", "").startswith("tblib")


BROWSER_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--few=2``: of each test function the first and the last set of parameters."""
    parser.addoption("--few", type=int, default=0, help="sets of parameters of each test function that run; 0: all")


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    """Leave out the sets of parameters between the first and the last that ``--few`` asks for, before they are made."""
    yield
    few, sets = metafunc.config.getoption("few"), metafunc._calls
    if few and len(sets) > few:
        metafunc._calls = [*sets[: few - 1], sets[-1]]


def pytest_report_header() -> str:
    """Which files are left out; `make test` leaves none out."""
    if collect_ignore and os.environ.get("ALL_TESTS"):
        raise pytest.UsageError(f"all tests need dev-integrations, got none of it for {', '.join(collect_ignore)}.")
    return f"left out without dev-integrations: {', '.join(collect_ignore)}" if collect_ignore else "all test files"


@pytest.fixture(autouse=True)
def _seed_of_its_own(request: pytest.FixtureRequest) -> None:
    """Random tensors depend on the test's name alone: not on the order of tests, nor on which others run."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _compiler_without_a_past() -> None:
    """A test that compiles may not fail because others have compiled the same code eight times."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many of PyTorch's own samples passed, train and eval mode apart, as tests recorded them."""
    checks = collections.Counter(
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "PyTorch sample" and report.when == "call"
    )
    groups = collections.defaultdict(list)
    for sample, times in checks.items():
        groups[" ".join(sample.split()[:2])].append(times)
    if groups:
        terminalreporter.section("PyTorch's own samples")
    for group, times in sorted(groups.items()):
        terminalreporter.line(f"{group:20} {len(times):3} samples passed {sum(times):4} checks")


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A user's folder, and the current one, with what the test's module has in ``FOLDER``."""
    for name, text in request.module.FOLDER.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    yield tmp_path
    for name in request.module.FOLDER:
        sys.modules.pop(name.removesuffix(".py"), None)  # another test's folder may have one of the same name


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # which only tests of pages need

    executable = shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "the page tests need Chromium: install the package 'chromium'"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["waiting", "restarted"])
def forwards(request):
    """Tests that use it run with forwards that wait for each other, and with forwards that are restarted."""
    from batchnorm.population import layer_by_layer  # loads torch, which some tests do without

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "restarted":
            patch.setattr(layer_by_layer, "why_not", lambda _: "the test says so")
        yield request.param
