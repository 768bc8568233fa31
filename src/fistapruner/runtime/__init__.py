"""Files, memory, numerics and devices of the machine; nothing of models."""
