"""Readers of the checkpoint formats, which are recognized by their bytes."""
