"""Losses, log-probabilities and tokens of pairs against TRL itself, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: test_pair_objective.py has its numbers")

from test_objective import opened
from test_pair_objective import BETA, STORE, TRL_PAIRS, make_pairs, nothing
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from fistapruner.tuning.pair_objective import LIKELIHOOD, AnswerObjective, PairObjective, Preference
from fistapruner.tuning.preference import margins_of
from fistapruner.tuning.references import answer_log_probabilities


def trainer_of(policy: Path, reference: Path, folder: Path) -> Any:
    """TRL's trainer with its batch of all pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(TRL_PAIRS),
        beta=BETA,
        max_length=96,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    names = ("prompt", "chosen", "rejected")
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (policy, reference)]
    return DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=settings,
        train_dataset=Dataset.from_list([dict(zip(names, pair, strict=True)) for pair in TRL_PAIRS]),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )


def test_tokens_losses_and_rewards_are_those_of_trl(tmp_path: Path) -> None:
    policy = tiny.save("llama", tmp_path / "policy", num_hidden_layers=2, seed=0)
    reference = tiny.save("llama", tmp_path / "reference", num_hidden_layers=2, seed=1)
    pairs = make_pairs(tmp_path, TRL_PAIRS)
    trainer = trainer_of(policy, reference, tmp_path)
    for number, row in enumerate(trainer.train_dataset):
        for place, answer in enumerate(("chosen_ids", "rejected_ids"), 2 * number):
            length = int(pairs.lengths[place])
            assert pairs.tokens[place, :length].tolist() == row["prompt_ids"] + row[answer]
    trainer.model.eval()
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    logged = json.loads(json.dumps({name: values[-1] for name, values in trainer._metrics["eval"].items()}))

    windows = list(range(2 * len(TRL_PAIRS)))
    own, theirs = (
        answer_log_probabilities(AnswerObjective(opened(folder), pairs, LIKELIHOOD, None, 4, STORE), windows, nothing)[
            0
        ]
        for folder in (policy, reference)
    )
    preference = Preference(margins_of(theirs)[None], torch.ones(1, len(TRL_PAIRS)).double(), BETA)
    objective = PairObjective(opened(policy), pairs, LIKELIHOOD, None, 4, STORE, preference=preference)
    assert float(objective.losses(windows, nothing)[0].sum()) / len(TRL_PAIRS) == pytest.approx(loss, abs=1e-6)
    rewards = BETA * (own - theirs)
    assert rewards.mean(0).tolist() == pytest.approx([logged["rewards/chosen"], logged["rewards/rejected"]], abs=1e-5)
    assert own.mean(0).tolist() == pytest.approx([logged["logps/chosen"], logged["logps/rejected"]], abs=1e-4)
