"""One process of a run. Its job is a JSON argument: how to load the ensemble, and steps to take in order.

Every answer that reaches the cache hook is logged once it is stored. A job may have the process kill itself.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import lm_eval  # noqa: E402
import torch  # noqa: E402
from harness import deepen, requests  # noqa: E402
from lm_eval.api.model import CacheHook, hash_args  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from processes import compact, note_group  # noqa: E402

import lm_eval_deepen.relative.store as store  # noqa: E402
from lm_eval_deepen.errors import DeepenError  # noqa: E402
from lm_eval_deepen.harness.model import DeepenLM  # noqa: E402


class Worker:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.rank = job, int(os.environ.get("RANK", 0))
        self.built: list[str] = []
        self.forwards = 0
        self.label = ""
        self.count_builds()
        self.log_answers()
        self.lm = deepen(*job["members"], **job["ensemble"])
        for member in self.lm.ensemble.members:
            member.lm.model.register_forward_pre_hook(self.count_forward)

    def count_builds(self) -> None:
        original = store.build_matrix

        def build_matrix(name: str, *args: Any, **kwargs: Any) -> Any:
            self.built.append(name)
            return original(name, *args, **kwargs)

        store.build_matrix = build_matrix

    def log_answers(self) -> None:
        original, log = CacheHook.add_partial, Path(self.job["log"])

        def add_partial(hook: CacheHook, attr: str, req: Any, res: Any) -> None:
            original(hook, attr, req, res)
            with log.open("a") as file:
                file.write(f"{self.rank} {self.label} {hash_args(attr, req)}\n")

        CacheHook.add_partial = add_partial

    def count_forward(self, *_: Any) -> None:
        if self.forwards == self.job.get("die_at_forward", {}).get(str(self.rank)):
            os.kill(os.getpid(), signal.SIGKILL)
        self.forwards += 1

    def evaluate(self, **kwargs: Any) -> Any:
        manager = TaskManager(include_path=self.job["tasks"], include_defaults=False)
        before = self.forwards
        found = lm_eval.simple_evaluate(model=self.lm, task_manager=manager, bootstrap_iters=0, **kwargs)
        own = dict(self.lm.ensemble.counters.rows)
        return {"found": compact(found), "forwards": self.forwards - before, "own": own}

    def ask(self, kind: str, by_rank: list[list[list[Any]]]) -> Any:
        return getattr(self.lm, kind)(requests(kind, *map(tuple, by_rank[self.rank])))

    def no_template(self) -> None:
        """Fail where a request is rendered, not loaded."""

        def refuse(*_: Any, **__: Any) -> str:
            raise AssertionError("rendered again")

        self.lm.apply_chat_template = refuse

    def load(self, members: list[dict[str, Any]]) -> None:
        DeepenLM(pretrained=members[0]["pretrained"], members=members)

    def step(self, name: str, arguments: Any) -> Any:
        call = getattr(self, name)
        try:
            return call(**arguments) if isinstance(arguments, dict) else call(*arguments)
        except DeepenError as error:
            return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    # Registered first, so it runs after all that the ensemble does at the end.
    atexit.register(note_group, Path(job["out"]) / f"{os.environ.get('RANK', 0)}.group")
    worker = Worker(job)
    report = {"built": worker.built, "ranks": [worker.lm.ranks.index, worker.lm.ranks.count]}
    for label, name, arguments in job["steps"]:
        worker.label = label
        report[label] = worker.step(name, arguments)
    (Path(job["out"]) / f"{worker.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
