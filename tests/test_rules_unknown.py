"""A check that could not run has not passed: for every rule, evidence where its measurement failed."""

from dataclasses import replace

import pytest
import torch
from planted import batches, trained
from test_rules_batches import HEALTHY, MEASURED, MODULE, STORED
from test_rules_statistics import stored
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint.stored import Stored
from batchnorm.doctor import examine
from batchnorm.replicas import Replicas
from batchnorm.rules import RULES
from batchnorm.rules.finding import by_reason
from batchnorm.rules.rule_evidence import Graph, Loop, OtherVersion, Ranks, Run, Structure

FULL = replace(
    HEALTHY, graph=Graph(calls={"bn": 1}), structure=Structure(training=False), run=Run(updates_forward={"bn": 1})
)


def with_run(part, **changes):
    return replace(FULL, run=Run(updates_forward={"bn": 1}, unknown={part: "it raised"}, **changes))


NO_VALUES = replace(FULL, stored={"bn": Stored("bn")}, modules={"bn": replace(MODULE, device="meta")})
UNREAD = stored(Stored("bn", unread=dict.fromkeys(("running_var", "weight"), "it is an input of the graph")))
UNTOLD = replace(FULL, modules={"bn": replace(MODULE, tells=False)})
UNMEASURED = replace(FULL, measured={})
PARTLY = replace(FULL, run=replace(FULL.run, unmeasured={"bn": "its input is sparse"}))
UNTRACED = replace(FULL, graph=Graph(calls={"bn": 1}, unread={"": "control flow"}))
SPREAD = replace(FULL, ranks=Ranks(Replicas((0, 1), 1, (), ("'bn' weight is spread over ranks (rank 0)",))))
STORED_RULES = [code for code, rule in RULES.items() if rule.needs == ("stored",) and code != "BN503"]

# each with a word of the reason
BLIND = {
    "BN001": [(replace(FULL, structure=None), "a model")],
    "BN002": [(replace(FULL, structure=None), "a model")],
    "BN509": [(replace(FULL, structure=None), "a model")],
    **{f"BN00{i}": [(UNTOLD, "its settings"), (replace(FULL, modules=None), "a model")] for i in range(3, 10)},
    "BN010": [(UNTOLD, "its settings cannot be read")],
    **{code: [(NO_VALUES, "meta device"), (UNREAD, "could not be read (bn)")] for code in STORED_RULES},
    "BN116": [(replace(FULL, measured={"bn": replace(MEASURED, t_mean=None)}), "4 batches"), (UNMEASURED, "no layer"),
              (PARTLY, "sparse")],
    "BN201": [(replace(FULL, loop=Loop(world_size=2)), "batch size")],
    "BN202": [(replace(FULL, loop=Loop(batch_size=32)), "length")],
    "BN203": [(replace(FULL, loop=None), "a loader")],
    "BN204": [(replace(FULL, measured={"bn": replace(MEASURED, clustering_p=None)}), "4 batches"),
              (UNMEASURED, "no layer")],
    "BN205": [(with_run("step"), "it raised"), (with_run("backward"), "it raised"),
              (replace(FULL, run=Run(updates_forward={"bn": 1}, train_error="ValueError: x")), "ValueError: x"),
              (replace(FULL, run=Run()), "num_batches_tracked")],
    "BN206": [(replace(FULL, optimizer=None), "the optimizer")],
    "BN207": [(UNMEASURED, "no layer"), (PARTLY, "sparse")],
    "BN208": [(UNMEASURED, "no layer"), (PARTLY, "sparse")],
    "BN209": [(replace(FULL, measured={"bn": replace(MEASURED, batches=1)}), "4 batches"), (UNMEASURED, "no layer"),
              (replace(FULL, measured={"bn": replace(MEASURED, gap_stale=None)}), "2 finite values")],
    "BN210": [(replace(FULL, run=replace(FULL.run, unwatched=("bn",))), "watched")],
    "BN211": [(UNMEASURED, "no layer"), (PARTLY, "sparse")],
    "BN212": [(with_run("step"), "it raised")],
    "BN213": [(replace(FULL, optimizer=None), "the optimizer")],
    "BN301": [(UNTRACED, "control flow")],
    "BN302": [(UNTRACED, "control flow"), (replace(FULL, graph=Graph()), "an example")],
    "BN303": [(UNTRACED, "control flow")],
    "BN304": [(UNTRACED, "control flow")],
    "BN401": [(UNMEASURED, "no layer"), (PARTLY, "sparse")],
    "BN402": [(with_run("inputs"), "it raised")],
    "BN501": [(UNTRACED, "control flow")],
    "BN502": [(replace(FULL, reference=OtherVersion("r")), "compared"),
              (replace(FULL, reference=OtherVersion("r", unknown="it is a file")), "a file")],
    "BN503": [(stored(eps=None), "eps"), (UNTOLD, "eps")],
    "BN504": [(stored(), "an ONNX graph")],
    "BN505": [(with_run("functional"), "it raised")],
    "BN506": [(with_run("companions"), "it raised"), (FULL, "alone")],
    "BN507": [(FULL, "a file")],
    "BN508": [(replace(FULL, reference=OtherVersion("r", stored={"other": STORED})), "name")],
    "BN510": [(FULL, "a file")],
    "BN601": [(replace(FULL, structure=None), "a model")],
    "BN602": [(UNTOLD, "its settings cannot be read")],
    "BN603": [(replace(FULL, structure=None), "a model")],
    "BN604": [(FULL, "group="), (SPREAD, "spread over ranks")],
    "BN605": [(FULL, "group="), (SPREAD, "spread over ranks")],
    "BN901": [(replace(FULL, environment=None), "the environment")],
    "BN902": [(replace(FULL, environment=None), "the environment")],
}  # fmt: skip


