"""Folding: what batch norm computes in eval mode becomes part of the layers next to it, and comes back."""
