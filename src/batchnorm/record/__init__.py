"""Record: what was measured while a model trained, kept in a folder that can be read at any time, anywhere.

A log is a folder. ``record.jsonl`` has one JSON object a line, and lines are only appended. Arrays are files beside it
in ``arrays/``, one safetensors file for each look. Each line is written at once, so a killed process loses only what it
had not yet measured, and a reader takes every line that ends in a newline. A full disk costs lines, never the training.

Kinds of lines, always with ``kind`` first (docs/record.md has the fields):

    start     schema version, layers, versions, schedule; again when a log is continued
    progress  step, seconds, and means of what the user logged, at most once a second
    free      step and, for each quantity, one number a layer, or null: read from the running averages
    probe     the same, measured by a pass over a fixed batch
    lab       the same, measured on demand
    arrays    step and the file that has them
    event     step, words, and the code of a rule of the doctor if there is one
    end       step and how it ended

Nothing here imports torch.
"""

from batchnorm.record.log_entry import Record
from batchnorm.record.log_reading import Log
from batchnorm.record.log_writing import SCHEMA_VERSION, Writer
from batchnorm.record.quantities import QUANTITIES, Quantity

__all__ = ["QUANTITIES", "SCHEMA_VERSION", "Log", "Quantity", "Record", "Writer"]
