"""Where layers are in a file, how they are named, and which copies are averages."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import saved, trained
from torch import nn

from batchnorm.checkpoint import Checkpoint, read
from batchnorm.checkpoint.states_in_file import with_state


def reading(tmp_path, value: object) -> Checkpoint:
    (tmp_path / "c.pt").write_bytes(saved(value))
    return read(tmp_path / "c.pt")


def state(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    return trained(seed).state_dict(prefix=prefix)


def averaged(value: nn.Module) -> dict[str, torch.Tensor]:
    return torch.optim.swa_utils.AveragedModel(value).state_dict()


PREFIXES = {
    "": lambda: state(),
    "module.": lambda: state(prefix="module."),
    "_orig_mod.": lambda: state(prefix="_orig_mod."),
    "module._orig_mod.module.": lambda: state(prefix="module._orig_mod.module."),
    "state_dict.": lambda: {"state_dict": state(), "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
    "state_dict.model.": lambda: {"state_dict": state(prefix="model.")},
    "model.": lambda: {"model": state()},
    "model_state_dict.module.": lambda: {"model_state_dict": state(prefix="module."), "loss": 0.5},
    "a.b.c.": lambda: {"a": {"b": {"c": state()}}},
    "0.": lambda: [state()],
    "net.": lambda: {"net": state()},
}


@pytest.mark.parametrize(("prefix", "make"), PREFIXES.items(), ids=PREFIXES)
def test_layers_are_found_and_named_without_what_wraps_them(tmp_path, prefix, make):
    value = make()
    result = reading(tmp_path, value)
    assert list(result.layers) == ["1", "2.1"]
    assert result.prefix == prefix
    assert list(result.copies) == [prefix.removesuffix(".")]
    assert result.names == ("0.weight", "0.bias", "2.0.weight", "2.0.bias")
    for name, (*path, key) in result.keys.items():
        place = value
        for step in path:
            place = place[step]
        assert place[f"{key}.running_mean"].double().tolist() == result.layers[name].running_mean.tolist()


def test_a_layer_alone_has_an_empty_name(tmp_path):
    for value in (nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict(prefix="module.")):
        result = reading(tmp_path, value)
        assert list(result.layers) == [""]
        assert len(result.copies) == 1
    assert result.keys == {"": ("module",)}


def test_parts_of_a_model_are_one_copy(tmp_path):
    result = reading(tmp_path, {"encoder": state(), "decoder": state(1), "step": 3})
    assert list(result.layers) == ["encoder.1", "encoder.2.1", "decoder.1", "decoder.2.1"]
    assert list(result.copies) == [""]


def test_a_part_called_model_keeps_its_name_beside_others(tmp_path):
    result = reading(tmp_path, {**state(prefix="model."), **state(prefix="head.")})
    assert list(result.layers) == ["model.1", "model.2.1", "head.1", "head.2.1"]


COPIES = {
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict", "state_dict_ema"),
    "torchvision": (lambda a, b: {"model": a, "model_ema": with_prefix("module.", b)}, "model", "model_ema.module"),
    "ema first": (lambda a, b: {"ema_state_dict": b, "model": a}, "model", "ema_state_dict"),
    "shadow": (lambda a, b: {"net": a, "shadow": b}, "net", "shadow"),
    "basicsr": (lambda a, b: {"params": a, "params_ema": b}, "params", "params_ema"),
    "one dict": (
        lambda a, b: {"state_dict": {**with_prefix("model.", a), **with_prefix("ema.module.", b)}},
        "state_dict.model",
        "state_dict.ema.module",
    ),
    "ema-pytorch": (
        lambda a, b: {**with_prefix("online_model.", a), **with_prefix("ema_model.", b), "step": torch.ones(1)},
        "online_model",
        "ema_model",
    ),
    "AveragedModel": (
        lambda a, b: {"model": a, "best": {"n_averaged": torch.tensor(3), **with_prefix("module.", b)}},
        "model",
        "best.module",
    ),
    "Lightning": (
        lambda a, b: {"state_dict": b, "current_model_state": a, "averaging_state": {"n_averaged": torch.tensor(3)}},
        "current_model_state",
        "state_dict",
    ),
    "in a callback": (
        lambda a, b: {"state_dict": a, "callbacks": {"EMA": {"ema_state_dict": b}}},
        "state_dict",
        "callbacks.EMA.ema_state_dict",
    ),
}


def with_prefix(prefix: str, value: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in value.items()}


@pytest.mark.parametrize(("make", "own", "average"), COPIES.values(), ids=COPIES)
def test_an_averaged_copy_is_told_from_the_models_own(tmp_path, make, own, average):
    a, b = state(), state(1)
    result = reading(tmp_path, make(a, b))
    assert list(result.copies) == [own, average]
    assert result.layers == result.copies[own]
    assert list(result.layers) == list(result.copies[average]) == ["1", "2.1"]
    assert result.layers["1"].running_mean.tolist() == a["1.running_mean"].tolist()
    assert result.copies[average]["1"].running_mean.tolist() == b["1.running_mean"].tolist()
    assert result.prefix == f"{own}."
    assert [(name, list(state.layers)) for name, state in result.states.items()] == [
        (own, ["1", "2.1"]), (average, ["1", "2.1"])]  # fmt: skip
    assert [state.is_average for state in result.states.values()] == [False, True]
    assert set(result.every) == {"1", "2.1", f"{average}.1", f"{average}.2.1"}


def test_an_average_alone_stands_in_for_the_model(tmp_path):
    for value in (
        averaged(trained()),
        {"ema": state()},
        state(prefix="ema.module."),
        {"ema": state(), "swa": state(1)},
    ):
        result = reading(tmp_path, value)
        assert list(result.layers) == ["1", "2.1"]
        assert result.layers == next(iter(result.copies.values()))


def test_a_module_called_ema_is_a_part_unless_it_repeats_others(tmp_path):
    result = reading(tmp_path, {**state(prefix="stem."), **state(prefix="ema.")})
    assert list(result.layers) == ["stem.1", "stem.2.1", "ema.1", "ema.2.1"]


def test_the_same_dict_under_two_names_is_read_once(tmp_path):
    one = state()
    result = reading(tmp_path, {"model": one, "again": one})
    assert list(result.copies) == list(result.states) == ["model"]
    assert result.aliases == {"again": "model"}
    assert with_state(result, "again") == (result, "model")


def test_keys_that_are_no_names_are_passed_over(tmp_path):
    result = reading(tmp_path, {"model": state(), 3: {"x": 1}, (1, 2): state(1), None: state(1), "k" * 2000: state(1)})
    assert list(result.copies) == ["model"]


def test_two_layers_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a different name for each layer, got the same name twice"):
        reading(tmp_path, {"a": {"b": state()}, "a.b": state(1), "c": state()})
