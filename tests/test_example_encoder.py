"""The example of padded sequences runs, and its two arms differ in batch norm alone."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn

EXAMPLE = Path(__file__).parent.parent / "examples" / "padded_encoder.py"


def test_a_padded_sequence_has_the_output_that_it_has_alone():
    example = runpy.run_path(str(EXAMPLE))
    generator = torch.Generator().manual_seed(0)
    x, lengths, _ = example["sequences"](8, generator, torch.randn(8, 8, 7))
    model = example["Encoder"](bn.BatchNorm1d).double()
    model(x.double(), lengths)  # stores statistics
    model.eval()
    padded = model(x.double(), lengths)
    alone = [model(x[i : i + 1, :, :n].double(), lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(padded, torch.cat(alone), rtol=1e-11, atol=1e-11)


def test_arms_begin_with_the_same_weights():
    example = runpy.run_path(str(EXAMPLE))
    states = []
    for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
        torch.manual_seed(0)
        states.append(example["Encoder"](kind).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("arguments", [["--steps", "2", "--seeds", "2"]])
def test_the_example_prints_its_table(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "accuracy, padded" in printed
    assert "paired difference" in printed
