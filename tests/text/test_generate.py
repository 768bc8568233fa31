"""Text that the model writes: its own distribution, the seed, what is kept when it is interrupted."""

import pytest
import torch
from test_windows import letters_tokenizer, tiny_model

from fistapruner import FistaPrunerError
from fistapruner.settings.prune import Calibration
from fistapruner.text import calibration_tokens
from fistapruner.text.generate import generate_tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_are_the_models_own(kind: str) -> None:
    model, tokenizer = tiny_model(kind), letters_tokenizer()
    tokens = generate_tokens(model, tokenizer, 5, 40, seed=1)
    assert tokens.shape == (5, 40)
    assert torch.equal(tokens, generate_tokens(model, tokenizer, 5, 40, seed=1))
    assert not torch.equal(tokens, generate_tokens(model, tokenizer, 5, 40, seed=2))
    # <unk> and <s> are never drawn, nor the columns beyond the tokenizer's 30 tokens; </s> may end a text.
    assert set(tokens.unique().tolist()) <= set(range(2, 30))
    assert (generate_tokens(model, letters_tokenizer(bos=True), 5, 8)[:, 0] == 1).all()


def test_a_text_that_begins_with_the_end_of_text_token_goes_on() -> None:
    """As in OPT, whose tokenizer begins a text with its end-of-text token."""
    tokens = generate_tokens(tiny_model(), letters_tokenizer(bos=True, eos="<s>"), 40, 40)
    assert (tokens[:, 0] == 1).all()
    assert 0.85 < (tokens > 2).float().mean() < 0.98  # the model draws all of its tokens about equally often
    # A text that ended is followed by the first token of the next, which ends nothing.
    assert ((tokens[:, 1:-2] == 1) & (tokens[:, 2:-1] == 1) & (tokens[:, 3:] != 1)).any()


def test_draws_follow_the_whole_past_at_temperature_1() -> None:
    """Of texts with the same past, next tokens are as frequent as one pass over the text says they are likely."""
    model = tiny_model()
    tokens = generate_tokens(model, letters_tokenizer(bos=True), 3000, 3)
    most = int(torch.bincount(tokens[:, 1]).argmax())
    for past, drawn in ((torch.tensor([[1]]), tokens), (torch.tensor([[1, most]]), tokens[tokens[:, 1] == most])):
        with torch.no_grad():
            logits = model(input_ids=past).logits[0, -1]
        logits[[0, 1, *range(30, len(logits))]] = -torch.inf  # special tokens, and columns beyond the tokenizer's
        counts = torch.bincount(drawn[:, past.shape[1]], minlength=len(logits)) / len(drawn)
        assert float((counts - logits.softmax(-1)).abs().max()) < 4 / len(drawn) ** 0.5


def test_windows_longer_than_a_text_pack_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.text.generate.TEXT_LENGTH", 16)
    tokens = generate_tokens(tiny_model(), letters_tokenizer(bos=True), 3, 39)
    assert tokens.shape == (3, 39)
    assert (tokens[:, [0, 13, 26]] == 1).all()


def test_a_broken_model_is_named() -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FistaPrunerError, match="LlamaForCausalLM cannot generate text: its logits are NaN"):
        generate_tokens(model, letters_tokenizer(), 2, 8)
    with pytest.raises(FistaPrunerError, match="GPT2LMHeadModel cannot generate text"):
        generate_tokens(tiny_model("gpt2"), letters_tokenizer(), 2, 300)


def test_generation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.text.generate.BATCH", {"cpu": (1, 2**30)})
    said: list[str] = []
    calibration_tokens(Calibration(source="self", samples=3), letters_tokenizer(), 32, tiny_model, said.append)
    assert len(said) == 3
    assert said[-1].startswith("generating text: 2.0 of 3 windows, about ")
