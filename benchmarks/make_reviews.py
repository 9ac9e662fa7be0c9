"""Write synthetic reviews for the tasks deepen_reviews_{drugs,yelp,apps}: made-up sentences, no data of anyone.

python benchmarks/make_reviews.py FOLDER [--count 300]
LM_EVAL_DEEPEN_DATA=FOLDER lm-eval-deepen leaderboard mllm_gpt2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lm_eval_deepen.leaderboard.miniature import synthetic_reviews

KINDS, SPLITS = ("drugs", "yelp", "apps"), ("dev", "test")


def main(arguments: list[str] | None = None) -> int:
    """Write the files; return how many reviews there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300, help="of every kind and split (default: %(default)s)")
    args = parser.parse_args(arguments)
    total = 0
    for kind in KINDS:
        for split in SPLITS:
            path = args.folder / "reviews" / kind / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = synthetic_reviews(kind, split, args.count)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            total += len(rows)
    print(f"{total} synthetic reviews in {args.folder / 'reviews'}")
    return total


if __name__ == "__main__":
    main()
