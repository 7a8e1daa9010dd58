"""How it was measured, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from batchnorm.ablation.arm_training import MOMENTUM
from batchnorm.ablation.question_criteria import CRITERIA
from batchnorm.layers import batch_norms
from batchnorm.population.freezing import Frozen

if TYPE_CHECKING:
    from batchnorm.ablation.effort import StudyPlan
    from batchnorm.ablation.user_model import Subject


def facts(subject: Subject, plan: StudyPlan | None, seeds: range, *, checkpoint: bool = False) -> dict[str, str]:
    """What -> text, in the page's order."""
    noun = "Seeds" if plan else "Draws"
    paired = (
        "Arms share seeds, so their differences are paired." if plan else "Intervals are over random draws of examples."
    )
    found = {
        "Model": _model(subject),
        "Data": _data(subject),
        noun: f"{len(seeds)}, from {seeds[0]} to {seeds[-1]}. {paired}",
    }
    if plan:
        found |= _training(subject, plan, seeds)
    if checkpoint:
        found["Weights"] = (
            "Training began from fresh weights; depth, gamma and beta, noise and test time are those of --weights."
        )
    found["Intervals"] = (
        f"Student's t at {CRITERIA.level:.0%} for each question by itself: of twenty such intervals one misses, and "
        "several questions were asked."
    )
    found["Criteria"] = f"Version {CRITERIA.version}, fixed before anything was measured."
    return found


def _training(subject: Subject, plan: StudyPlan, seeds: range) -> dict[str, str]:
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    found = {
        "Training": f"SGD with momentum {MOMENTUM}, {plan.steps} steps, rates {rates}, {len(plan.arms)} arms: "
        f"{plan.runs} runs; no weight decay, no schedule."
    }
    if _same_weights(subject, seeds):
        found["First weights"] = (
            "The same for every seed: the function loads them or seeds itself, so seeds differ in their batches only, "
            "and weights that were trained with batch norm favour it."
        )
    return found


def _same_weights(subject: Subject, seeds: range) -> bool:
    first, second = (list(subject.fresh(seed).parameters()) for seed in seeds[:2])
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def left_out(plan: StudyPlan | None) -> dict[str, str]:
    """Question -> why it was not asked."""
    if plan is None:
        return {"speed, learning rates, shift, smoothness": "they take training, and --no-train was given"}
    found = dict(plan.left_out)
    found["whether the noise regularizes"] = "training with smaller groups at a fixed batch was left out"
    return found


def _model(subject: Subject) -> str:
    model = subject.fresh(0)
    layers = batch_norms(model)
    frozen = sum(isinstance(layer, Frozen) for layer in layers.values())
    weights = sum(p.numel() for p in model.parameters())
    text = f"{subject.name}: {type(model).__name__}, {weights:,} parameters, {len(layers)} batch norm layers"
    return text + (f", {frozen} of them frozen." if frozen else ".")


def _data(subject: Subject) -> str:
    data = subject.data
    train, held = data.counts
    dealt = (
        "dealt into new batches each epoch" if data.pool is not None else "in the loader's own batches, in a new order"
    )
    text = f"{train:,} examples to train with, in batches of {data.size}, {dealt}; {held:,} held out."
    return text + (f" {data.dropped} batches of one example were left out." if data.dropped else "")
