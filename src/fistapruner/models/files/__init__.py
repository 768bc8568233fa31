"""Read and write checkpoint files: safetensors, GGUF and legacy pickles."""
