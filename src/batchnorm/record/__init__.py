"""Record: the log of measurements during a training, in a folder that can be read at any time.

The file ``record.jsonl`` of the folder has one JSON object per line, and lines are only appended. Arrays are in the
subfolder ``arrays/``, one safetensors file for each probe. Each line is written immediately, so a killed process loses
no line, and a reader can read every line that ends in a newline. If the disk is full, lines are lost, but the training
continues.

Kinds of lines; the first key is always ``kind`` (docs/record.md lists the fields):

    start     schema version, layers, versions, schedule; written again when a log is continued
    progress  step, seconds, cost, and means of the numbers that the user logged, at most once a second
    free      step and, for each quantity, one number or null per layer, computed from the running averages
    probe     as ``free``, measured by a pass over a fixed batch
    lab       as ``free``, measured on demand
    arrays    step and the name of the file with the arrays
    event     step, layer, message, and the code of a rule of the doctor if there is one
    end       step, cost, and the reason for the end

``merge_logs`` merges the logs of replicas. This package does not import torch.
"""

from batchnorm.record.log_entry import Record
from batchnorm.record.log_merging import MergedLogs, merge_logs
from batchnorm.record.log_reading import Log
from batchnorm.record.log_writing import SCHEMA_VERSION, Writer
from batchnorm.record.quantities import QUANTITIES, Quantity

__all__ = ["QUANTITIES", "SCHEMA_VERSION", "Log", "MergedLogs", "Quantity", "Record", "Writer", "merge_logs"]
