"""watch where a step has several passes, or several optimizers: numbers against the known truth, and steps counted."""

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.special import polygamma
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.instruments import Watch
from batchnorm.record import Log

CHANNELS, SIZE = 2048, 64
NO_LIMIT = 1e9
# 1 / M + Var(log s^2) / 4 of normal values, with the exact trigamma; about 1.5 / M
TRUTH = 1 / SIZE + float(polygamma(1, (SIZE - 1) / 2)) / 4
# relative error of six second differences pooled over channels (test_instruments_noise.py), five of them; where two
# optimizers share eight steps there are four: sqrt(6 / 4); and E[1 / s^2] of W batches
ERROR = 5 * 0.77 / math.sqrt(CHANNELS) * math.sqrt(6 / 4) + 2 / (8 * (SIZE - 1))


class Model(nn.Module):
    """Batch norm of the inputs themselves, so that what a batch adds does not depend on what was learned."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.bn, self.head = norm(CHANNELS), nn.Linear(CHANNELS, 1)
        self.recompute: bool | None = None

    def part(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute is None:
            return self.head(self.part(x))
        return self.head(checkpoint(self.part, x.requires_grad_(self.recompute), use_reentrant=self.recompute))


def batch(step: int, part: int = 0) -> Tensor:
    return torch.randn(SIZE, CHANNELS, generator=torch.Generator().manual_seed(100 * step + part))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is commonly written: a climb, and the base optimizer's step back down."""

    def __init__(self, parameters: object, base: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = base(self.param_groups, lr=1e-3)

    @torch.no_grad()
    def first_step(self) -> None:
        self.climbs = [0.05 * p.grad for group in self.param_groups for p in group["params"]]
        for p, climb in zip(self.param_groups[0]["params"], self.climbs, strict=True):
            p.add_(climb)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, climb in zip(self.param_groups[0]["params"], self.climbs, strict=True):
            p.sub_(climb)
        self.base.step()

    def step(self, closure: Callable[[], Tensor]) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Super(torch.optim.SGD):
    """A subclass that adds to its base's step."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        super().step(closure)


def backward(model: nn.Module, *batches: Tensor, share: float = 1) -> Tensor:
    loss = torch.stack([loss_of(model, x) for x in batches]).sum() * share
    loss.backward()
    return loss


# -- one step of each pattern, given the model and what ``sgd`` or another makes; all are written as people write them


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    backward(model, batch(step))
    optimizer.step()


def sam(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        backward(model, batch(step))
        half()


def sam_closure(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    backward(model, batch(step))
    optimizer.step(lambda: backward(model, batch(step)))


def views(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = batch(step)
    optimizer.zero_grad()
    backward(model, x + 0.1 * batch(step, 1), 2 * x + 0.1 * batch(step, 2))
    optimizer.step()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    def evaluated() -> Tensor:
        optimizer.zero_grad()
        return backward(model, batch(step))

    optimizer.step(evaluated)


def penalty(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    x = batch(step).requires_grad_()
    loss = loss_of(model, x)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (loss + slope.square().sum()).backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    for part in range(4):
        backward(model, batch(step, part), share=1 / 4)
    optimizer.step()


def discriminated(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    backward(model, batch(step), 3 + 2 * batch(step, 1))  # real and generated
    optimizer.step()


def stepped_unevenly(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A discriminator, through which every third time a generator is trained too."""
    if step % 3 == 0:
        loss_of(model, 3 + 2 * batch(step, 2))
    discriminated(model, optimizer, step)


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A gradient scaler that leaves out a step."""
    optimizer.zero_grad()
    backward(model, batch(step))
    if step % 5:
        optimizer.step()


def seldom(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A layer that is updated in every second step only."""
    model.bn.train(step % 2 == 0)
    plain(model, optimizer, step)


def recomputed(reentrant: bool) -> Callable[..., None]:
    def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        model.recompute = reentrant
        plain(model, optimizer, step)

    return step_of


def lbfgs(search: str | None) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=5, line_search_fn=search)


PATTERNS = {
    "plain": (plain, sgd),
    "sam": (sam, lambda model: Sam(model.parameters())),
    "sam with a closure": (sam_closure, lambda model: Sam(model.parameters())),
    "checkpointed, reentrant": (recomputed(True), sgd),
    "checkpointed": (recomputed(False), sgd),
    "two views": (views, sgd),
    "lbfgs": (closure, lbfgs(None)),
    "lbfgs with a line search": (closure, lbfgs("strong_wolfe")),
    "sgd with a closure": (closure, sgd),
    "gradient penalty": (penalty, sgd),
    "accumulated": (accumulated, sgd),
    "real and generated": (discriminated, sgd),
    "real and generated, unevenly": (stepped_unevenly, sgd),
    "steps left out": (scaled, sgd),
    "every second step": (seldom, sgd),
    "a subclass that calls its base": (plain, lambda model: Super(model.parameters(), lr=1e-3)),
}


