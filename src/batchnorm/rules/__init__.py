"""The doctor's rules: what may be wrong with batch norm, as a table of small pure functions.

A rule looks at ``Evidence`` and yields findings. None of this needs torch. Codes go by family: BN0 mode and state,
BN1 stored statistics, BN2 batches and the training loop, BN3 architecture, BN4 shift, BN5 deployment, BN6
distributed, BN9 environment. A code keeps its meaning for ever and is not used again when its rule goes.
"""

from batchnorm.rules import (
    bn0_state,
    bn1_channels,
    bn1_stale_statistics,
    bn1_stored_statistics,
    bn2_batches,
    bn2_training,
    bn3_architecture,
    bn4_shift,
    bn5_deployment,
    bn6_distributed,
    bn9_environment,
)
from batchnorm.rules.finding import AFFINE, STATISTICS, Finding, Fix, Rule, Severity
from batchnorm.rules.rule_evidence import Evidence

__all__ = ["FAMILIES", "RULES", "Evidence", "Finding", "Fix", "Rule", "Severity"]

_INFO, _WARNING, _ERROR = Severity
_ALL = (*STATISTICS, *AFFINE)

_TABLE = (
    Rule("BN001", "eval-layer-in-training", _WARNING, ("structure",), bn0_state.eval_layer_in_training),
    Rule("BN002", "thawed-frozen-layer", _ERROR, ("structure",), bn0_state.thawed_frozen_layer),
    Rule("BN003", "frozen-but-trainable", _INFO, ("modules",), bn0_state.frozen_but_trainable),
    Rule("BN004", "statistics-switched-off", _ERROR, ("modules",), bn0_state.statistics_switched_off),
    Rule("BN005", "no-statistics", _WARNING, ("modules",), bn0_state.no_statistics),
    Rule("BN006", "cumulative-momentum", _INFO, ("modules",), bn0_state.cumulative_momentum),
    Rule("BN007", "zero-momentum", _WARNING, ("modules",), bn0_state.zero_momentum),
    Rule("BN008", "momentum-convention", _WARNING, ("modules",), bn0_state.momentum_convention),
    Rule("BN009", "skipped-updates", _WARNING, ("modules",), bn0_state.skipped_updates),
    Rule("BN010", "uninitialized-layer", _INFO, ("modules",), bn0_state.uninitialized_layer),
    Rule("BN101", "never-updated-statistics", _ERROR, ("stored",), bn1_stale_statistics.never_updated, _ALL),
    Rule("BN102", "non-finite-statistics", _ERROR, ("stored",), bn1_stored_statistics.non_finite_statistics),
    Rule("BN103", "negative-variance", _ERROR, ("stored",), bn1_stored_statistics.negative_variance),
    Rule("BN104", "denormal-variance", _INFO, ("stored",), bn1_stored_statistics.denormal_variance),
    Rule("BN105", "constant-channel", _WARNING, ("stored",), bn1_channels.constant_channel, _ALL),
    Rule("BN106", "dead-channel", _INFO, ("stored",), bn1_channels.dead_channel, _ALL),
    Rule("BN107", "non-finite-affine", _ERROR, ("stored",), bn1_stored_statistics.non_finite_affine, AFFINE),
    Rule("BN108", "half-precision-statistics", _WARNING, ("stored",), bn1_stored_statistics.half_precision_statistics),
    Rule("BN109", "incomplete-layer", _ERROR, ("stored",), bn1_stored_statistics.incomplete_layer, _ALL),
    Rule("BN110", "far-mean", _INFO, ("stored",), bn1_stored_statistics.far_mean),
    Rule("BN111", "silent-layer", _WARNING, ("stored",), bn1_stored_statistics.silent_layer, _ALL),
    Rule("BN112", "missing-counter", _INFO, ("stored",), bn1_stored_statistics.missing_counter),
    Rule("BN113", "untrained-model", _INFO, ("stored",), bn1_stale_statistics.untrained_model, _ALL),
    Rule("BN114", "few-updates", _WARNING, ("stored",), bn1_stale_statistics.few_updates),
    Rule("BN115", "averaged-weights", _ERROR, ("stored",), bn1_stale_statistics.averaged_weights, _ALL),
    Rule("BN116", "stale-statistics", _WARNING, ("measured",), bn1_stale_statistics.stale_statistics),
    Rule("BN201", "small-batch", _WARNING, ("loop",), bn2_training.small_batch),
    Rule("BN202", "last-batch-of-one", _ERROR, ("loop",), bn2_training.last_batch_of_one),
    Rule("BN203", "gradient-accumulation", _WARNING, ("loop",), bn2_training.gradient_accumulation),
    Rule("BN204", "correlated-batches", _WARNING, ("measured",), bn2_batches.correlated_batches),
    Rule("BN205", "updated-twice", _WARNING, ("run",), bn2_training.updated_twice),
    Rule("BN206", "weight-decay-on-affine", _INFO, ("optimizer",), bn2_training.weight_decay_on_affine),
    Rule("BN207", "padding-counted", _WARNING, ("measured",), bn2_batches.padding_counted),
    Rule("BN208", "non-finite-batch", _ERROR, ("measured",), bn2_batches.non_finite_batch),
    Rule("BN209", "train-eval-gap", _WARNING, ("measured",), bn2_batches.train_eval_gap),
    Rule("BN210", "unused-layer", _INFO, ("run",), bn2_training.unused_layer),
    Rule("BN211", "constant-on-data", _INFO, ("measured",), bn2_batches.constant_on_data),
    Rule("BN212", "training-step-fails", _ERROR, ("run",), bn2_training.training_step_fails),
    Rule("BN213", "not-in-optimizer", _WARNING, ("optimizer",), bn2_training.not_in_optimizer),
    Rule("BN301", "bias-before-batch-norm", _INFO, ("graph",), bn3_architecture.bias_before_batch_norm),
    Rule("BN302", "shared-layer", _WARNING, ("sharing",), bn3_architecture.shared_layer),
    Rule("BN303", "dropout-before-batch-norm", _INFO, ("graph",), bn3_architecture.dropout_before_batch_norm),
    Rule("BN304", "batch-norm-twice", _INFO, ("graph",), bn3_architecture.batch_norm_twice),
    Rule("BN401", "shifted-inputs", _WARNING, ("measured",), bn4_shift.shifted_inputs),
    Rule("BN402", "unscaled-inputs", _WARNING, ("run",), bn4_shift.unscaled_inputs),
    Rule("BN501", "not-folded", _INFO, ("graph",), bn5_deployment.not_folded),
    Rule("BN502", "wrong-fold", _ERROR, ("reference",), bn5_deployment.wrong_fold),
    Rule("BN503", "eps-mismatch", _WARNING, ("stored",), bn5_deployment.eps_mismatch),
    Rule("BN504", "train-mode-in-export", _ERROR, ("file",), bn5_deployment.train_mode_in_export),
    Rule("BN505", "functional-statistics", _ERROR, ("run",), bn5_deployment.functional_statistics),
    Rule("BN506", "depends-on-companions", _ERROR, ("run",), bn5_deployment.depends_on_companions),
    Rule("BN507", "wrapper-prefix", _INFO, ("file",), bn5_deployment.wrapper_prefix),
    Rule("BN508", "reference-statistics", _WARNING, ("reference",), bn5_deployment.reference_statistics),
    Rule("BN509", "activation-dropped", _ERROR, ("structure",), bn5_deployment.activation_dropped),
    Rule("BN601", "unsynchronized", _WARNING, ("structure",), bn6_distributed.unsynchronized),
    Rule("BN602", "sync-on-cpu", _ERROR, ("modules",), bn6_distributed.sync_on_cpu),
    Rule("BN603", "buffers-not-broadcast", _WARNING, ("structure",), bn6_distributed.buffers_not_broadcast),
    Rule("BN901", "shadowed-package", _WARNING, ("environment",), bn9_environment.shadowed_package),
    Rule("BN902", "reference-kernels", _INFO, ("environment",), bn9_environment.reference_kernels),
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
