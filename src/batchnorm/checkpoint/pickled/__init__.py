"""Pickles read as data: the names that they may use, and plain values in place of their objects."""
