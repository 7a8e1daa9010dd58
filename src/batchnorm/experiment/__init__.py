"""What all experiments share: criteria fixed beforehand, paired seeds, verdicts with their figures, chart data.

The packages ``lecture`` and ``ablation`` define experiments: the networks to compare ("arms"), criteria and texts. An
experiment returns a ``Result`` (``claim``), one rule judges every criterion (``judgement``), and ``outcomes`` collects
what a page or a terminal shows.
"""
