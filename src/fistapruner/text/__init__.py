"""Make calibration windows from texts, data sets, or text that the model generates."""

from .text import adds_bos, read_documents
from .windows import SELF, calibration_length, calibration_tokens, tokens_sha256

__all__ = ["SELF", "adds_bos", "calibration_length", "calibration_tokens", "read_documents", "tokens_sha256"]