def test_every_rule_is_in_the_table():
    assert sorted(BLIND) == list(RULES)


@pytest.mark.parametrize("code", BLIND)
def test_a_rule_whose_measurement_failed_has_not_passed_and_says_why(code):
    for evidence, word in BLIND[code]:
        rule = RULES[code]
        missing = rule.missing(evidence)
        found, unknown = ([], []) if missing else rule.look(evidence)
        why = "; ".join(missing) or by_reason(unknown)
        assert found == []
        assert word in why, (code, why)


@pytest.mark.parametrize("code", [code for code, rule in RULES.items() if rule.needs != ("stored",)])
def test_a_rule_does_not_run_without_what_it_needs(code):
    for need in RULES[code].needs:
        if need != "stored":
            assert RULES[code].missing(replace(FULL, **{"graph" if need == "sharing" else need: None}))


def test_reasons_name_the_layers_that_they_are_about():
    measured = {name: replace(MEASURED, t_mean=None) for name in ("a", "b", "c", "d")}
    every = {name: replace(STORED, name=name) for name in measured}
    _, unknown = RULES["BN116"].look(replace(FULL, stored=every, modules=None, measured=measured))
    assert by_reason(unknown).endswith("(a, b, c and 1 more)")


# -- real models: nothing that could not be measured is among the checks that ran ---------------------------------


class Wrapped(nn.Module):
    """A trained model behind a forward that does something else first."""

    def __init__(self, forward):
        super().__init__()
        self.body = trained(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), data=rows())
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def rows(size=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, generator=generator) for _ in range(5)]


def refuses(condition, error):
    def forward(model, x):
        if condition(model, x):
            raise error
        return model.body(x)

    return forward


STEP, ALONE, GRAPH = {"BN205", "BN212"}, {"BN506"}, {"BN301", "BN302", "BN303", "BN304", "BN501"}
few = refuses(lambda _, x: len(x) < 2, ValueError("too few"))
REAL = {
    "one example in a batch": (lambda m, x: m.body(x), rows(1), {*STEP, *ALONE, "BN209", "BN204"}),
    "one batch": (lambda m, x: m.body(x), rows()[:1], {"BN204", "BN209", "BN116"}),
    "two examples of which one alone raises": (few, rows(2), ALONE),
    "integer outputs": (lambda m, x: m.body(x).argmax(1), rows(), {*ALONE, "BN205"}),
    "one output for the batch": (lambda m, x: m.body(x).mean(), rows(), ALONE),
    "no gradients": (lambda m, x: m.body(x).detach(), rows(), {"BN205"}),
    "a step that raises": (refuses(lambda m, _: m.training, ValueError("no")), rows(), {"BN205", *GRAPH} - {"BN501"}),
    "an untraceable forward": (lambda m, x: m.body(x) if x.sum() != 0 else x, rows(), GRAPH - {"BN501"}),
    "rows that refer to others": (lambda m, x: m.body(x)[torch.arange(32)], rows(), {*ALONE, "BN204"}),
    "integer inputs": (lambda m, x: m.body(x.float()), [x.long() for x in rows()], {"BN402"}),
}


