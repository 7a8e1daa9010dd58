"""The page's texts on how the answers were measured."""

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
    """Topic -> text, in the order of the page."""
    noun = "Seeds" if plan else "Draws"
    note = (
        "Arms share seeds, so their differences are paired." if plan else "Intervals are over random draws of examples."
    )
    texts = {
        "Model": _model(subject),
        "Data": _data(subject),
        noun: f"{len(seeds)}, from {seeds[0]} to {seeds[-1]}. {note}",
    }
    if plan:
        texts |= _training(subject, plan, seeds)
    if checkpoint:
        texts["Weights"] = (
            "Training began from fresh weights; depth, gamma and beta, noise and test time were measured on --weights."
        )
    texts["Intervals"] = (
        f"Student's t intervals of {CRITERIA.level:.0%} for each question separately: on average one of twenty such "
        "intervals misses the true value, and several questions were asked."
    )
    texts["Criteria"] = f"Version {CRITERIA.version}, fixed before anything was measured."
    return texts


def _training(subject: Subject, plan: StudyPlan, seeds: range) -> dict[str, str]:
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    texts = {
        "Training": f"SGD with momentum {MOMENTUM}, {plan.steps} steps, rates {rates}, {len(plan.arms)} arms: "
        f"{plan.runs} runs; no weight decay, no schedule."
    }
    if _same_weights(subject, seeds):
        texts["First weights"] = (
            "The same for every seed: probably the function loads weights or sets a seed. So seeds differ only in "
            "their batches, and weights that were trained with batch norm give batch norm an advantage."
        )
    return texts


def _same_weights(subject: Subject, seeds: range) -> bool:
    first, second = (list(subject.fresh(seed).parameters()) for seed in seeds[:2])
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def left_out(plan: StudyPlan | None) -> dict[str, str]:
    """Question -> the reason why it was not asked."""
    if plan is None:
        return {"speed, learning rates, shift, smoothness": "they need training, and --no-train was given"}
    reasons = dict(plan.left_out)
    reasons["whether the noise regularizes"] = (
        "training with smaller groups normalized together, at a fixed optimizer batch, was left out"
    )
    return reasons


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
    batching = (
        "dealt into new batches each epoch" if data.pool is not None else "in the loader's own batches, in a new order"
    )
    text = f"{train:,} examples to train with, in batches of {data.size}, {batching}; {held:,} held out."
    return text + (f" {data.dropped} batches of one example were left out." if data.dropped else "")
