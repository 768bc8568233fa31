"""Prune one decoder layer: the unit that is journaled, resumed, scheduled, timed and reported."""
