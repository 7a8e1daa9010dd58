"""The doctor's rules: what may be wrong with batch norm, as a table of small pure functions.

A rule looks at ``Evidence`` and yields findings. None of this needs torch. Codes go by family: BN0 mode and state,
BN1 stored statistics, BN2 batches and the training loop, BN3 architecture, BN4 shift, BN5 deployment, BN6
distributed, BN9 environment. A code keeps its meaning for ever and is not used again when its rule goes.
"""

from batchnorm.rules import (
    architecture,
    batches,
    channels,
    data,
    deployment,
    distributed,
    environment,
    shift,
    state,
    statistics,
    updates,
)
from batchnorm.rules.evidence import Evidence
from batchnorm.rules.finding import AFFINE, STATISTICS, Finding, Fix, Rule, Severity

__all__ = ["FAMILIES", "RULES", "Evidence", "Finding", "Fix", "Rule", "Severity"]

_INFO, _WARNING, _ERROR = Severity
_ALL = (*STATISTICS, *AFFINE)

_TABLE = (
    Rule("BN001", "eval-layer-in-training", _WARNING, ("structure",), state.eval_layer_in_training),
    Rule("BN002", "thawed-frozen-layer", _ERROR, ("structure",), state.thawed_frozen_layer),
    Rule("BN003", "frozen-but-trainable", _INFO, ("modules",), state.frozen_but_trainable),
    Rule("BN004", "statistics-switched-off", _ERROR, ("modules",), state.statistics_switched_off),
    Rule("BN005", "no-statistics", _WARNING, ("modules",), state.no_statistics),
    Rule("BN006", "cumulative-momentum", _INFO, ("modules",), state.cumulative_momentum),
    Rule("BN007", "zero-momentum", _WARNING, ("modules",), state.zero_momentum),
    Rule("BN008", "momentum-convention", _WARNING, ("modules",), state.momentum_convention),
    Rule("BN009", "skipped-updates", _WARNING, ("modules",), state.skipped_updates),
    Rule("BN010", "uninitialized-layer", _INFO, ("modules",), state.uninitialized_layer),
    Rule("BN101", "never-updated-statistics", _ERROR, ("stored",), updates.never_updated, _ALL),
    Rule("BN102", "non-finite-statistics", _ERROR, ("stored",), statistics.non_finite_statistics),
    Rule("BN103", "negative-variance", _ERROR, ("stored",), statistics.negative_variance),
    Rule("BN104", "denormal-variance", _INFO, ("stored",), statistics.denormal_variance),
    Rule("BN105", "constant-channel", _WARNING, ("stored",), channels.constant_channel, _ALL),
    Rule("BN106", "dead-channel", _INFO, ("stored",), channels.dead_channel, _ALL),
    Rule("BN107", "non-finite-affine", _ERROR, ("stored",), statistics.non_finite_affine, AFFINE),
    Rule("BN108", "half-precision-statistics", _WARNING, ("stored",), statistics.half_precision_statistics),
    Rule("BN109", "incomplete-layer", _ERROR, ("stored",), statistics.incomplete_layer, _ALL),
    Rule("BN110", "far-mean", _INFO, ("stored",), statistics.far_mean),
    Rule("BN111", "silent-layer", _WARNING, ("stored",), statistics.silent_layer, _ALL),
    Rule("BN112", "missing-counter", _INFO, ("stored",), statistics.missing_counter),
    Rule("BN113", "untrained-model", _INFO, ("stored",), updates.untrained_model, _ALL),
    Rule("BN114", "few-updates", _WARNING, ("stored",), updates.few_updates),
    Rule("BN115", "averaged-weights", _ERROR, ("stored",), updates.averaged_weights, _ALL),
    Rule("BN116", "stale-statistics", _WARNING, ("measured",), updates.stale_statistics),
    Rule("BN201", "small-batch", _WARNING, ("loop",), batches.small_batch),
    Rule("BN202", "last-batch-of-one", _ERROR, ("loop",), batches.last_batch_of_one),
    Rule("BN203", "gradient-accumulation", _WARNING, ("loop",), batches.gradient_accumulation),
    Rule("BN204", "correlated-batches", _WARNING, ("measured",), data.correlated_batches),
    Rule("BN205", "updated-twice", _WARNING, ("run",), batches.updated_twice),
    Rule("BN206", "weight-decay-on-affine", _INFO, ("optimizer",), batches.weight_decay_on_affine),
    Rule("BN207", "padding-counted", _WARNING, ("measured",), data.padding_counted),
    Rule("BN208", "non-finite-batch", _ERROR, ("measured",), data.non_finite_batch),
    Rule("BN209", "train-eval-gap", _WARNING, ("measured",), data.train_eval_gap),
    Rule("BN210", "unused-layer", _INFO, ("run",), batches.unused_layer),
    Rule("BN211", "constant-on-data", _INFO, ("measured",), data.constant_on_data),
    Rule("BN212", "training-step-fails", _ERROR, ("run",), batches.training_step_fails),
    Rule("BN213", "not-in-optimizer", _WARNING, ("optimizer",), batches.not_in_optimizer),
    Rule("BN301", "bias-before-batch-norm", _INFO, ("graph",), architecture.bias_before_batch_norm),
    Rule("BN302", "shared-layer", _WARNING, ("sharing",), architecture.shared_layer),
    Rule("BN303", "dropout-before-batch-norm", _INFO, ("graph",), architecture.dropout_before_batch_norm),
    Rule("BN304", "batch-norm-twice", _INFO, ("graph",), architecture.batch_norm_twice),
    Rule("BN401", "shifted-inputs", _WARNING, ("measured",), shift.shifted_inputs),
    Rule("BN402", "unscaled-inputs", _WARNING, ("run",), shift.unscaled_inputs),
    Rule("BN501", "not-folded", _INFO, ("graph",), deployment.not_folded),
    Rule("BN502", "wrong-fold", _ERROR, ("reference",), deployment.wrong_fold),
    Rule("BN503", "eps-mismatch", _WARNING, ("stored",), deployment.eps_mismatch),
    Rule("BN504", "train-mode-in-export", _ERROR, ("file",), deployment.train_mode_in_export),
    Rule("BN505", "functional-statistics", _ERROR, ("run",), deployment.functional_statistics),
    Rule("BN506", "depends-on-companions", _ERROR, ("run",), deployment.depends_on_companions),
    Rule("BN507", "wrapper-prefix", _INFO, ("file",), deployment.wrapper_prefix),
    Rule("BN508", "reference-statistics", _WARNING, ("reference",), deployment.reference_statistics),
    Rule("BN509", "activation-dropped", _ERROR, ("structure",), deployment.activation_dropped),
    Rule("BN601", "unsynchronized", _WARNING, ("structure",), distributed.unsynchronized),
    Rule("BN602", "sync-on-cpu", _ERROR, ("modules",), distributed.sync_on_cpu),
    Rule("BN603", "buffers-not-broadcast", _WARNING, ("structure",), distributed.buffers_not_broadcast),
    Rule("BN901", "shadowed-package", _WARNING, ("environment",), environment.shadowed_package),
    Rule("BN902", "reference-kernels", _INFO, ("environment",), environment.reference_kernels),
)

# Every rule by its code.
RULES: dict[str, Rule] = {rule.code: rule for rule in _TABLE}

# What the rules of a family are about, by the beginning of their codes.
FAMILIES = {
    "BN0": "mode and state",
    "BN1": "stored statistics",
    "BN2": "batches and training loop",
    "BN3": "architecture",
    "BN4": "shift",
    "BN5": "deployment",
    "BN6": "distributed",
    "BN9": "environment",
}
