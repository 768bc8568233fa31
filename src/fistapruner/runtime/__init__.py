"""Files, memory, numbers and devices of the machine; nothing of models."""
