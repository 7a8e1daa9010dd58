"""Every criterion of the lecture, fixed before its experiment runs: ``criteria.toml`` has them, with their version."""

from batchnorm.experiment.judgement import Criteria

CRITERIA = Criteria.read("lecture")
judge = CRITERIA.judge
