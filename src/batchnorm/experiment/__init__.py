"""What every experiment shares: criteria fixed beforehand, paired seeds, verdicts with their figures, chart data.

``lecture`` and ``ablation`` run experiments; they bring arms, criteria and words. An experiment fills a ``Result``
(``claim``), one rule judges every criterion (``judgement``), and ``outcomes`` holds what a page or a terminal shows.
"""