@pytest.mark.parametrize("name", REAL)
def test_what_could_not_be_measured_has_not_passed(name):
    forward, data, unknown = REAL[name]
    diagnosis = examine(Wrapped(forward).eval(), data)
    assert unknown <= set(diagnosis.not_checked)
    assert not unknown & set(diagnosis.checked)
    assert all(diagnosis.not_checked[code] for code in unknown)


@pytest.mark.parametrize("error", [ValueError("too few"), RuntimeError()])
def test_a_model_that_raises_for_one_example_alone_depends_on_its_companions(error):
    diagnosis = examine(Wrapped(refuses(lambda _, x: len(x) < 2, error)).eval(), rows())
    (found,) = [finding for finding in diagnosis.findings if finding.code == "BN506"]
    assert found.measured.startswith(f"one example alone raises {type(error).__name__}")


def test_neighbours_in_a_forward_that_cannot_be_followed_are_not_passed():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Linear(4, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.n(self.a(x)) if x.sum() > -1e9 else x

    diagnosis = examine(trained(Turns(), data=rows()), rows())
    assert set(diagnosis.not_checked) >= GRAPH
    assert "control flow" in diagnosis.not_checked["BN501"]


class Fresh(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x):
        return bn.BatchNorm1d(8)(self.linear(x))


@pytest.mark.parametrize("size", [2, 8, 32])
def test_a_layer_that_is_made_in_the_forward_is_found(size):
    assert "BN506" in {finding.code for finding in examine(Fresh().eval(), rows(size)).findings}


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, nodes, neighbours):
        return self.b(torch.relu(self.n(self.a(nodes)[neighbours].mean(1))))


def test_a_graph_is_used_whole_and_nothing_is_said_of_single_nodes():
    torch.manual_seed(0)
    data = [{"nodes": torch.randn(40, 4), "neighbours": torch.randint(0, 40, (40, 3))} for _ in range(5)]
    model = Graphs()
    for batch in data * 20:
        model(**batch)
    diagnosis = examine(model.eval(), data)
    assert diagnosis.findings == ()
    assert "cannot be cut" in diagnosis.not_checked["BN506"]
    assert {"BN205", "BN212"} <= set(diagnosis.checked)


def programs():
    model = trained(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), data=rows())
    yield torch.export.export(model, (rows()[0],)).module()
    yield torch.jit.trace(model, rows()[0])
    yield torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_are_examined_as_far_as_they_can_be_seen():
    for program in programs():
        diagnosis = examine(program, rows())
        assert diagnosis.ok
        assert diagnosis.findings == ()
        assert {*GRAPH, "BN116", "BN204", "BN205", "BN209", "BN210", "BN211", "BN401"} <= set(diagnosis.not_checked)
        assert not {"BN103", "BN101"} & set(diagnosis.not_checked)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_exported_layer_that_measures_its_batch_is_found():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False))
    program = torch.export.export(model.eval(), (rows()[0],)).module()
    assert "BN505" in {finding.code for finding in examine(program, rows()).findings}


@pytest.mark.parametrize("size", [8, 32])
def test_arguments_that_only_training_takes_are_no_fault_of_batch_norm(size):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x, targets=None):
            assert targets is not None or not self.training
            return self.norm(x)

    diagnosis = examine(Detector().eval(), rows(size))
    assert "perhaps because it lacks targets" in diagnosis.not_checked["BN212"]
    assert "BN212" not in {finding.code for finding in diagnosis.findings}


def test_values_that_are_not_there_are_not_passed():
    diagnosis = examine(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("meta"))
    assert not {code for code in diagnosis.checked if code.startswith("BN1")}
    assert "meta device (1)" in diagnosis.not_checked["BN103"]


def test_a_model_that_is_healthy_in_every_measurement_passes_them():
    diagnosis = examine(trained(), batches())
    assert {*STEP, *ALONE, "BN116", "BN204", "BN209", "BN301", "BN302", "BN402"} <= set(diagnosis.checked)
