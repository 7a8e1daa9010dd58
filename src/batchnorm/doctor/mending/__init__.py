"""The doctor's remedies, applied to a copy of a model or written to a new file."""
