"""The criteria of the lecture, fixed before the experiments ran; ``criteria.toml`` has their texts and version."""

from batchnorm.experiment.judgement import Criteria

CRITERIA = Criteria.read("lecture")
judge = CRITERIA.judge
