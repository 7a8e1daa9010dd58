"""Record: what was measured while a model trained, kept in a folder that can be read at any time, anywhere.

A log is a folder. ``record.jsonl`` has one JSON object a line and is only ever appended to; arrays lie beside it in
``arrays/``, one safetensors file each time. Every line is written at once, so a killed process loses at most what it
had not measured yet, and a reader takes every line that ends in a newline. A full disk costs lines, never the training.

Kinds of lines, always with ``kind`` first (docs/record.md has the fields):

    start     schema version, layers, versions, schedule; again when a log is continued
    progress  step, seconds, and means of what the user logged, at most once a second
    free      step and, for each quantity, one number a layer, null where it could not be measured; so do
    probe     those that took a pass over a fixed batch, and
    lab       those that were asked for
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
