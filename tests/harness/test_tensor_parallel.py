"""Members whose weights are divided over processes give the scores of one process, on one node or on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "conformance")]
from harness import requests  # noqa: E402
from processes import free_port  # noqa: E402

from lm_eval_deepen.errors import MemberError, RequestError  # noqa: E402
from lm_eval_deepen.harness.model import DeepenLM  # noqa: E402

PATIENCE_S = 300
NAMES = ("bytelevel", "metaspace")


def answers(folder: str, plans: tuple[str, str]) -> dict[str, Any]:
    """Load the pico pair, score and generate; a plan divides a member over the processes of this launch."""
    members = [
        {"pretrained": f"{folder}/{name}", **({"tp_plan": plan} if plan else {})}
        for name, plan in zip(NAMES, plans, strict=True)
    ]
    given = {"pretrained": members[0]["pretrained"], "members": members, "dtype": "float32"}
    model = DeepenLM.create_from_arg_obj(given, {"device": "cpu"})
    ensemble = model.ensemble
    model.loglikelihood(requests("loglikelihood", ("The fox", " jumps")), disable_tqdm=True)
    scores = ensemble.score("Paris is the capital", [" of France", " of Rome.", " walked"])
    (text,) = ensemble.generate(["The quick brown"], max_gen_toks=8)
    weights = [member.lm.model.model.layers[0].mlp.up_proj.weight for member in ensemble.members]
    different = [("The fox", " jumps"), ("The fox", f" {os.environ.get('RANK', '')}")]
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
    return {
        "scores": [score.logp for score in scores],
        "text": text.text,
        "rows": [len(weight.to_local() if hasattr(weight, "to_local") else weight) for weight in weights],
        "kinds": [type(member.runner).__name__ for member in ensemble.members],
        "unreadable": unreadable,
        "refused": refused,
    }


@pytest.mark.parametrize(("nodes", "plans"), [(1, ("auto", "auto")), (2, ("auto", ""))])
def test_divided_members_score_as_in_one_process(
    nodes: int, plans: tuple[str, str], pico: dict[str, Path], tmp_path: Path
) -> None:
    folder = str(pico["bytelevel"].parent)
    expected = answers(folder, ("", ""))
    assert expected["rows"] == [64, 64] and not expected["refused"] and not expected["unreadable"]
    port = str(free_port())
    launch = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
    children = []
    for node in range(nodes):
        per_node = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(2 // nodes)]
        command = [*launch, *per_node, __file__, folder, str(tmp_path), *plans]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(tmp_path / f"log{node}", "wb") as log:
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        ended = [child.wait(PATIENCE_S) for child in children]
    finally:
        for child in children:
            child.kill()
    assert ended == [0] * nodes, (tmp_path / "log0").read_text()[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["scores"] == pytest.approx(expected["scores"], abs=1e-4)
        assert all(found[key] == expected[key] for key in ("text", "kinds"))
        assert all("needs them whole" in error for error in found["unreadable"])
        assert len(found["unreadable"]) == sum(plan == "auto" for plan in plans)
        assert found["rows"] == [32 if plan else 64 for plan in plans]  # half of the rows of a layer
        assert "were given different requests" in found["refused"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = answers(sys.argv[1], (sys.argv[3], sys.argv[4]))
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
