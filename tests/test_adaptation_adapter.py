"""Adapter: nothing before the alarm, better answers after it, no harm by sorted streams, and a way back."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.adaptation import Limits

CLASSES = 6
_PATTERNS = torch.randn(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(3, 2)
PATTERNS = _PATTERNS.repeat_interleave(3, 3)


def stream(n: int, seed: int, *, order: str = "iid") -> tuple[Tensor, Tensor]:
    """Patterns of a class each, at some contrast, in noise."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (n,), generator=random)
    if order == "sorted":
        classes = classes.sort().values
    elif order == "one class":
        classes = torch.full_like(classes, 2)
    contrast = 0.7 + 0.6 * torch.rand(n, 1, 1, 1, generator=random)
    return PATTERNS[classes] * contrast + 0.7 * torch.randn(n, 1, 12, 12, generator=random), classes


def dim(x: Tensor) -> Tensor:
    return 0.15 * x + 1.5


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, 2, bias=False), bn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(120):
        x, classes = stream(64, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), classes).backward()
        optimizer.step()
    bn.recalibrate(model, [stream(256, 1000 + i)[0] for i in range(4)])
    return model.eval()


@pytest.fixture
def model(trained) -> nn.Module:
    return copy.deepcopy(trained)


def adapter_of(model: nn.Module, **options) -> bn.Adapter:
    monitor = bn.ShiftMonitor(model, examples=None, budget=None)
    monitor.calibrate([stream(64, 2000 + i)[0] for i in range(5)])
    return bn.Adapter(monitor, **options)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@torch.no_grad()
def answers(model: nn.Module, x: Tensor, n: int = 8) -> Tensor:
    return torch.cat([model(part) for part in x.split(n)])


def error(logits: Tensor, classes: Tensor) -> float:
    return 100 * (logits.argmax(1) != classes).float().mean().item()


def states(adapter: bn.Adapter) -> list[str]:
    return [event.state for event in adapter.history]


