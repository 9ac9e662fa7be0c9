"""Are scores and texts on a device those of `hf`, and those of the CPU? A line per precision, and one JSON line last.

    python benchmarks/gpu_check.py --models A B [--device cuda] [--dtypes float32 bfloat16]

One member is compared with the harness's `hf` on the same device in the same precision; the pair is compared with
the pair on the CPU in float32. Differences are the largest per request, in nats a token of the main member.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_deepen.harness.model import DeepenLM

CONTEXTS = (
    "Question: Which gas do plants take in from the air?\nAnswer:",
    "Question: How many days are there in a leap year?\nAnswer:",
    "def add(a, b):\n    # return the sum of two numbers\n",
    "The capital of France is",
)
CHOICES = (" carbon dioxide", " 366", "    return a + b", " Paris", " a café in the old town")
TEXTS = (" ".join(CONTEXTS) * 3, "Water boils at 100 degrees and freezes at 0 degrees. " * 8)


def requests(kind: str) -> list[Instance]:
    """Return the requests of a type."""
    asked: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(context, choice) for context in CONTEXTS for choice in CHOICES],
        "loglikelihood_rolling": [(text,) for text in TEXTS],
        "generate_until": [(context, {"until": ["\n\n"], "max_gen_toks": 16}) for context in CONTEXTS],
    }
    return [Instance(kind, {}, arguments, index) for index, arguments in enumerate(asked[kind])]  # type: ignore[arg-type]


def answers(model: Any) -> dict[str, list[Any]]:
    """Return a model's answers by type of request."""
    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    with torch.inference_mode():
        return {kind: getattr(model, kind)(requests(kind)) for kind in kinds}


def difference(tokenizer: Any, ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the largest difference of a score, in nats a token, and how many texts are the same."""
    worst = 0.0
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        for request, a, b in zip(requests(kind), ours[kind], theirs[kind], strict=True):
            one, two = (a, b) if kind.endswith("rolling") else (a[0], b[0])
            worst = max(worst, abs(one - two) / len(tokenizer.encode(request.args[-1])))
    texts: Sequence[bool] = [a == b for a, b in zip(ours["generate_until"], theirs["generate_until"], strict=True)]
    return {"nats_per_token": worst, "texts_alike": sum(texts), "texts": len(texts)}


def main() -> None:
    """Compare, print a line each, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=2, required=True, metavar=("A", "B"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    pair = {"pretrained": args.models[0], "members": list(args.models)}
    found: dict[str, Any] = {"device": args.device, "name": _name(args.device)}
    reference = answers(DeepenLM.create_from_arg_obj({**pair, "dtype": "float32"}, {"device": "cpu", "batch_size": 4}))
    for dtype in args.dtypes:
        place = {"device": args.device, "batch_size": 4}
        for model in args.models:
            hf = HFLM(pretrained=model, dtype=dtype, **place)
            ours = DeepenLM.create_from_arg_obj({"pretrained": model, "dtype": dtype}, place)
            found[f"{dtype}: {model.rsplit('/', 1)[-1]} = hf"] = difference(hf.tokenizer, answers(ours), answers(hf))
            tokenizer = hf.tokenizer
            del hf, ours
        model = DeepenLM.create_from_arg_obj({**pair, "dtype": dtype}, place)
        found[f"{dtype}: pair = pair on the CPU, float32"] = difference(tokenizer, answers(model), reference)
        del model
    for what, value in found.items():
        print(f"{what:50} {value}")
    print(json.dumps(found))


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


if __name__ == "__main__":
    main()
