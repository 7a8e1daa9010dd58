"""Pickles read as data: which names they may use, and plain values for what they hold."""
