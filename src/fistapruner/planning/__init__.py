"""Predict memory, disk and time of a run before it begins."""
