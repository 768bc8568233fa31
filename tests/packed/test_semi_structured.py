"""Which operators go to sparse tensor cores."""

import pytest
import torch
from torch import nn

from fistapruner import NM, FistaPrunerError, to_semi_structured


def test_a_2_4_operator_that_is_not_on_a_gpu_is_refused() -> None:
    network = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).bfloat16()
    assert to_semi_structured(network) == {}  # nothing is 2:4
    network[1].weight.data *= NM(2, 4).project(network[1].weight.data.float().abs())
    with pytest.raises(FistaPrunerError, match=r"1 is on cpu: .*fistapruner\.load"):
        to_semi_structured(network)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with sparse tensor cores")
@pytest.mark.parametrize("tokens", [1, 2048])
def test_a_converted_model_computes_the_same(tokens: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 4096)).half().cuda()
    network[0].weight.data *= NM(2, 4).project(network[0].weight.data.float().abs())
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.half)
    with torch.inference_mode():
        expected = network(x)
        (said,) = to_semi_structured(network, tokens=tokens).values()
        assert said.endswith(f"times as fast at {tokens} tokens")
        torch.testing.assert_close(network(x), expected, rtol=1e-2, atol=1e-1)
