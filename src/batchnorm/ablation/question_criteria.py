"""The criteria by which a user's model is judged, fixed before it is trained; ``criteria.toml`` has their texts.

An arm is a way to train the model, and a run is one arm at one learning rate from one seed. Losses are those of the
training batches, averaged over a few steps. For the two arms that are compared, a rule fixes the levels:

    start  = mean first loss of the arm that starts lower
    end    = lowest mean final loss of both arms over all rates
    target = start - TARGET (start - end),    usable = start - USABLE (start - end)

So the arm that ends lower can always reach the target, and no level is chosen in favour of an arm. Logarithms of
ratios have base 2, so 1 means twice as much.
"""

from batchnorm.experiment.judgement import Criteria

TARGET = 0.8  # steps are counted until the loss has fallen by this share of the better arm's decrease
USABLE = 0.5  # at a usable learning rate the loss falls at least by this share of the better arm's decrease
LEARNED = 0.25  # an arm has learned if in every seed the final loss is below ``start`` by this share of |start|

CRITERIA = Criteria.read("ablation", target=TARGET, usable=USABLE, learned=LEARNED)
judge = CRITERIA.judge
