"""Running a model layer by layer is what its own forward pass does, or it is refused in one sentence before any
work."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.measure.logits import score_windows
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.passes.store import HiddenStates
from fistapruner.passes.stream import Calls, check_model, run_layer

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {"method": "magnitude", "calibration": {"source": "python", "samples": 2, "seqlen": 16}}
SHORT = {"seqlen": 16, "windows": 2}
BERT = {**tiny.SIZES, **tiny.WIDE, "is_decoder": True}


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    return tiny.store(transformers.AutoModelForCausalLM.from_config(config), folder)


def opened(folder: Path) -> LayerwiseModel:
    """Open a model as every command does before any work."""
    model = tiny.opened(folder)
    discover(model)
    check_model(model)
    return model


def agrees(model: LayerwiseModel, folder: Path) -> None:
    """Compare the log-likelihood of windows layer by layer with that of the model's own forward pass."""
    tokens = tiny.tokens(3, 24)
    with torch.no_grad():
        logits = tiny.loaded(folder)(input_ids=tokens, use_cache=False).logits[:, :-1].transpose(1, 2).double()
    own = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(score_windows(model, tokens)[0], own, rtol=1e-5, atol=0)


def test_vectors_of_three_dimensions(tmp_path: Path) -> None:
    config = transformers.RwkvConfig(vocab_size=128, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32)
    agrees(opened(save(config, tmp_path)), tmp_path)


def test_a_model_that_is_smaller_than_the_window_of_the_check_is_run(tmp_path: Path) -> None:
    """It takes 8 tokens of 10, and no others; RoBERTa states 26 positions and takes 24 tokens."""
    config = transformers.GPT2Config(vocab_size=10, n_positions=8, n_embd=32, n_layer=2, n_head=4)
    model = opened(save(config, tmp_path / "gpt2"))
    with model.embeddings_and_head():
        model.embed(torch.tensor([[0, 9]]))
        for wrong in ([0, 10], [5, 10], [-1, 9]):
            with pytest.raises(FistaPrunerError, match=r"token id (10|-1) is beyond the model's vocabulary of 10"):
                model.embed(torch.tensor([wrong]))
    padded = transformers.RobertaConfig(**{**BERT, "max_position_embeddings": 26, "pad_token_id": 1})
    model = opened(save(padded, tmp_path / "roberta"))
    assert model.max_length == 24
    score_windows(model, torch.randint(3, 128, (1, 24)))


@pytest.mark.parametrize("head", ["other", "equal", "alone"])
def test_a_stored_head_of_a_tied_model_is_that_of_transformers(tmp_path: Path, head: str) -> None:
    """It is the model's own where its values are not the embedding's, whatever the config says."""
    folder = tiny.store_head(tiny.save("llama", tmp_path / "model", tie_word_embeddings=True), head)
    model = opened(folder)
    agrees(model, folder)
    with model.embeddings_and_head():
        shared = model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert shared == (head != "other")
    fp.prune(str(folder), tmp_path / "run", **RECIPE)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run" / "model"))
    assert before.keys() == after.keys()
    for name in before.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        assert torch.equal(before[name], after[name])


