"""Make preference pairs of a multiple-choice task: the right choice is chosen, another one is rejected.

The task is a file as `fistapruner evaluate --tasks-dir` reads it, with query, choices and gold. Prompts are worded as
that evaluation words them, so a model that is aligned on the pairs has seen the task: it is no zero-shot task for it.

    python benchmarks/preference_pairs.py piqa.jsonl pairs.jsonl
    fistapruner align runs/first --data pairs.jsonl --out runs/aligned
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def pair_of(item: dict[str, Any]) -> dict[str, str]:
    """Return the pair of an item: the gold choice, and the first of the others."""
    query = str(item["query"]).strip()
    prompt = f"{query}\nAnswer:" if "Question:" in query else query
    right = item["choices"][item["gold"]]
    wrong = next(choice for number, choice in enumerate(item["choices"]) if number != item["gold"])
    return {"prompt": prompt, "chosen": f" {right.strip()}", "rejected": f" {wrong.strip()}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="a .jsonl file with query, choices and gold")
    parser.add_argument("pairs", type=Path, help="the .jsonl file that is written")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first N items")
    arguments = parser.parse_args()
    items = [json.loads(line) for line in arguments.task.read_text("utf-8").split("\n") if line.strip()]
    pairs = [pair_of(item) for item in items[: arguments.limit]]
    different = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    arguments.pairs.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in different), "utf-8")
    print(f"{len(different)} pairs, {len(pairs) - len(different)} left out since both answers are equal")


if __name__ == "__main__":
    main()
