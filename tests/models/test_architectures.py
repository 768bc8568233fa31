"""A sample of the architectures of the installed transformers; ``benchmarks/architectures.py`` goes through all of
them."""

import re
import sys
from pathlib import Path

import pytest

import tiny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import architectures

OUTCOMES = {
    "llama": "works",
    "gpt2": "works",
    "openai-gpt": "works",  # its layers return lists
    "modernbert-decoder": "works",  # its head is called decoder
    "git": "works",  # its vision tower is as large as its text model
    "bert": "works",  # two tied biases, of which one is stored
    "mamba": "works",
    "mamba2": "works",
    "olmo_hybrid": "works",  # transformers joins three convolutions to one
    "jamba": "works",  # attention, recurrences and experts
    "recurrent_gemma": "works",  # its gates have three dimensions
    "bart": r"refused: .*encoder_attn\.k_proj ran 0 times in one forward pass \(cross-attention\), and not once",
    "bert, bidirectional": "refused",  # later tokens are read, as in the next one
    "gemma3_text, bidirectional": "refused",
    "dory": r"refused: .*layers\.0 runs after model\.layers\.3: layers have to run once each, in order",
    "mixtral": "works",
    "llama4_text": r"refused: .*layers\.0\.feed_forward\.experts\.gate_up_proj is a fused mixture of experts",
    "dbrx": "refused",  # its experts are stacked in tensors of two dimensions
    "gemma4_text": "works",
    "gemma4_text, per-layer inputs": r"refused: .*predicts otherwise than in one forward pass",
    "reformer": "refused",
    "xlm": r"refused: .*what enters transformer\.ffns\.1 is not what transformer\.ffns\.0 returned",
    "xlnet": r"refused: .*transformer\.layer\.0 is given \(16, 1, 32\) and not \(1, 16, 32\) hidden",
    "gemma4_unified_text, shared K/V": "refused",  # later layers read what earlier ones left of the last batch
    "gemma4_unified_text, shared K/V, own order": "refused",  # a layer does not run without an earlier one
    "glm_moe_dsa, shared indexers": "refused",
    "mistral3": "works",  # images and text, as the next ones
    "qwen3_vl": "works",
    "smolvlm": "works",
    "qwen3_vl_moe": "works",
    "pi0": "refused",  # it moves a robot
    "youtu": "works",  # transformers loads it with another embedding of the padding token than is stored
}


@pytest.mark.parametrize("model_type", OUTCOMES)
def test_it_works_exactly_or_is_refused_in_a_sentence(tmp_path: Path, model_type: str) -> None:
    if architectures.VARIANTS.get(model_type, (model_type,))[0] not in architectures.TYPES:
        pytest.skip(f"the installed transformers has no {model_type}")
    if model_type == "dbrx":
        tiny.need_transformers("5.24")  # 5.16 takes no pad_token_id in its config
    found = architectures.try_architecture(model_type, tmp_path)
    assert re.match(OUTCOMES[model_type], f"{found.outcome}: {found.reason}"), found
