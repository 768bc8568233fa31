"""Processes that are forked from one server, which has imported PyTorch: each then starts in milliseconds."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
MODULES = ["fistapruner.pruning.run", "fistapruner.training.run", "fistapruner.measure.speed"]
MODULES += ["transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"]
FORKS.set_forkserver_preload(MODULES)
