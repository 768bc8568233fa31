"""Numbers from logits, against their definitions."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fistapruner.measure.data import Windows
from fistapruner.measure.logits import divergence_of, perplexity_of, sum_over_tokens, token_figures
from fistapruner.runtime.numerics import Budgets, slices


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(2, 50), st.floats(0.1, 30))
def test_divergence_is_what_its_definition_says(seed: int, tokens: int, vocabulary: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(tokens, vocabulary, generator=generator) * spread
    q = torch.randn(tokens, vocabulary, generator=generator) * spread
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    nll, reference_nll, kl, agree = token_figures(targets, p, q)
    torch.testing.assert_close(nll.double(), -log_p.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reference_nll.double(), -log_q.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl.double(), (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-3, atol=1e-3)
    assert agree.tolist() == (p.argmax(-1) == q.argmax(-1)).float().tolist()
    torch.testing.assert_close(
        token_figures(targets, p)[0],
        torch.nn.functional.cross_entropy(p, targets, reduction="none"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_reduced_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = ((torch.randn(20, 300, generator=generator) * 5).to(dtype) for _ in range(2))
    targets = torch.randint(300, (20,), generator=generator)
    assert torch.equal(token_figures(targets, p)[0], token_figures(targets, p.float())[0])
    for narrow, wide in zip(token_figures(targets, p, q), token_figures(targets, p.float(), q.float()), strict=True):
        assert torch.equal(narrow, wide)


def test_rounding_makes_no_divergence_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 500, generator=generator) * 5
    near = logits + 1e-6 * torch.randn(200, 500, generator=generator)
    assert float(token_figures(torch.zeros(200, dtype=torch.int64), near, logits)[2].min()) >= 0


def test_impossible_tokens_add_nothing() -> None:
    q = torch.tensor([[0.0, 1.0, -math.inf]])
    p = torch.tensor([[0.5, 0.2, -math.inf]])
    short = token_figures(torch.tensor([0]), p[:, :2], q[:, :2])
    full = token_figures(torch.tensor([0]), p, q)
    for a, b in zip(full, short, strict=True):
        torch.testing.assert_close(a, b)


@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 500))
def test_slices_cover_everything_once_within_the_budget(count: int, row: int, budget: int) -> None:
    parts = slices(count, row, budget)
    assert [index for start, stop in parts for index in range(start, stop)] == list(range(count))
    assert all((stop - start) * row <= max(budget, row) for start, stop in parts)


def test_slicing_does_not_change_the_sums() -> None:
    weight, other = torch.randn(40, 8), torch.randn(40, 8)
    hidden, targets = torch.randn(33, 8), torch.randint(40, (33,))

    heads = [lambda x: x @ weight.T, lambda x: x @ other.T]

    def both(budgets: Budgets) -> list[float]:
        alone = sum_over_tokens([hidden], targets, heads[:1], 40, budgets).tolist()
        return alone + sum_over_tokens([hidden, hidden], targets, heads, 40, budgets).tolist()

    sums = torch.stack(token_figures(targets, hidden @ weight.T, hidden @ other.T)).double().sum(1).tolist()
    assert both(Budgets()) == pytest.approx((sums[0], *sums), rel=1e-12)
    assert both(Budgets(head=4 * 40 * 5, rows=4 * 40 * 2)) == pytest.approx((sums[0], *sums), rel=1e-5)


def test_records_hold_means_over_tokens_and_errors_over_windows() -> None:
    """Against the standard library; perplexity is exp of a mean, so its error is that of the mean times itself."""
    generator, length = torch.Generator().manual_seed(0), 5
    nll, reference, kl, agree = (torch.rand(7, generator=generator, dtype=torch.float64) * length for _ in range(4))
    text = Windows(torch.zeros(7, 6), "text.txt", "file", "none")
    single = perplexity_of(nll, text, torch.float32)
    found = divergence_of(torch.stack([nll, reference, kl, agree]), length)

    def expected(sums: torch.Tensor) -> list[float]:
        means = [value / length for value in sums.tolist()]
        return [statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))]

    mean, error = expected(nll)
    assert [single.nll, single.nll_standard_error] == pytest.approx([mean, error])
    assert [single.perplexity, single.standard_error] == pytest.approx([math.exp(mean), math.exp(mean) * error])
    assert (single.windows, single.tokens) == (7, 35)
    assert [found.kl, found.kl_standard_error] == pytest.approx(expected(kl))
    assert [found.top1_agreement, found.top1_standard_error] == pytest.approx(expected(agree))
    difference = [found.nll_difference, found.nll_difference_standard_error]
    assert difference == pytest.approx(expected(nll - reference))
    assert perplexity_of(nll + 1000 * length, text, torch.float32).perplexity == math.inf
