"""Make the tokenizer of a GGUF file split text as the file says, and save it so that it stays so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import FistaPrunerError
from ...runtime.files import write_json_atomic
from .folder_files import read_json_in

SPLIT = "tokenizer.ggml.pre"
"""Key whose value names how a vocabulary of byte-level BPE splits text."""

FIRST_SPACE = "tokenizer.ggml.add_space_prefix"
"""Key whose value says whether a vocabulary of SentencePiece has a space put before a text."""

SPLIT_AS_GPT2 = frozenset(
    ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling")
)
"""Values of ``tokenizer.ggml.pre`` of vocabularies that split text as GPT-2 does; so do most files without the key."""

SPLIT_DIGITS = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"))
"""Those of vocabularies that split text as GPT-2 does, after every digit is split off."""

SPLIT_AS_QWEN2 = frozenset(("qwen2", "stablelm2", "hunyuan"))

SPLIT_AS_BLOOM = frozenset(("bloom", "gpt3-finnish", "poro-chat"))
BLOOM_SPLIT = r" ?[^(\s|.,!?…。，、।۔،)]+"

WHOLE_WITH_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken")
)
"""Those of vocabularies whose whole words need no merges; texts begin with BOS unless the file says otherwise."""

COMPOSED = ("Qwen2Tokenizer", "GPTNeoXTokenizer")
"""Classes of ``transformers`` of families whose text is composed (NFC) first, which no key of a file says."""


def restore_tokenizer(path: Path, reader: Any, tokenizer: Any) -> None:
    """Make a tokenizer that ``transformers`` read from a GGUF file split text as the file says.

    Raises:
        FistaPrunerError: how it splits text is not known, or the tokenizer cannot take it.
    """
    _restore_split(path, reader, tokenizer)
    _restore_first_space(path, reader, tokenizer)


def save_tokenizer(path: Path, tokenizer: Any, out: Path) -> None:
    """Save a tokenizer so that it is loaded as it is.

    Classes of tokenizers of one family rebuild all but the vocabulary, whatever the folder says; the general one,
    by the name that transformers 4 knows too, does not.

    Raises:
        FistaPrunerError: ``transformers`` loads another one: it takes the family's class all the same.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(out)
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": tokenizer.padding_side}
    write_json_atomic(out / "tokenizer_config.json", read_json_in(out, "tokenizer_config.json") | kept)
    found = _steps(loaded := AutoTokenizer.from_pretrained(str(out)))
    for step, wanted in _steps(tokenizer).items():
        if found[step] != wanted:
            raise FistaPrunerError(
                f"{path} has a vocabulary with another {step} than {type(loaded).__name__}, which transformers takes "
                "for this architecture: take the model's Hugging Face checkpoint"
            )


def _restore_split(path: Path, reader: Any, tokenizer: Any) -> None:
    """Split text before byte-level BPE as the file names it; restore what else goes with that name.

    ``transformers`` knows some of llama.cpp's names, and takes GPT-2's split for all others.

    Raises:
        FistaPrunerError: neither it nor this function knows the name.
    """
    from tokenizers import Regex
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    fields = {key: reader.fields[key].contents() for key in ("tokenizer.ggml.model", SPLIT) if key in reader.fields}
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return
    if (family := type(tokenizer).__name__) in COMPOSED:
        tokenizer.backend_tokenizer.normalizer = NFC()
    name = fields.get(SPLIT, "qwen2" if family == "Qwen2Tokenizer" else "gpt-2")
    if name in WHOLE_WITH_BOS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in reader.fields:
            tokenizer.add_bos_token = True
    if name in SPLIT_AS_GPT2:
        return
    regex = ByteLevel(add_prefix_space=False, use_regex=True)
    if name in SPLIT_DIGITS:
        steps = [Digits(individual_digits=True), regex]
    elif name == "falcon":
        triples = Split(Regex("[0-9][0-9][0-9]"), "isolated")
        steps = [Punctuation("contiguous"), regex, Digits(individual_digits=False), triples]
    elif name in SPLIT_AS_QWEN2 or name in SPLIT_AS_BLOOM:
        pattern = PRETOKENIZE_REGEX if name in SPLIT_AS_QWEN2 else BLOOM_SPLIT
        steps = [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        try:
            from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
        except ImportError:  # an earlier transformers, which tells the split by the architecture
            return
        if name in GGUF_PRE_TOKENIZER_SPLITS:
            return
        raise FistaPrunerError(
            f"{path} splits text by {name!r} ({SPLIT}), which transformers does not know: take the model's Hugging "
            "Face checkpoint"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def _restore_first_space(path: Path, reader: Any, tokenizer: Any) -> None:
    """Put no space before a text where the file of a SentencePiece vocabulary says so.

    Raises:
        FistaPrunerError: the tokenizer puts one there in an unknown way.
    """
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
    from tokenizers.pre_tokenizers import Metaspace

    fields = {
        key: reader.fields[key].contents() for key in ("tokenizer.ggml.model", FIRST_SPACE) if key in reader.fields
    }
    if fields != {"tokenizer.ggml.model": "llama", FIRST_SPACE: False}:
        return
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, Metaspace):
        backend.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
        backend.decoder = Sequence([Replace("\u2581", " "), ByteFallback(), Fuse()])
    elif "Prepend" in json.dumps(_steps(tokenizer)["normalizer"]):
        raise FistaPrunerError(
            f"{path} puts no space before a text ({FIRST_SPACE}), where transformers does: take the model's Hugging "
            "Face checkpoint"
        )


def _steps(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer does beside looking up its vocabulary."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    found = {step: state[step] for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    return found | {key: state["model"].get(key) for key in ("byte_fallback", "ignore_merges")}
