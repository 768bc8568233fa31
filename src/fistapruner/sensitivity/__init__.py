"""Measure the dense model and decide sparsities, row weights and channel orders from it."""
