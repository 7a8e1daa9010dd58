"""pytest: fixtures that assert what batch norm should be in a model that is to be shipped.

Nothing heavy is imported until a fixture is used: pytest loads this file in every project that has batchnorm installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from batchnorm.call_types import Batch
    from batchnorm.rules.finding import Finding


class AssertBatchNormHealthy(Protocol):
    """The type of the fixture ``assert_batchnorm_healthy``."""

    def __call__(
        self,
        model: nn.Module,
        data: Iterable[Batch] | None = None,
        *,
        ignore: str | Iterable[str] = (),
        fail_on: str = "error",
        **examined: Any,
    ) -> None:
        """Fail if ``batchnorm.examine`` finds something of the severity ``fail_on`` or worse.

        The model stays as it is, bit for bit.

        Args:
            model: Any model.
            data: Batches, as ``batchnorm.examine`` takes them; more rules can be checked with them.
            ignore: Codes of rules, their names, or beginnings of codes: "BN2" leaves a family out.
            fail_on: "error", "warning" or "info".
            examined: More for ``batchnorm.examine``, such as ``optimizer`` and ``batch_size``.

        Raises:
            ValueError: If a rule or the severity is not known.
        """


class AssertBatchInvariant(Protocol):
    """The type of the fixture ``assert_batch_invariant``."""

    def __call__(
        self, model: nn.Module, examples: Batch, *, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Fail if the eval-mode answer to one example depends on which others are in its batch.

        The model stays as it is, bit for bit. The first eight examples are asked for one by one.

        Args:
            model: Any model.
            examples: A batch of two or more, as ``batchnorm.recalibrate`` takes one.
            rtol: Largest relative difference; by default what rounding can come to in a model of this size
                (``batchnorm.integrations.invariance.rounding``).
            atol: Largest absolute difference; by default ``rtol`` times the root mean square of the output.
        """


@pytest.fixture
def assert_batchnorm_healthy() -> AssertBatchNormHealthy:
    """Fails the test if a model's batch norm has an error: ``assert_batchnorm_healthy(model, data)``."""

    def check(
        model: nn.Module,
        data: Iterable[Batch] | None = None,
        *,
        ignore: str | Iterable[str] = (),
        fail_on: str = "error",
        **examined: Any,
    ) -> None:
        from batchnorm.doctor import examine
        from batchnorm.doctor.diagnosis_value import counted
        from batchnorm.doctor.examination import Selection

        severity = _severity(fail_on)
        selection = Selection(ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore))
        found = examine(model, data, selection=selection, **examined).at_least(severity)
        if found:
            told = "\n".join(map(_told, found))
            pytest.fail(f"{type(model).__name__} has {counted(found)} of batch norm:\n{told}", pytrace=False)

    return check


@pytest.fixture
def assert_batch_invariant() -> AssertBatchInvariant:
    """Fails the test if one example's answer depends on its batch: ``assert_batch_invariant(model, examples)``."""

    def check(model: nn.Module, examples: Batch, *, rtol: float | None = None, atol: float | None = None) -> None:
        from batchnorm.integrations.invariance import dependence

        if fault := dependence(model, examples, rtol=rtol, atol=atol):
            pytest.fail(fault, pytrace=False)

    return check


def _told(finding: Finding) -> str:
    return (
        f"  {finding.code} {finding.slug}  {finding.layer or 'model'}: {finding.measured} (limit: {finding.limit})\n"
        f"      {finding.consequence}\n"
        f"      {finding.remedy}"
    )


def _severity(name: str) -> Any:
    from batchnorm.rules.finding import Severity

    names = [str(severity) for severity in Severity]
    if name not in names:
        raise ValueError(f"fail_on must be {', '.join(names)}, got {name!r}. Use ignore= to leave rules out.")
    return Severity[name.upper()]
