"""Make token windows from texts, data sets, pairs, or text that the model generates.

* :mod:`.sources` reads documents and tokenises them; evaluation uses it, too.
* :mod:`.windows` draws the windows of a calibration; :mod:`.generate` lets the model write them.
* :mod:`.examples` reads lines with an answer to learn, and pairs of answers; of messages by the chat template.
* :mod:`.training` packs documents, examples or pairs into windows, holds some out, and mixes several texts.

The same source, seed and size are always the same windows. A fault in a file is named with its line.
"""

from .sources import SELF, tokens_sha256
from .windows import calibration_length, calibration_tokens

__all__ = ["SELF", "calibration_length", "calibration_tokens", "tokens_sha256"]