def trained(
    name: str, steps: int = 40, model: nn.Module | None = None, wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
    watched: bool = True, **arguments: object,
) -> tuple[nn.Module, Watch]:  # fmt: skip
    torch.manual_seed(0)
    model = model or Model()
    step_of, make = PATTERNS[name]
    optimizer, outer = make(model), wrap(model)
    run = bn.watch(outer, every=10, budget=NO_LIMIT, **{"probe": False, **arguments})
    with run if watched else torch.enable_grad():
        for step in range(steps):
            step_of(outer, optimizer, step)
    return model, run


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d], ids=["torch", "ours"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_batch_counts_once_however_often_it_passes(name: str, norm: type[nn.Module], tmp_path: Path) -> None:
    _, run = trained(name, model=Model(norm), log=tmp_path)
    for record in (r for r in run.records if r.tier == "free"):
        assert record["noise"]["bn"] == pytest.approx(TRUTH, rel=ERROR), record.step
        assert record["m_eff"]["bn"] == pytest.approx(SIZE, rel=ERROR)
        assert record["dropout"]["bn"] == pytest.approx(TRUTH / (1 + TRUTH), rel=ERROR)
    assert run.steps == (32 if name == "steps left out" else 40)
    assert not [event for event in Log(tmp_path).rows("event") if event["code"] == "BN201"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_stored_statistics_that_follow_are_not_called_stale(name: str) -> None:
    _, run = trained(name, steps=80)
    # averages that settled are one standard error away; twice as many is far outside of 2048 channels' sampling error
    assert 0.5 < run.latest["staleness"]["bn"] < 2
    assert run.latest["shift"]["bn"] < 2 * run.latest["shift_floor"]["bn"] or "generated" in name or "views" in name


def bits(model: nn.Module) -> dict[str, list[int]]:
    return {k: v.detach().clone().reshape(-1).view(torch.uint8).tolist() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", PATTERNS)
def test_trained_weights_are_the_same_bit_for_bit(name: str) -> None:
    watched, _ = trained(name, steps=30, probe=None)
    alone, _ = trained(name, steps=30, watched=False)
    assert bits(watched) == bits(alone)
    assert not any(module._forward_pre_hooks for module in watched.modules())


def test_a_layer_that_is_used_twice_in_a_pass_is_read_use_by_use() -> None:
    class Twice(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.part(x) + self.part(5 - x))

    _, run = trained("plain", model=Twice())
    assert run.latest["noise"]["bn"] == pytest.approx(TRUTH, rel=ERROR)


@pytest.mark.parametrize("name", ["sam", "accumulated", "plain", "lbfgs"])
def test_passes_of_a_wrapped_model_are_told_apart(name: str) -> None:
    _, run = trained(name, wrap=nn.DataParallel)
    assert run.latest["noise"]["bn"] == pytest.approx(TRUTH, rel=ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "accumulated", "plain"])
def test_passes_of_a_compiled_model_are_told_apart_or_said_not_to_be(name: str, tmp_path: Path) -> None:
    _, run = trained(name, wrap=lambda model: torch.compile(model, backend="aot_eager"), log=tmp_path / "outer")
    assert run.latest["noise"]["bn"] == pytest.approx(TRUTH, rel=ERROR)
    model = Model()
    optimizer, compiled = PATTERNS[name][1](model), torch.compile(model, backend="aot_eager")
    with bn.watch(model, every=10, budget=NO_LIMIT, probe=False, log=tmp_path / "inner") as run:
        for step in range(40):
            PATTERNS[name][0](compiled, optimizer, step)
    told = [event["message"] for event in Log(tmp_path / "inner").rows("event") if "several passes" in event["message"]]
    if name == "plain":
        assert run.latest["noise"]["bn"] == pytest.approx(TRUTH, rel=ERROR)
        assert not told
    else:
        assert run.latest["noise"]["bn"] is None
        assert len(told) == 1


def test_a_copy_or_a_file_of_a_model_that_is_being_measured_has_nothing_of_the_watch() -> None:
    model = Model()
    optimizer, copies = sgd(model), []
    with bn.watch(model, every=10, budget=NO_LIMIT) as run:
        copies.append(copy.deepcopy(model))  # before the probe was taken
        for step in range(18):
            plain(model, optimizer, step)
            copies.append(copy.deepcopy(model))
            copies.append(pickle.loads(pickle.dumps(model)))
            torch.save(model, io.BytesIO())
            for other in copies[-2:]:
                other(batch(99))
    assert run.latest["noise"]["bn"] == pytest.approx(TRUTH, rel=ERROR)
    assert all(c.bn.num_batches_tracked == i // 2 + 2 for i, c in enumerate(copies[1:]))


# -- whose steps count --------------------------------------------------------------------------------------------


def counted(steps: Callable[[nn.Module], object], model: nn.Module | None = None, **arguments: object) -> Watch:
    model = model or Model()
    with bn.watch(model, every=10, budget=NO_LIMIT, probe=False, **arguments) as run:
        steps(model)
    return run


def times(count: int, step_of: Callable[..., None], *arguments: object) -> None:
    for step in range(count):
        step_of(*arguments, step)


def test_an_optimizer_that_is_made_in_mid_training_counts() -> None:
    def steps(model: Model) -> None:
        times(15, plain, model, torch.optim.SGD(model.head.parameters(), 1e-3))
        times(15, plain, model, torch.optim.AdamW(model.parameters(), 1e-3))
        times(5, plain, model, torch.optim.Adam(model.bn.parameters(), 1e-3))

    run = counted(steps)
    assert run.steps == 35
    assert run.latest.step > 25


def test_a_watch_that_is_entered_again_counts_the_new_optimizer() -> None:
    model = Model()
    run = bn.watch(model, every=10, budget=NO_LIMIT, probe=False)
    for _ in range(2):
        with run:
            times(20, plain, model, sgd(model))
    assert run.steps == 40
    assert run.latest.step == 38


def test_an_optimizer_for_every_step_counts() -> None:
    assert counted(lambda model: [plain(model, sgd(model), step) for step in range(20)]).steps == 20


def alternated(model: Model) -> None:
    first, second = (torch.optim.SGD(part.parameters(), 1e-3) for part in (model.bn, model.head))
    for step in range(40):
        plain(model, (first, second)[step % 2], step)


def at_once(model: Model) -> None:
    optimizers = [torch.optim.SGD(part.parameters(), 1e-3) for part in (model.bn, model.head)]
    for step in range(40):
        backward(model, batch(step))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def in_backward(model: Model) -> None:
    of = {p: torch.optim.SGD([p], 1e-3) for p in model.parameters()}

    def step_of(p: nn.Parameter) -> None:
        of[p].step()
        of[p].zero_grad()

    for p in of:
        p.register_post_accumulate_grad_hook(step_of)
    for step in range(40):
        backward(model, batch(step))


def in_backward_checkpointed(model: Model) -> None:
    model.recompute = False
    in_backward(model)


def several_in_one(model: Model) -> None:
    class Several(torch.optim.Optimizer):
        """Holds nothing of its own but calls others, as a wrapper over parts of a model does."""

        def __init__(self) -> None:
            super().__init__([nn.Parameter(torch.zeros(1))], {})
            self.parts = [torch.optim.SGD(part.parameters(), 1e-3) for part in (model.bn, model.head)]

        def step(self, closure: object = None) -> None:
            for part in self.parts:
                part.step()

        def zero_grad(self, set_to_none: bool = True) -> None:
            for part in self.parts:
                part.zero_grad(set_to_none)

    times(40, plain, model, Several())


def scheduled(model: Model) -> None:
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for step in range(40):
        plain(model, optimizer, step)
        schedule.step()
        averaged.update_parameters(model)


def unscaled(model: Model) -> None:
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    for step in range(40):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(step))).backward()
        scaler.step(optimizer)
        scaler.update()


def of_all_at_once(model: Model) -> None:
    times(40, plain, model, torch.optim.AdamW(model.parameters(), 1e-4, foreach=True))


def fused(model: Model) -> None:
    times(40, plain, model, torch.optim.AdamW(model.parameters(), 1e-4, fused=True))


def frozen(model: Model) -> None:
    bn.freeze(model)
    times(40, plain, model, sgd(model))


def grown(model: Model) -> None:
    optimizer = torch.optim.SGD(model.head.parameters(), 1e-3)
    times(20, plain, model, optimizer)
    optimizer.add_param_group({"params": model.bn.parameters()})
    times(20, plain, model, optimizer)


def replaced(model: Model) -> None:
    times(20, plain, model, sgd(model))
    model.head = nn.Linear(CHANNELS, 1)
    times(20, plain, model, torch.optim.SGD(model.head.parameters(), 1e-3))


def with_errors(model: Model) -> None:
    optimizer = Super(model.parameters(), lr=1e-3)

    def broken() -> Tensor:
        raise ZeroDivisionError

    for step in range(40):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(broken)
        plain(model, optimizer, step)


def from_a_thread(model: Model) -> None:
    thread = threading.Thread(target=times, args=(40, plain, model, sgd(model)))
    thread.start()
    thread.join()


def beside_another(model: Model) -> None:
    other = Model()
    theirs, ours = sgd(other), sgd(model)
    for step in range(40):
        for _ in range(3):
            plain(other, theirs, step)
        plain(model, ours, step)


TRAININGS = (
    alternated, at_once, in_backward, in_backward_checkpointed, several_in_one, scheduled, unscaled, of_all_at_once,
    fused, frozen, grown, replaced, with_errors, from_a_thread, beside_another,
)  # fmt: skip


@pytest.mark.parametrize("steps", TRAININGS, ids=lambda f: f.__name__)
def test_forty_steps_are_forty(steps: Callable[[Model], None]) -> None:
    run = counted(steps)
    assert run.steps == 40
    if steps is not frozen:
        assert run.latest["noise"]["bn"] == pytest.approx(TRUTH, rel=ERROR)


def test_two_optimizers_of_one_model_with_batches_of_their_own() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.judge = nn.Linear(1, 1), Model()

    def steps(model: Both) -> None:
        of_judge, of_generator = sgd(model.judge), sgd(model.generator)
        for step in range(60):
            of_judge.zero_grad()
            backward(model.judge, torch.cat([batch(step)[:32], 9 + batch(step, 1)[:32]]))
            of_judge.step()
            of_generator.zero_grad()
            backward(model.judge, 5 + model.generator(batch(step, 3).reshape(-1, 1)).reshape(SIZE, -1))
            of_generator.step()

    run = counted(steps, Both())
    assert run.steps == 120
    # two sorts of batch, and two variances: each is compared with its like, so no jump between them is in the noise
    assert run.latest["m_eff"]["judge.bn"] > SIZE / 2


def test_an_optimizer_without_the_models_parameters_is_told(tmp_path: Path) -> None:
    model = Model()
    stale = sgd(model)
    model.bn, model.head = nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 1)
    with pytest.warns(RuntimeWarning, match=r"no step of an optimizer that has one of the model's parameters, but 120"):
        counted(lambda model: times(120, plain, model, stale), model, log=tmp_path)
    (event,) = Log(tmp_path).rows("event")
    assert "100 steps in a row were of SGD, which has none of the model's parameters" in event["message"]


