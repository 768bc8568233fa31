"""The run directory of every verb: identity, lock, log, times and records."""
