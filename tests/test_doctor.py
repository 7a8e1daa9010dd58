"""examine and Diagnosis: what goes in, what comes out, and that nothing changes."""

import json
import subprocess
import sys

import pytest
import torch
from fingerprint import fingerprint
from planted import CHANNELS, Net, batches, changed, images, layer_of, trained

import batchnorm as bn
from batchnorm.doctor import Diagnosis, examine
from batchnorm.doctor.examination import Selection
from batchnorm.rules import RULES, Severity


def _in_eval(model):
    return model.eval()


def _in_train(model):
    return model.train()


def _with_one_layer_in_eval(model):
    model.train()
    layer_of(model).eval()
    return model


def _frozen(model):
    return bn.freeze(model).train()


MODES = [_in_eval, _in_train, _with_one_layer_in_eval, _frozen]


class Raises(Net):
    calls = 0

    def forward(self, x):
        Raises.calls += 1
        if Raises.calls > 3:
            self.stem(x)
            raise RuntimeError("sensor unplugged")
        return super().forward(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d, bn.BatchNorm2d])
def test_a_look_changes_nothing(mode, norm):
    model = mode(trained(Net(norm)))
    model(images(8)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = fingerprint(model)
    examine(model, batches(), optimizer=optimizer, reference=trained(Net(norm)))
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", MODES)
def test_a_look_at_a_model_that_raises_changes_nothing(mode):
    Raises.calls = -200  # while it is trained
    model = mode(trained(Raises()))
    for calls in (3, 2, 0):  # at once, in the second batch, later
        Raises.calls = calls
        before = fingerprint(model)
        with pytest.raises((RuntimeError, ValueError), match="sensor unplugged"):
            examine(model, batches())
        assert fingerprint(model) == before


def test_the_test_for_changes_can_fail():
    model = trained()
    before = fingerprint(model)
    model.train()(images(8))
    assert fingerprint(model) != before


def test_a_file_is_examined_without_torch(tmp_path):
    torch.save(changed(running_var=-1.0).state_dict(), tmp_path / "model.pt")
    code = (
        "from batchnorm.doctor import examine\n"
        f"diagnosis = examine({str(tmp_path / 'model.pt')!r})\n"
        "import sys\n"
        "print([f.code for f in diagnosis.findings if f.severity == 2], {'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['BN103'] set()"


def test_a_diagnosis_says_what_it_found():
    diagnosis = examine(changed(running_var=-1.0), name="my model")
    assert not diagnosis.ok
    [error] = diagnosis.at_least(Severity.ERROR)
    assert (error.code, error.slug, error.layer, error.channels) == ("BN103", "negative-variance", "stem.1", (3,))
    assert [row.name for row in diagnosis.layers] == ["stem.1", "body.1"]
    assert diagnosis.layers[0].channels == CHANNELS
    assert diagnosis.layers[0].var_range[0] == -1
    with pytest.raises(ValueError, match=r"my model has 1 error, expected none:\n  BN103 negative-variance stem\.1"):
        diagnosis.raise_for_status()


def test_a_healthy_diagnosis_raises_nothing():
    diagnosis = examine(trained())
    assert diagnosis.ok
    diagnosis.raise_for_status(Severity.WARNING)


def test_json_has_no_nan_and_the_schema_s_version():
    diagnosis = examine(changed(running_var=float("nan")))
    told = json.loads(diagnosis.to_json(), parse_constant=pytest.fail)
    assert told["schema_version"] == 1
    assert told["findings"][0]["code"] == "BN102"
    assert told["layers"][0]["var_range"] == ["nan", "nan"]


def test_a_notebook_shows_the_findings_without_styles():
    bundle = examine(changed(running_var=-1.0))._repr_mimebundle_()
    assert "BN103" in bundle["text/plain"]
    assert "BN103" in bundle["text/html"]
    assert "<script" not in bundle["text/html"]


def test_rules_are_selected_and_silenced():
    sick = changed(running_var=-1.0)
    assert examine(sick, selection=Selection(select=("BN0",))).checked[0].startswith("BN0")
    assert "BN103" not in {f.code for f in examine(sick, selection=Selection(ignore=("BN10",))).findings}
    silenced = examine(sick, selection=Selection(per_layer={"stem.*": ("BN103",)}))
    assert (silenced.ok, silenced.silenced) == (True, 1)
    layer_of(sick).batchnorm_ignore = {"BN103"}
    assert examine(sick).ok


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: examine(3), TypeError, "nn.Module, got int"),
        (lambda: examine("no.pt"), FileNotFoundError, "no.pt"),
        (lambda: examine(trained(), accumulation=0), ValueError, "accumulation must be 1 or more, got 0"),
        (lambda: examine(trained(), max_examples=0), ValueError, "max_examples must be 1 or more"),
        (lambda: examine(trained(), []), ValueError, "batch"),
        (lambda: examine("model.pt", batches()), ValueError, "needs a model to use data with"),
    ],
)
def test_wrong_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_every_rule_has_a_page():
    for code, rule in RULES.items():
        assert rule.code == code
        assert rule.title.endswith(".")
        for section in ("Why:", "How:", "Example:", "Fix:"):
            assert f"\n{section}" in rule.page, (code, section)
    assert len({rule.slug for rule in RULES.values()}) == len(RULES)


def test_a_diagnosis_is_a_public_name():
    assert isinstance(bn.examine(trained()), Diagnosis)


@pytest.mark.parametrize("named", ["BN103", ["BN103"], ("bn103",), ("negative-variance",), ["BN103,BN101"]])
def test_rules_are_selected_by_code_or_name_in_any_case(named):
    assert Selection(select=named).takes("BN103")
    assert not Selection(select=named).takes("BN104")
    assert not Selection(ignore=named).takes("BN103")


def test_a_selection_of_nothing_is_none_and_one_of_an_unknown_rule_is_refused():
    assert Selection(ignore=("",)).takes("BN103")
    assert Selection(per_layer={"*": ("",)}).per_layer == {"*": ()}
    for settings in ({"select": ("BN777",)}, {"ignore": ("BN777",)}, {"per_layer": {"stem.*": ("BN777",)}}):
        with pytest.raises(ValueError, match=r"no rule 'BN777'\. Did you mean 'BN507'"):
            Selection(**settings)


@pytest.mark.parametrize("setting", [{"max_examples": 1.5}, {"batch_size": "8"}, {"accumulation": float("nan")}])
def test_settings_are_whole_numbers(setting):
    (name,) = setting
    with pytest.raises(TypeError, match=f"{name} must be a whole number, got .* Leave {name} out for the default"):
        examine(Net(), batches(), **setting)