def test_nothing_is_said_to_change_while_only_another_model_trains(tmp_path: Path) -> None:
    model, other = Model(), Model()
    optimizer = sgd(other)
    with pytest.warns(RuntimeWarning, match="watch saw no step"):
        counted(lambda _: times(120, plain, other, optimizer), model, log=tmp_path)
    assert not Log(tmp_path).rows("event")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_too_short_says_so(steps: int, tmp_path: Path) -> None:
    counted(lambda model: times(steps, plain, model, sgd(model)), log=tmp_path)
    (event,) = Log(tmp_path).rows("event")
    assert event["message"].startswith(f"nothing was measured in {steps} step")
    run = counted(lambda model: times(steps, plain, model, sgd(model)))
    with pytest.raises(RuntimeError, match=f"nothing was measured in {steps} step.*Train for longer"):
        _ = run.latest


@pytest.mark.parametrize("steps", range(3, 18))
def test_a_short_run_is_measured_when_it_ends(steps: int) -> None:
    run = counted(lambda model: times(steps, accumulated, model, sgd(model)))
    assert run.latest.step == steps
    # one second difference has a relative variance of 2, and four passes of a step are four
    error = 5 * math.sqrt(2 / CHANNELS) + 2 / (3 * (SIZE - 1))
    assert run.latest["m_eff"]["bn"] == pytest.approx(SIZE, rel=error)


def test_an_optimizer_that_cannot_be_asked_ends_the_watch_and_not_the_training() -> None:
    model = Model()
    optimizer = sgd(model)
    run = bn.watch(model, probe=False).start()
    plain(model, optimizer, 0)
    groups, optimizer.param_groups = optimizer.param_groups, [{}]
    with pytest.warns(RuntimeWarning, match=r"watch stopped at step 1: KeyError: 'params'"):
        run._steps._after(optimizer)
    optimizer.param_groups = groups
    plain(model, optimizer, 1)
    assert run.steps == 1
