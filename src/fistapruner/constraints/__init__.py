"""Sparsity patterns and the exact projections onto them; nothing of models."""
