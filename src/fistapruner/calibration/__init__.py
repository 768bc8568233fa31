"""Make calibration windows from texts, data sets, or text that the model generates."""

from .text import adds_bos, read_documents
from .windows import SELF, calibration_tokens, tokens_sha256, window_length

__all__ = ["SELF", "adds_bos", "calibration_tokens", "read_documents", "tokens_sha256", "window_length"]