@pytest.mark.slow
def test_until_the_alarm_answers_are_those_of_the_deployed_model(trained, model):
    x, _ = stream(800, 5)
    adapter = adapter_of(model)
    with adapter:
        answered = answers(model, x)
    assert torch.equal(answered, answers(trained, x))
    assert adapter.state == "watching"
    assert adapter.history == []


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 8, 32, 200])
def test_a_repairable_shift_is_repaired_and_put_back_after_the_block(trained, model, n):
    x, classes = stream(240 if n == 1 else 400, 6)
    adapter = adapter_of(model)
    with adapter:
        answered = answers(model, dim(x), n)
        assert bits(model) != bits(trained)
    half = slice(len(x) // 2, None)
    assert error(answers(trained, dim(x)), classes) > 50
    assert error(answered[half], classes[half]) < error(answers(trained, x)[half], classes[half]) + 5
    assert states(adapter) == ["gathering", "adapted"]
    assert bits(model) == bits(trained)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ShiftMonitor. neighbouring observations are alike")
@pytest.mark.parametrize(
    ("order", "n"), [("sorted", 1), ("sorted", 8), ("sorted", 100), ("one class", 8), ("one class", 100)]
)
def test_a_clean_stream_in_another_order_is_not_harmed(trained, model, order, n):
    x, _ = stream(150 if n == 1 else 300, 7, order=order)
    adapter = adapter_of(model)
    with adapter:
        answered = answers(model, x, n)
    assert torch.equal(answered, answers(trained, x, n))
    assert "adapted" not in states(adapter)
    assert states(adapter)[:1] == ["gathering"]
    assert adapter.state == "refused" or n == 1  # which are fewer examples than a trial takes


@pytest.mark.slow
def test_inverted_images_are_not_answered_worse(trained, model):
    """A change of sign is none that statistics can repair."""
    x, classes = stream(600, 8)
    adapter = adapter_of(model)
    with adapter:
        answered = answers(model, -x)
    assert error(answered, classes) <= error(answers(trained, -x), classes) + 0.3


def test_one_class_after_a_repair_goes_back_within_two_batches_bit_for_bit(trained, model):
    adapter = adapter_of(model)
    with adapter:
        answers(model, dim(stream(200, 9)[0]))
        assert adapter.state == "adapted"
        ones = dim(stream(400, 10, order="one class")[0])
        for part in ones.split(8):
            answers(model, part)
            if adapter.state == "rolled back":
                break
        assert adapter.state == "rolled back"
        assert bits(model) == bits(trained)
        assert torch.equal(answers(model, part), answers(trained, part))
    assert "of one class" in adapter.history[-1].reason or "information" in adapter.history[-1].reason


def test_another_shift_trips_the_energy_guard_in_the_first_batch(trained, model):
    adapter = adapter_of(model)
    with adapter:
        answers(model, dim(stream(200, 11)[0]))
        answers(model, 40 * stream(32, 12)[0], 32)
        assert adapter.state == "rolled back"
        assert bits(model) == bits(trained)
    assert "the energy of layer '1' under the new statistics is" in adapter.history[-1].reason


@pytest.mark.filterwarnings("ignore:ShiftMonitor. neighbouring observations are alike")
def test_after_a_rollback_other_evidence_begins_another_trial(model):
    adapter = adapter_of(model)
    with adapter:
        answers(model, dim(stream(200, 11)[0]))
        answers(model, 40 * stream(32, 12)[0], 32)
        answers(model, 40 * stream(128, 13)[0], 32)
        assert adapter.state == "rolled back"  # the same evidence: it stays
        answers(model, dim(stream(400, 14)[0]), 32)
    assert states(adapter)[2:] == ["rolled back", "gathering", "adapted"]


def test_a_trial_is_judged_in_large_batches_too(model):
    adapter = adapter_of(model)
    with adapter:
        answers(model, 40 * stream(600, 12)[0], 300)
        assert adapter.state == "refused"
        answers(model, dim(stream(1500, 14)[0]), 300)
    assert states(adapter)[-2:] == ["gathering", "adapted"]


@pytest.mark.slow
def test_another_mix_of_classes_is_not_adapted_to(trained, model):
    x, classes = stream(900, 15)
    x = x[classes < CLASSES // 2]
    adapter = adapter_of(model)
    with adapter:
        answered = answers(model, x)
    assert torch.equal(answered, answers(trained, x))
    assert states(adapter)[0] == "gathering"
    assert "another mix of known examples" in adapter.history[1].reason


@pytest.mark.slow
def test_reset_takes_the_deployed_statistics_back(trained, model):
    adapter = adapter_of(model)
    with adapter:
        answers(model, dim(stream(200, 9)[0]))
        adapter.reset()
        assert bits(model) == bits(trained)
        assert adapter.state == "watching"
        assert adapter.monitor.alarm is None
        answers(model, dim(stream(200, 10)[0]))
        assert adapter.state == "adapted"
    assert str(adapter.history[2]).startswith("watching after 0 examples: reset")


@pytest.mark.slow
def test_a_second_block_goes_on_where_the_first_one_ended(trained, model):
    x = dim(stream(400, 15)[0])
    once, twice = adapter_of(model), adapter_of(other := copy.deepcopy(model))
    with once:
        expected = answers(model, x)
    with twice:
        first = answers(other, x[:200])
    assert bits(other) == bits(trained)
    with twice:
        second = answers(other, x[200:])
    assert torch.equal(torch.cat([first, second]), expected)


def test_a_pass_that_raises_counts_for_nothing_and_the_block_puts_all_back(trained, model):
    adapter = adapter_of(model)
    with pytest.raises(KeyError), adapter:  # noqa: PT012 - what happens inside is tested
        answers(model, dim(stream(200, 9)[0]))
        before = bits(model)
        hook = model[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(dim(stream(8, 1)[0]))
        hook.remove()
        assert adapter.state == "adapted"
        assert bits(model) == before
        raise KeyError
    assert bits(model) == bits(trained)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(layer._forward_pre_hooks for layer in model)


def test_a_trial_that_raises_is_refused_and_serves_on(trained, model, caplog):
    adapter = adapter_of(model)
    calls = []

    def fails(*_) -> None:
        calls.append(1)
        if len(calls) == 2:  # the trial's pass on the batch that rang
            raise OSError("no")

    model[0].register_forward_pre_hook(fails)
    x = dim(stream(8, 3)[0])
    with adapter, caplog.at_level(logging.ERROR, "batchnorm"):
        answered = answers(model, x)
        assert bits(model) == bits(trained)
    assert torch.equal(answered, answers(trained, x))
    assert adapter.state == "refused"
    assert adapter.history[-1].reason == "the trial pass raised OSError('no')"


def test_random_states_weights_and_counts_of_batches_are_left_alone(trained, model):
    adapter = adapter_of(model)
    state = torch.get_rng_state()
    with adapter:
        answers(model, dim(stream(200, 9)[0]))
        assert adapter.state == "adapted"
        changed = {name for name, value in bits(model).items() if value != bits(trained)[name]}
    assert {name.split(".")[1] for name in changed} == {"running_mean", "running_var"}
    assert torch.equal(torch.get_rng_state(), state)


def test_train_mode_is_not_followed(model):
    adapter = adapter_of(model)
    with adapter:
        model.train()
        with pytest.warns(RuntimeWarning, match="the model is in train mode"):
            model(dim(stream(200, 9)[0]))
        model.eval()
        assert adapter.state == "watching"


def test_without_classes_energies_decide_and_history_says_so(model):
    adapter = adapter_of(model, classes=None)
    with adapter:
        answers(model, dim(stream(200, 9)[0]))
    assert states(adapter) == ["gathering", "gathering", "adapted"]
    assert adapter.history[1].reason == "there are no classes: only energies are judged"


def test_outputs_that_are_no_logits_are_without_classes_until_a_function_finds_them(trained):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(trained)

        def forward(self, x):
            return {"logits": self.inner(x)}

    shifted = dim(stream(200, 9)[0])
    for options, expected in [({}, 3), ({"classes": lambda out: out["logits"]}, 2)]:
        model = Wrapped().eval()
        adapter = adapter_of(model, **options)
        with adapter, torch.no_grad():
            for part in shifted.split(8):
                model(part)
        assert len(adapter.history) == expected
        assert adapter.state == "adapted"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["iid", "one class"])
def test_predicted_classes_alone_will_do(model, order):
    adapter = adapter_of(model, classes=lambda output: output.argmax(1))
    with adapter:
        answers(model, dim(stream(400, 9, order=order)[0]))
    assert adapter.state == ("adapted" if order == "iid" else "refused")


def test_classes_of_another_kind_are_an_error(model):
    with (
        pytest.raises(ValueError, match=r"classes must give logits \(N, K\) or predicted classes \(N,\), got \(8, 1\)"),
        adapter_of(model, classes=lambda output: output.argmax(1, keepdim=True)),
    ):
        answers(model, stream(8, 1)[0])
    with pytest.raises(ValueError, match="got str"), adapter_of(model, classes=lambda _: "none"):
        answers(model, stream(8, 1)[0])


def test_inputs_that_are_not_finite_do_not_enter_the_statistics(model):
    adapter = adapter_of(model)
    with adapter:
        answers(model, dim(stream(200, 9)[0]))
        before = bits(model)
        answers(model, torch.full((8, 1, 12, 12), torch.nan))
        assert bits(model) == before
        assert adapter.state == "adapted"
        answers(model, torch.full((48, 1, 12, 12), torch.nan), 48)
        assert adapter.state == "rolled back"
    assert "information" in adapter.history[-1].reason


def test_a_bank_keeps_what_an_adapter_found(model):
    bank, adapter = bn.DomainBank(model), adapter_of(model)
    with adapter:
        answers(model, dim(stream(200, 9)[0]))
        bank.add("dim")
    assert bank.current == "stored"
    x, classes = stream(200, 20)
    with bank.using("dim"):
        assert error(answers(model, dim(x)), classes) < 15


def test_one_block_at_a_time(model):
    adapter = adapter_of(model)
    with adapter, pytest.raises(RuntimeError, match="one block at a time"), adapter:
        pass


def test_a_monitor_that_observes_already_goes_on_observing(model):
    adapter = adapter_of(model)
    with adapter.monitor:
        with adapter:
            answers(model, stream(8, 1)[0])
        answers(model, stream(8, 2)[0])
        assert adapter.monitor.stream.passed == 16


def test_a_model_that_was_changed_between_blocks_is_deployed_anew(model):
    adapter = adapter_of(model)
    with adapter:
        answers(model, dim(stream(200, 9)[0]))
    model[1].running_mean.add_(1)
    changed = bits(model)
    with adapter:
        assert adapter.state == "watching"
    assert bits(model) == changed


@pytest.mark.slow
def test_a_compiled_model_is_measured_by_a_pass_of_its_own(trained, model):
    compiled = torch.compile(model, backend="eager")
    monitor = bn.ShiftMonitor(compiled, examples=None, budget=None)
    monitor.calibrate([stream(64, 2000 + i)[0] for i in range(5)])
    adapter, plain = bn.Adapter(monitor), adapter_of(other := copy.deepcopy(model))
    x = dim(stream(80, 9)[0])
    with adapter:
        answered = answers(compiled, x)
    with plain:
        expected = answers(other, x)
    assert adapter.state == plain.state == "adapted"
    torch.testing.assert_close(answered, expected)
    assert bits(model) == bits(trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": -1}, "prior must be a number of examples, 0 or more, got -1"),
        ({"minimum": 1}, "2 <= minimum <= window, got minimum 1, window 64"),
        ({"window": 8}, "2 <= minimum <= window, got minimum 16, window 8"),
        ({"minimum": float("nan")}, "2 <= minimum <= window, got minimum nan, window 64"),
        ({"floor": 0}, "floor must be between 0 and 1, got 0"),
    ],
)
def test_errors_say_what_was_expected(model, options, message):
    with pytest.raises(ValueError, match=message):
        bn.Adapter(bn.ShiftMonitor(model), **options)


def test_a_window_that_is_no_whole_number_is_refused(model):
    with pytest.raises(TypeError, match=r"window must be a whole number, got float"):
        bn.Adapter(bn.ShiftMonitor(model), window=64.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accept": 0.3}, "0 <= keep <= accept <= 1, got keep 0.5 and accept 0.3"),
        ({"energy": 1}, "an energy above 1, got 1"),
        ({"crowd": 0}, "a crowd above 0 and at most 1, got 0"),
    ],
)
def test_limits_have_limits(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)
