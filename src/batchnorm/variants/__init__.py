"""Variants of batch norm: batch renorm and ghost batches in train mode, an example's own weight in eval mode."""
