"""Engines: what computes the partial statistics of all pieces, on one machine or on several."""
