"""Members whose weights are divided over processes give the scores of one process: on two nodes, or in two groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import CachingLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import requests  # noqa: E402
from ports import free_port  # noqa: E402

from lm_eval_deepen.engine import Ensemble  # noqa: E402
from lm_eval_deepen.errors import ConfigError, MemberError, RequestError  # noqa: E402
from lm_eval_deepen.harness.distributed import PART  # noqa: E402
from lm_eval_deepen.harness.model import DeepenLM, configure  # noqa: E402

PATIENCE_S = 600
NAMES = ("bytelevel", "metaspace")


CHOICES = (("The fox", " jumps"), ("The dog did not", " mind"), ("Paris is", " the capital"), ("10 + 20", " = 30"))


def answers(folder: str, plans: tuple[str, str], size: int | None, out: str) -> dict[str, Any]:
    """Load the pico pair, score and generate; a plan divides a member over `size` processes, or all of this launch."""
    rank = int(os.environ.get("RANK", 0))
    members = [
        {"pretrained": f"{folder}/{name}", **({"tp_plan": plan, "tp_size": size} if plan else {})}
        for name, plan in zip(NAMES, plans, strict=True)
    ]
    given = {"pretrained": members[0]["pretrained"], "members": members, "dtype": "float32"}
    model = DeepenLM.create_from_arg_obj(given, {"device": "cpu"})
    ensemble = model.ensemble
    choices = model.loglikelihood(requests("loglikelihood", *CHOICES), disable_tqdm=True)
    steps = [trace.rows["fused"] for trace in model.traces]
    apart = [CHOICES[0], ("The fox", f" {model.ranks.index}")]  # a group's own
    model.loglikelihood(requests("loglikelihood", *apart), disable_tqdm=True)
    caching = CachingLM(model, f"{out}/{rank}.db")
    caching.dbdict[f"answer {rank}"] = (-1.0, True)  # a killed run leaves each process with its own
    model.set_cache_hook(caching.get_cache_hook())
    kept = sorted(key for key in caching.dbdict if key.startswith("answer"))
    large = [value[-1] for value in model.ranks.gather(bytes(2 * PART) + bytes([rank]))]
    scores = ensemble.score("Paris is the capital", [" of France", " of Rome.", " walked"])
    (text,) = ensemble.generate(["The quick brown"], max_gen_toks=8)
    weights = [member.lm.model.model.layers[0].mlp.up_proj.weight for member in ensemble.members]
    different = [("The fox", " jumps"), ("The fox", f" {rank}")]
    try:
        model.loglikelihood(requests("loglikelihood", *different), disable_tqdm=True)
        refused = ""
    except RequestError as error:
        refused = str(error)
    unreadable = []
    for member in ensemble.members:
        try:
            member.embeddings()
        except MemberError as error:
            unreadable.append(str(error))
    caching.dbdict.close()
    return {
        "scores": [score.logp for score in scores] + [logp for logp, _ in choices],
        "text": text.text,
        "steps": steps,
        "kept": kept,
        "large": large,
        "rows": [len(weight.to_local() if hasattr(weight, "to_local") else weight) for weight in weights],
        "kinds": [type(member.runner).__name__ for member in ensemble.members],
        "unreadable": unreadable,
        "refused": refused,
    }


@pytest.mark.parametrize(
    ("nodes", "processes", "plans", "size"), [(1, 4, ("auto", "auto"), 2), (2, 1, ("auto", ""), None)]
)
def test_divided_members_score_as_in_one_process(nodes, processes, plans, size, pico, tmp_path):
    """All processes of a launch hold a member together, or groups of `size` processes share the requests."""
    folder = str(pico["bytelevel"].parent)
    expected = answers(folder, ("", ""), None, str(tmp_path))
    assert expected["rows"] == [64, 64] and not expected["refused"] and not expected["unreadable"]
    (tmp_path / "0.db").unlink()
    port = str(free_port())
    launch = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
    children = []
    for node in range(nodes):
        per_node = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(processes)]
        command = [*launch, *per_node, __file__, folder, str(tmp_path), *plans, str(size or "")]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(tmp_path / f"log{node}", "wb") as log:
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        ended = [child.wait(PATIENCE_S) for child in children]
    finally:
        for child in children:
            child.kill()
    assert ended == [0] * nodes, (tmp_path / "log0").read_text()[-4000:]
    everyone = list(range(nodes * processes))
    for rank in everyone:
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["scores"] == pytest.approx(expected["scores"], abs=1e-4)
        assert all(found[key] == expected[key] for key in ("text", "kinds"))
        assert len(found["steps"]) == len(everyone) // (size or len(everyone)) and all(found["steps"])
        assert sum(found["steps"]) == sum(expected["steps"])  # no request is answered by two groups
        assert found["kept"] == [f"answer {other}" for other in everyone] and found["large"] == everyone
        assert all("needs them whole" in error for error in found["unreadable"])
        assert len(found["unreadable"]) == sum(plan == "auto" for plan in plans)
        assert found["rows"] == [32 if plan else 64 for plan in plans]  # half of the rows of a layer
        assert "were given different requests" in found["refused"]


@pytest.mark.parametrize(
    ("own", "beside", "said"),
    [
        (({}, {}), {"tp_size": 2}, "tp_size=2 says how many .* no tp_plan: give tp_plan=auto"),
        (({"tp_plan": "auto"}, {}), {"tp_size": 2}, r"members\[1\] .*no tp_plan"),
        (({}, {}), {"tp_plan": "auto", "tp_size": 1}, "tp_size must be a whole number of at least 2; got 1"),
        (({}, {}), {"tp_plan": 4}, "tp_plan must be text, or a mapping.*got 4"),
        (({}, {}), {"tp_plan": "auto", "hf_kwargs": {"tp_size": 2}}, "give tp_size beside pretrained"),
        (({}, {}), {"tp_plan": "auto", "tp_size": 3}, "this launch has 4, .* --nproc-per-node 3"),
        (({"tp_size": 2}, {}), {"tp_plan": "auto"}, "differs between members: bytelevel 2, metaspace 4"),
        (({"tp_size": 2}, {"tp_size": 4}), {"tp_plan": "auto"}, "differs between members: bytelevel 2, metaspace 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_a_model_loads(own, beside, said, pico, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(Ensemble, "load", None)
    members = [{"pretrained": str(pico[name]), **keys} for name, keys in zip(NAMES, own, strict=True)]
    with pytest.raises(ConfigError, match=said):
        DeepenLM(members[0]["pretrained"], members=members, **beside)


def test_placement_in_groups_leaves_the_fingerprint(pico: dict[str, Path]) -> None:
    given = {"members": [str(pico[name]) for name in NAMES]}
    assert configure({**given, "tp_plan": "auto", "tp_size": 2}).fingerprint() == configure(given).fingerprint()


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = answers(sys.argv[1], (sys.argv[3], sys.argv[4]), int(sys.argv[5] or 0) or None, sys.argv[2])
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
