"""Calibration data: texts, the windows of tokens drawn from them, and text the model writes itself."""

from .text import adds_bos, read_documents
from .windows import SELF, calibration_tokens, tokens_sha256

__all__ = ["SELF", "adds_bos", "calibration_tokens", "read_documents", "tokens_sha256"]
