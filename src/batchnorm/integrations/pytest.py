"""pytest: fixtures that check the batch norm of a model before it is deployed.

Nothing heavy is imported until a fixture is used, because pytest loads this file in every project with batchnorm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from batchnorm.call_types import Batch
    from batchnorm.rules.finding import Finding, Severity


class AssertBatchNormHealthy(Protocol):
    """The type of the fixture ``assert_batchnorm_healthy``."""

    def __call__(
        self,
        model: nn.Module,
        data: Iterable[Batch] | None = None,
        *,
        ignore: str | Iterable[str] = (),
        fail_on: str = "error",
        **examined: object,
    ) -> None:
        """Fail if ``batchnorm.examine`` has a finding with severity ``fail_on`` or worse.

        The model does not change, bit for bit.

        Args:
            model: Any model.
            data: Batches, in the form for ``batchnorm.examine``; with data more rules are checked.
            ignore: Codes of rules, their names, or prefixes of codes: "BN2" ignores a family.
            fail_on: "error", "warning" or "info".
            examined: Further arguments of ``batchnorm.examine``, such as ``optimizer`` and ``batch_size``.

        Raises:
            ValueError: If a rule or the severity is unknown.
        """


class AssertBatchInvariant(Protocol):
    """The type of the fixture ``assert_batch_invariant``."""

    def __call__(
        self, model: nn.Module, examples: Batch, *, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Fail if the eval-mode output for one example depends on the other examples in its batch.

        The model does not change, bit for bit. The first eight examples run one by one.

        Args:
            model: Any model.
            examples: A batch of at least two examples, in the form for ``batchnorm.recalibrate``.
            rtol: Largest allowed relative difference; by default the largest that rounding explains
                (``batchnorm.integrations.invariance.rounding``).
            atol: Largest allowed absolute difference; by default ``rtol`` times the root mean square of the output.

        Raises:
            ValueError: If there are fewer than two examples, or no floating-point output has one row for each.
        """


@pytest.fixture
def assert_batchnorm_healthy() -> AssertBatchNormHealthy:
    """Fails the test if the doctor finds an error: ``assert_batchnorm_healthy(model, data)``."""

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
        findings = examine(model, data, selection=selection, **examined).at_least(severity)
        if findings:
            lines = "\n".join(map(_finding_lines, findings))
            pytest.fail(f"{type(model).__name__} has {counted(findings)} of batch norm:\n{lines}", pytrace=False)

    return check


@pytest.fixture
def assert_batch_invariant() -> AssertBatchInvariant:
    """Fails the test if one example's output depends on its batch: ``assert_batch_invariant(model, examples)``."""

    def check(model: nn.Module, examples: Batch, *, rtol: float | None = None, atol: float | None = None) -> None:
        from batchnorm.integrations.invariance import dependence

        if fault := dependence(model, examples, rtol=rtol, atol=atol):
            pytest.fail(fault, pytrace=False)

    return check


def _finding_lines(finding: Finding) -> str:
    return (
        f"  {finding.code} {finding.slug}  {finding.layer or 'model'}: {finding.measured} (limit: {finding.limit})\n"
        f"      {finding.consequence}\n"
        f"      {finding.remedy}"
    )


def _severity(name: str) -> Severity:
    from batchnorm.rules.finding import Severity

    names = [str(severity) for severity in Severity]
    if name not in names:
        raise ValueError(f"fail_on must be {', '.join(names)}, got {name!r}. Use ignore= to leave rules out.")
    return Severity[name.upper()]
