"""Use the machine: files, memory, numerics and devices; independent of models."""
