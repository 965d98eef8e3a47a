"""Tensor math: advantages, losses, aggregation. One algorithm a file; the trainer knows none of their names."""
