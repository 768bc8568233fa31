"""Make token windows from texts, data sets, pairs, or text that the model generates.

* :mod:`.sources` reads documents and tokenises them; evaluation uses it, too.
* :mod:`.windows` draws the windows of a calibration; :mod:`.generate` lets the model write them.
* :mod:`.chat` reads lines with an answer to learn, by the chat template where they are messages.
* :mod:`.training` packs documents or examples into windows, holds documents out, and mixes several texts.
* :mod:`.pairs` reads and tokenises preference pairs.

The same source, seed and size are always the same windows. A fault in a file is named with its line.
"""

from .sources import SELF, tokens_sha256
from .windows import calibration_length, calibration_tokens

__all__ = ["SELF", "calibration_length", "calibration_tokens", "tokens_sha256"]
