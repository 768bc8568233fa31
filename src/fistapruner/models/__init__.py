"""Checkpoints and architectures: everything that knows what a model looks like, on disk and in memory."""
