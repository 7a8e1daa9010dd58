"""Folding: batch norm in eval mode becomes part of the weights of neighbouring layers; unfolding undoes it."""
