"""Distribute the decoder layers over this process, worker processes or a cluster."""
