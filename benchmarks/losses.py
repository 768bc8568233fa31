"""Align one pruned model with every loss of ``fistapruner align`` on the same pairs, and tabulate the results.

    python benchmarks/losses.py RUN PAIRS OUT --seeds 0,1,2 --steps 18 --evaluate-windows 10

Further flags are those of ``align`` and hold for every row. Each row is a run of its own in OUT/LOSS-SEED, so the same
command goes on where it was stopped. Finished checkpoints stay; they are as large as the model.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

LOSSES = {
    "distillation": "--loss none --set anchor=1",
    "sft": "--loss sft",
    "dpo-pruned": "--loss dpo --set references=pruned",
    "dpo-dense": "--loss dpo --set references=dense",
    "multi-dpo": "--loss multi-dpo",
    "harmonic": "--loss harmonic --set clip=0.1",
    "harmonic-not-clipped": "--loss harmonic --set clip=none",
    "harmonic-per-pair": "--loss harmonic --set weights=per-pair",
    "geometric": "--loss geometric --set weights=held-out",
}


def row(name: str, report: dict) -> str:
    """Write a row of the table: preferences and rewards on the test pairs, divergence and perplexity on the text."""
    found, text = report["alignment"], (report["evaluations"] or [{}])[-1]
    aligned, before = found["test"]["aligned"], found["test"]["pruned"]
    values = [
        f"{100 * aligned['accuracy']:.1f} ± {100 * aligned['accuracy_error']:.1f}",
        "–" if before["p_value"] is None else f"{before['p_value']:.3f}",
        f"{100 * aligned['normalised']:.1f}",
        f"{100 * found['reward_accuracy']:.1f}",
        f"{found['chosen_reward']:.3f}",
        f"{text['divergence']['kl']:.3f}" if text.get("divergence") else "–",
        f"{text['perplexity']['perplexity']:.2f}" if text.get("perplexity") else "–",
    ]
    return f"| {name} | {' | '.join(values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run")
    parser.add_argument("pairs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--losses", default=",".join(LOSSES))
    arguments, more = parser.parse_known_args()
    print(
        "| loss | preference accuracy, % | McNemar, p | by token, % | reward accuracy, % | chosen reward | KL | ppl |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for seed in arguments.seeds.split(","):
        for loss in arguments.losses.split(","):
            command = [sys.executable, "-m", "fistapruner", "align", arguments.run, "--data", arguments.pairs, "--json"]
            command += ["--out", str(arguments.out / f"{loss}-{seed}"), "--seed", seed, *LOSSES[loss].split(), *more]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(row(f"{loss}, seed {seed}", json.loads(done.stdout)), flush=True)


if __name__ == "__main__":
    main()
