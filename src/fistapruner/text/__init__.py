"""Make token windows from texts, data sets, pairs, or text that the model generates.

* :mod:`.sources` reads documents, :mod:`.tokens` tokenises them; evaluation uses both, too.
* :mod:`.windows` draws the windows of a calibration; :mod:`.generate` lets the model write them.
* :mod:`.examples` reads lines with an answer to learn, by the chat template where they are messages; :mod:`.packing`
  packs them or plain documents into windows, and :mod:`.training` holds documents out and mixes several texts.
* :mod:`.pairs` reads and tokenises preference pairs.

The same source, seed and size are always the same windows.
"""

from .sources import SELF, read_documents
from .tokens import adds_bos, tokens_sha256
from .windows import calibration_length, calibration_tokens

__all__ = ["SELF", "adds_bos", "calibration_length", "calibration_tokens", "read_documents", "tokens_sha256"]
