"""Sparsity that pays: a packed checkpoint format, and operators that run without their zeros."""