def test_the_head_of_another_part_is_not_that_of_a_tied_model(tmp_path: Path) -> None:
    """Such as of a part that predicts several tokens, which transformers does not load."""
    folder = tiny.save("llama", tmp_path, tie_word_embeddings=True)
    with tiny.edited(folder) as tensors:
        tensors["mtp.lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    agrees(opened(folder), folder)


class OddConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "odd"

    def __init__(self, trick: str = "", num_hidden_layers: int = 3, **others: Any) -> None:
        self.trick, self.num_hidden_layers, self.vocab_size, self.hidden_size = trick, num_hidden_layers, 128, 16
        super().__init__(**others)


class OddLayer(torch.nn.Module):
    """A residual layer that may tell the others something on a board."""

    def __init__(self, config: OddConfig, board: list[Tensor]) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.trick, self.board = config.trick, board

    def forward(self, hidden: Tensor, told: Any = None) -> Tensor:
        if told is not None:
            hidden = hidden * (1 + told)
        if self.trick == "layers tell each other something":
            self.board.append(hidden)
            return hidden + self.linear(hidden + self.board[0])
        if self.trick == "layers work in place":
            return hidden.add_(self.linear(hidden))
        if self.trick == "rounds by later tokens":
            hidden = hidden * (1 + 2.5e-6 * hidden[:, -1:].sign())
        return hidden + self.linear(hidden)


TOLD: dict[str, Any] = {
    "tells a tensor of tokens": lambda tokens: (tokens == 0).float().mean(),
    "tells a number of tokens": lambda tokens: float((tokens == 0).float().mean()),
    "tells of some tokens only": lambda tokens: torch.ones(()) if bool((tokens == 0).all()) else None,
}
"""What layers are told of the tokens, by trick."""


class OddModel(transformers.PreTrainedModel):  # type: ignore[misc]
    """A language model that does something beside running its layers one after the other."""

    config_class = OddConfig
    base_model_prefix = "model"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.board: list[Tensor] = []
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList([OddLayer(config, self.board) for _ in range(config.num_hidden_layers)])
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        self.board.clear()
        trick = self.config.trick
        first = hidden = self.embed(input_ids)
        for _ in range(2 if trick == "loops" else 1):
            entered = hidden
            for layer in self.layers:
                arguments = [TOLD[trick](input_ids)] if trick in TOLD else []
                entered, hidden = hidden, layer(entered if trick == "layers in parallel" else hidden, *arguments)
                if trick == "scales between layers":
                    hidden = hidden * 2
                if trick == "scales in place between layers":
                    hidden.mul_(2)
                if trick == "breaks":
                    hidden = hidden.nothing
        if trick == "adds the embedding at the end":
            hidden = hidden + first
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


transformers.AutoConfig.register("odd", OddConfig)
transformers.AutoModelForCausalLM.register(OddConfig, OddModel)


@pytest.mark.parametrize("trick", ["", "layers work in place"])
def test_plain_layers_are_run_as_the_model_runs_them(tmp_path: Path, trick: str) -> None:
    agrees(opened(save(OddConfig(trick), tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("trick", "reason"),
    [
        ("loops", r"layers\.0 runs after layers\.2: layers have to run once each, in order"),
        ("scales between layers", r"what enters layers\.1 is not what layers\.0 returned"),
        ("scales in place between layers", r"what enters layers\.1 is not what layers\.0 returned"),
        ("layers in parallel", r"what enters layers\.1 is not what layers\.0 returned"),
        *((trick, r"decoder layer 0 is given argument 2, which depends on the token ids") for trick in TOLD),
        ("layers tell each other something", "predicts otherwise than in one forward pass"),
        ("adds the embedding at the end", "predicts otherwise than in one forward pass"),
        ("breaks", "cannot be taken apart into decoder layers"),
    ],
)
def test_what_happens_between_layers_is_noticed(tmp_path: Path, trick: str, reason: str) -> None:
    folder = save(OddConfig(trick), tmp_path / "model")
    for work in (lambda: fp.prune(folder, tmp_path / "run", **RECIPE), lambda: fp.evaluate(folder, "python", **SHORT)):
        with pytest.raises(FistaPrunerError, match=rf"^OddModel: .*{reason}.*: this architecture is not supported$"):
            work()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("on_disk", [False, True])
def test_layers_that_work_in_place_leave_the_stored_hidden_states_alone(tmp_path: Path, on_disk: bool) -> None:
    model = opened(save(OddConfig("layers work in place"), tmp_path / "model"))
    values = torch.randn(2, 8, 16)
    inputs, outputs = (
        HiddenStates((2, 8, 16), torch.float32, tmp_path / name if on_disk else None) for name in ("in", "out")
    )
    inputs.write(0, values)
    with model.embeddings_and_head(head=False):
        calls = Calls.of(model, 2, 8, 2)
    with model.layer(0) as layer:
        run_layer(model, 0, inputs, calls, output=outputs)
        wanted = values + layer.linear(values)  # type: ignore[operator]
    assert torch.equal(inputs.read(0, 2), values)
    torch.testing.assert_close(outputs.read(0, 2), wanted)


def test_last_bits_that_depend_on_later_tokens_are_no_bidirectional_attention(tmp_path: Path) -> None:
    """An expert's products may round by the number of its tokens; layer after layer the difference grows."""
    opened(save(OddConfig("rounds by later tokens", num_hidden_layers=12), tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_to_later_tokens_is_refused_where_it_changes_little(tmp_path: Path, dtype: torch.dtype) -> None:
    """Newly made, a layer adds less to the hidden states than bf16 tells from them."""
    folder = save(transformers.BertConfig(**{**BERT, "is_decoder": False}), tmp_path)
    with pytest.raises(FistaPrunerError, match=r"depend on later tokens \(bidirectional attention\)"):
        check_model(tiny.opened(folder, dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_not_dense_are_refused_when_the_model_is_opened(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny.save("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    with tiny.edited(folder) as tensors:
        tensors[name] = tensors[name].to(dtype)
    with pytest.raises(FistaPrunerError, match=rf"{name}' is stored as {str(dtype).removeprefix('torch.')}.*quantised"):
        tiny.opened(folder)


def test_token_ids_beyond_the_vocabulary_are_refused_before_work(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", vocab_size=32)  # the tokenizer knows 128
    for work in (lambda: fp.prune(folder, tmp_path / "run", **RECIPE), lambda: fp.evaluate(folder, "python", **SHORT)):
        with pytest.raises(FistaPrunerError, match=r"token id \d+ is beyond the model's vocabulary of 32"):
            work()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.1.input_layernorm.weight", r"model\.layers\.1\.input_layernorm\.weight contains NaN"),
        ("model.norm.weight", r"model\.norm\.weight contains NaN"),
        ("lm_head.weight", "the predictions are NaN or infinite in float32 passes"),
    ],
)
def test_nan_outside_of_operators_is_one_line(tmp_path: Path, tensor: str, message: str) -> None:
    """The labels that sensitivity is measured with would be drawn from NaN."""
    folder = tiny.save("llama", tmp_path / "model", tie_word_embeddings=False)
    with tiny.edited(folder) as weights:
        weights[tensor].view(-1)[0] = torch.nan
    with pytest.raises(FistaPrunerError, match=message):
        fp.prune(str(folder), tmp_path / "run", calibration={"source": "python", "samples": 2, "seqlen": 16})


@pytest.mark.parametrize("device", ["mps", "vulkan", "meta", "cuda:x", "cuda:01", "cuda:\u0967", None, CPU])
def test_other_devices_are_refused(tmp_path: Path, device: Any) -> None:
    message = re.escape(f"device {device!r}: auto, cpu, cuda or cuda:N is expected")
    with pytest.raises(FistaPrunerError, match=message):
        fp.evaluate(str(tmp_path), "python", device=device)


def test_what_a_block_around_another_holds_stays_loaded(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    model = tiny.opened(folder)
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    with model.embeddings_and_head(head=False):
        for inner in (False, True):
            with model.embeddings_and_head(head=inner):
                assert head.weight.is_meta != inner
            assert not embedding.weight.is_meta
            assert head.weight.is_meta
    assert embedding.weight.is_meta


def test_a_model_without_operators_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    layout = discover(tiny.opened(folder))
    with pytest.raises(FistaPrunerError, match=r"^model\.layers has no operator to prune$"):
        layout.only(()).select(fp.Recipe(ignore=("re:mlp",)))
