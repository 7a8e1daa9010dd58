"""What the doctor mends, in a copy of a model or in a new file."""
