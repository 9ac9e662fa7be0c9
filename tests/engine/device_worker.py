"""Answers of ensembles on the CPU, on another device, and with a member on each: printed as JSON, by case.

Its argument is a JSON object: `models`, their folders, `cases`, what is configured, by name, and `apart`, the
cases of the last kind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accelerate.state  # noqa: E402
import torch  # noqa: E402
from emulated_device import register  # noqa: E402

from lm_eval_deepen import Ensemble, configure  # noqa: E402
from lm_eval_deepen.engine.bits_per_byte import Document  # noqa: E402
from lm_eval_deepen.engine.self_check import measure  # noqa: E402
from lm_eval_deepen.errors import DeepenError  # noqa: E402

CONTEXTS = ["The dog", "Question: What is", "Question: What is"]
DEVICE = "npu:0"


def answers(folders: list[str], devices: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Everything that an ensemble answers; what a method refuses is left out."""
    members = [{"pretrained": folder, "device": device} for folder, device in zip(folders, devices, strict=True)]
    ensemble = Ensemble.load(configure({"pretrained": folders[0], "members": members, **options}))
    assert [str(member.runner.device) for member in ensemble.members] == devices
    found: dict[str, Any] = {}
    if not ensemble.by_words:
        scored = ensemble.score(CONTEXTS, [" did not mind", " the largest", " the capital of"])
        found["score"] = [one.logp for one in scored]
        bits, lost = measure(ensemble, [Document("The dog did not mind.")])
        found["bits"] = [*bits.values(), *(loss.plain for loss in lost)]
    if not ensemble.by_words and options.get("method") != "mixture":
        found["trace"] = ensemble.trace("The dog did not mind.\nParis is the largest").logp
    found["texts"] = [one.text for one in ensemble.generate(CONTEXTS, max_gen_toks=4)]
    if not ensemble.by_words:
        sampled = ensemble.generate(CONTEXTS[:1], max_gen_toks=4, do_sample=True, temperature=0.8)
        found["sampled"] = [one.text for one in sampled]
    return found


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except (RuntimeError, DeepenError) as error:
        return str(error)
    return ""


def main() -> None:
    job = json.loads(sys.argv[1])
    kernels = register()
    folders = job["models"]
    unseen = message(lambda: answers(folders, [DEVICE, "cpu"], {}))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.is_npu_available = lambda *args, **kwargs: True  # it asks for the plugin of real ones
    torch.set_num_threads(1)
    places = [["cpu", "cpu"], [DEVICE, DEVICE], [DEVICE, "cpu"], ["cpu", DEVICE]]
    out = {
        name: {
            "+".join(devices): answers(folders, devices, options)
            for devices in places[: 4 if name in job["apart"] else 2]
        }
        for name, options in job["cases"].items()
    }
    mixed = message(lambda: torch.ones(3, device=DEVICE) + torch.ones(3))
    print(json.dumps({"cases": out, "mixed": mixed, "unseen": unseen}))
    del kernels


if __name__ == "__main__":
    main()
