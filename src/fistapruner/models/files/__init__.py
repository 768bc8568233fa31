"""Checkpoint files: safetensors, GGUF and legacy pickles; reading and writing them."""
