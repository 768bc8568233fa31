"""What is found out about decoder layers by watching them."""

from pathlib import Path

import pytest
import torch

import tiny
from fistapruner.models.links import find_links
from fistapruner.models.operators import OutputProjection, discover


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_operators_that_add_to_the_hidden_states_are_found(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    folder = tiny.save(architecture, tmp_path, dtype=dtype)
    layout = discover(tiny.opened(folder, dtype))
    assert layout.residual_writers == (tiny.ADDING[architecture],) * len(layout.layers)


def test_what_is_added_to_something_else_is_not(tmp_path: Path) -> None:
    """Bloom may add to the normed hidden states, OPT may norm the sum."""
    bloom = tiny.save("bloom", tmp_path / "bloom", apply_residual_connection_post_layernorm=True)
    opt = tiny.save("opt", tmp_path / "opt", do_layer_norm_before=False)
    for folder in (bloom, opt):
        assert set(discover(tiny.opened(folder)).residual_writers) == {()}


@pytest.mark.parametrize(
    ("architecture", "endings"),
    [
        (
            "llama",
            {"self_attn": OutputProjection("self_attn.o_proj", 1), "mlp": OutputProjection("mlp.down_proj", None)},
        ),
        ("opt", {"self_attn": OutputProjection("self_attn.out_proj", 1)}),  # its MLP is no module
        ("gpt2", {"attn": OutputProjection("attn.c_proj", 1), "mlp": OutputProjection("mlp.c_proj", None)}),
        ("bloom", {}),  # both add to the hidden states themselves
    ],
)
def test_operators_that_modules_end_with_are_found(
    tmp_path: Path, architecture: str, endings: dict[str, OutputProjection]
) -> None:
    folder = tiny.save(architecture, tmp_path)
    layout = discover(tiny.opened(folder))
    assert layout.output_projections == (endings,) * len(layout.layers)


def test_a_model_of_fewer_positions_than_a_small_window_is_watched(tmp_path: Path) -> None:
    short, long = (tiny.opened(tiny.save("gpt2", tmp_path / str(n), n_positions=n)) for n in (8, 128))
    assert discover(short) == discover(long)
    assert find_links(short, discover(short)) == find_links(long, discover(long))


def test_linear_modules_that_are_read_but_not_called_stay_dense(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj itself. Modules that are neither called nor read are refused."""
    from transformers import MambaConfig, MambaForCausalLM

    tiny.need_transformers("5.16")  # 5.13 calls it
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8)
    tiny.spread(MambaForCausalLM(config)).save_pretrained(tmp_path)
    layout = discover(tiny.opened(tmp_path))
    names = [operator.name for group in layout.layers[0] for operator in group]
    assert names == ["mixer.in_proj", "mixer.x_proj", "mixer.out_proj"]
