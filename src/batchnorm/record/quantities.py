"""What a number of a log means: its title, unit, noise floor, how to read it, when it misleads, and the source.

The instruments that measure them derive the formulas; charts and pages take their words from here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that is measured of a layer, or of a model.

    Args:
        title: A few words, as over a chart.
        unit: Its unit; "" for a plain ratio.
        tier: "free", "probe" or "lab".
        formula: How it is computed.
        reads: How to read it, with the limits that matter.
        misleads: When it says something else than it seems to.
        floor: What it shows where there is nothing to see.
        source: Where it comes from.
        of: "layer" or "model".
        good: The value that nothing is wrong at, where there is one.
    """

    title: str
    unit: str
    tier: str
    formula: str
    reads: str
    misleads: str
    floor: str
    source: str
    of: str = "layer"
    good: float | None = None


_RUNNING = "momentum 0, a batch that several steps in a row are taken on, and ranks that each update on their own."
_PASSES = "Several passes in a step are compared each with the same pass of other steps: one batch twice counts once."

QUANTITIES: dict[str, Quantity] = {
    "noise": Quantity(
        "batch noise",
        "share of the output's variance",
        "free",
        "Var(mu_B) / s^2 + Var(log s_B^2) / 4, means over channels",
        "The noise that a batch's own statistics add to each normalized value; 1.5 / M for normal values in batches "
        "of M independent values. It regularizes, like dropout. " + _PASSES,
        "uneven drift within eight steps; behind another batch norm layer batches are alike: it is small; " + _RUNNING,
        "(kappa + 3) / (4 M): it is the noise itself",
        "Luo et al. 2019, section 3; the moments of a normal sample",
        good=0.0,
    ),
    "m_eff": Quantity(
        "effective batch",
        "values per channel",
        "free",
        "s^2 / Var(mu_B)",
        "How many independent values a batch's mean is worth. Far under N x H x W: positions or examples are alike. "
        "Under the N examples: batches are sorted or correlated. " + _PASSES,
        "behind another batch norm layer, which makes batches alike, it can exceed the number of values; " + _RUNNING,
        "relative error about 0.8 / sqrt(C) with C channels",
        "Kish 1965, the design effect",
    ),
    "dropout": Quantity(
        "equivalent dropout rate",
        "share",
        "free",
        "p / (1 - p) = noise",
        "The rate of Gaussian dropout that adds as much noise: 4.5% for batches of 32 independent values.",
        "it is as strong as dropout, but not the same noise: all examples of a batch share it.",
        "0 for a layer that uses stored statistics",
        "Srivastava et al. 2014, section 10",
    ),
    "staleness": Quantity(
        "staleness of the mean",
        "standard errors",
        "free",
        "rms over channels of (stored - mean of mu_B) / (sd(mu_B) sqrt(a / (2 - a) + 1 / W)), by steps",
        "About 1: the stored mean differs from the last W batches by noise alone. Above 4 in several looks: it lags "
        "behind, and eval mode normalizes by what no batch has any more.",
        "a step that is too long or too short for the momentum is shown as it is: as lag; a rare large example puts "
        "it above 4 for a look or two; " + _RUNNING,
        "1",
        "a t statistic; the variance of an exponential average",
        good=1.0,
    ),
    "staleness_var": Quantity(
        "staleness of the variance",
        "standard errors",
        "free",
        "as staleness, of the log of the variance",
        "As the staleness of the mean.",
        "variances near 0; where examples of 1 in 1,000 are large, a third of the looks are above 4, for the average "
        "has some of them and the last batches have none: only a variance that is too small shows lag; " + _RUNNING,
        "1",
        "as staleness",
        good=1.0,
    ),
    "gap": Quantity(
        "stored against batch",
        "sd of the eval output",
        "free",
        "rms over values of (train-mode output - eval-mode output) / sd of the eval-mode output",
        "How differently the same values come out in train and in eval mode. sqrt(noise) is the part that batch "
        "noise explains; what is above it is stale or foreign statistics.",
        "batches of fewer than 16 values: eval mode stores unbiased variances and normalizes by them.",
        "sqrt(noise)",
        "from the moments of both, Ioffe and Szegedy 2015, section 3.1",
        good=0.0,
    ),
    "shift": Quantity(
        "shift of what the layer receives",
        "sd per 100 steps",
        "free",
        "100 / steps x sqrt(mean of ((mean' - mean)^2 + (sd' - sd)^2) / sd^2), of stored statistics",
        "How fast the mean and spread of a layer's inputs move while the layers before it learn.",
        "a model that does not learn does not shift; running averages hide what is faster than 1 / momentum steps.",
        "shift_floor",
        "Ioffe and Szegedy 2015, section 2; 2-Wasserstein distance of normal laws",
        good=0.0,
    ),
    "shift_floor": Quantity(
        "noise floor of the shift",
        "sd per 100 steps",
        "free",
        "100 / steps x sqrt(2 a / (2 - a) x (1 - (1 - a)^steps) x noise)",
        "What the shift would be if only the noise of batches moved the running averages.",
        "as noise.",
        "it is one",
        "the variance of a difference of exponential averages",
    ),
    "gamma": Quantity(
        "gamma",
        "median of |gamma|",
        "free",
        "median over channels of |weight|; 1 without a weight",
        "The sd that the layer gives its output in train mode. Near 0: the layer's branch is off.",
        "weight decay on gamma shrinks it whatever the data say.",
        "none: it is read, not estimated",
        "Ioffe and Szegedy 2015, algorithm 1",
    ),
    "beta": Quantity(
        "beta",
        "median over channels",
        "free",
        "median over channels of bias; 0 without a bias",
        "The mean that the layer gives its output in train mode.",
        "a median hides channels of both signs.",
        "none: it is read, not estimated",
        "Ioffe and Szegedy 2015, algorithm 1",
    ),
    "active": Quantity(
        "share active behind a ReLU",
        "share of values",
        "free",
        "mean over channels of Phi(beta / |gamma|)",
        "How much of the output a ReLU would let through; 0.5 at the start.",
        "layers that no ReLU follows, and values that are far from normal.",
        "none: it is computed from gamma and beta",
        "the normal distribution function",
    ),
    "dead": Quantity(
        "dead channels",
        "share of channels",
        "free",
        "variance < eps / 10,000, or |gamma| < 0.01 and Phi(beta / |gamma|) < 0.01",
        "Channels that carry nothing: constant before the layer, or switched off by it.",
        "layers that no ReLU follows, for the second part.",
        "0",
        "counted",
        good=0.0,
    ),
    "drift": Quantity(
        "drift on the probe",
        "sd per 100 steps",
        "probe",
        "100 / steps x sqrt(mean over units of W2(before, after)^2 / sd^2)",
        "How far the distribution of each unit moved on the same examples: distributional internal covariate shift. "
        "A pure shift by one sd is 1.",
        "a model that does not learn does not drift; values are taken in eval mode.",
        "drift_floor, though the same examples are seen both times",
        "Santurkar et al. 2018, section 2; Ioffe and Szegedy 2015, figure 1",
        good=0.0,
    ),
    "drift_floor": Quantity(
        "noise floor of the drift",
        "sd",
        "probe",
        "the drift between two halves of the probe at one time",
        "What so few examples could not tell from no drift, if they were not the same ones.",
        "a pessimistic floor: the drift is paired.",
        "it is one",
        "the drift's own formula",
    ),
    "mean_square": Quantity(
        "mean square of channels",
        "square of the layer's input",
        "probe",
        "mean over channels of (mean over examples and positions)^2",
        "Signal propagation: common-mode part of what a layer receives. Growing with depth: means build up.",
        "its scale is the layer's own; compare with the variance beside it.",
        "variance / values",
        "Brock et al. 2021, signal propagation plots",
    ),
    "channel_var": Quantity(
        "variance of channels",
        "square of the layer's input",
        "probe",
        "mean over channels of the variance over examples and positions",
        "Signal propagation: what is left of the signal at this depth.",
        "as mean_square.",
        "none",
        "Brock et al. 2021, signal propagation plots",
    ),
    "stable_rank": Quantity(
        "stable rank",
        "dimensions",
        "probe",
        "||H||_F^2 / ||H||_2^2 of the layer's inputs, examples x units",
        "How many directions the examples span. Near 1: all examples look alike to the layer (rank collapse).",
        "it is at most the number of examples, and a common mean alone brings it near 1.",
        "1",
        "Daneshmand et al. 2020",
    ),
    "cosine": Quantity(
        "cosine between examples",
        "",
        "probe",
        "mean of the cosines between all pairs of rows of H",
        "Near 1: examples are seen as one. Batch norm keeps it low at any depth.",
        "behind a ReLU values are positive, so even independent examples have a cosine of 1 / pi or more.",
        "1 / sqrt(units) for independent signs",
        "Daneshmand et al. 2020",
    ),
    "orthogonality": Quantity(
        "orthogonality gap",
        "",
        "probe",
        "|| H H^T / ||H||_F^2 - I / n ||_F",
        "0: examples are at right angles. Near 1: they are all the same.",
        "examples of one class should be alike.",
        "about 1 / sqrt(units)",
        "Daneshmand et al. 2021",
    ),
    "loss_train": Quantity(
        "probe's loss in train mode", "", "probe", "loss with batch statistics, dropout off", "Compare with eval mode.",
        "batch statistics of the probe, whose size may differ from the loader's.", "0", "", of="model",
    ),
    "loss_eval": Quantity(
        "probe's loss in eval mode", "", "probe", "loss with stored statistics", "Above train mode's: statistics are "
        "stale, or batches too small.", "examples that the model trains on.", "0", "", of="model",
    ),
    "output_gap": Quantity(
        "train mode against eval mode", "sd of the output", "probe",
        "rms of (train-mode output - eval-mode output) / sd of the eval-mode output, dropout off",
        "How much the model's answers depend on the mode.", "answers of which only the largest counts.",
        "sqrt(noise) of the last layers", "", of="model", good=0.0,
    ),
}  # fmt: skip
