"""``python -m batchnorm`` runs the command line."""

from batchnorm.cli import main

main(prog_name="batchnorm")
