"""Every criterion by which a user's model is judged, fixed before it runs: ``criteria.toml`` has them.

An arm is a way to train the model, and a run one arm at one learning rate from one seed. With the loss of the step's
own batch averaged over a few steps, three levels are fixed by a rule before anything is trained:

    start  = mean first loss of the arm that starts lower, of the two that are compared
    end    = lowest mean final loss of these two arms over all rates
    target = start - TARGET (start - end),    usable = start - USABLE (start - end)

so the arm that ends lower always has a target it can reach, and no arm is held to a level chosen in its favour. Log
ratios are base 2 (1 = twice).
"""

from batchnorm.experiment.judgement import Criteria

TARGET = 0.8  # share of the better arm's decrease of the loss at which steps are counted
USABLE = 0.5  # share of it that a run at a usable learning rate reaches
LEARNED = 0.25  # an arm has learned when its loss ends this share of the start below the start, in every seed

CRITERIA = Criteria.read("ablation", target=TARGET, usable=USABLE, learned=LEARNED)
judge = CRITERIA.judge
