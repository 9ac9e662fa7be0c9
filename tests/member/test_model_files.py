"""What tells a model from another one under the same name."""

from __future__ import annotations

import shutil

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.member.model_files import changed, digests


def test_a_hub_name_is_told_by_its_commit(pico, tmp_path):
    repository = tmp_path / "models--org--tiny"
    commits = ["0" * 39 + "1", "0" * 39 + "2"]
    for commit in commits:
        shutil.copytree(pico["bytelevel"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    member = MemberConfig(name="a", pretrained="org/tiny", loading=where)
    assert digests([member]) == {}  # neither the hub nor the cache knows a commit
    told = []
    for commit in commits:
        (repository / "refs" / "main").write_text(commit)
        told.append(digests([member]))
    assert told == [{"org/tiny": commit} for commit in commits]
    assert changed(told[1], told[0]) == "org/tiny" and not changed(told[0], told[0])
    assert not changed(told[0], None) and not changed(told[0], {}) and not changed({}, told[0])
    fixed = member.replace(loading={**where, "revision": commits[0]})
    assert digests([fixed, member]) == {f"org/tiny@{commits[0]}": commits[0], "org/tiny": commits[1]}
    assert digests([member.replace(loading={}, hf_kwargs=where)]) == told[1]


def test_whatever_is_loaded_by_a_hub_name_is_told(pico, tmp_path, monkeypatch):
    """Adapters, deltas and tokenizers have commits of their own; a repository of GGUF files has no configuration."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loading = {"tokenizer": "org/spelling", "peft": "org/adapter", "delta": "org/delta", "gguf_file": "q4.gguf"}
    member = MemberConfig(name="a", pretrained="org/packed", loading=loading)
    files = {"spelling": "tokenizer.json", "adapter": "adapter_config.json", "delta": "config.json"}
    told = []
    for commit in ("1" * 40, "2" * 40):
        for name, file in {**files, "packed": "q4.gguf"}.items():
            repository = tmp_path / f"models--org--{name}"
            (repository / "snapshots" / commit).mkdir(parents=True)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(commit)
            (repository / "snapshots" / commit / file).write_text("{}")
        told.append(digests([member]))
        assert told[-1] == {f"org/{name}": commit for name in (*files, "packed")}
    assert set(changed(told[1], told[0]).split(" and ")) == told[0].keys()


def test_a_folder_is_told_by_its_files(pico, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pico["bytelevel"], folder)
    member = MemberConfig(name="a", pretrained=str(folder))
    before = digests([member])
    (folder / "README.md").write_text("about it")
    assert digests([member]) == before
    for name in ("generation_config.json", "modeling_own.py"):
        before = digests([member])
        (folder / name).write_text("{}")
        assert changed(digests([member]), before) == str(folder)
    shutil.copytree(folder, folder / "inner")
    member = member.replace(loading={"subfolder": "inner"})
    before = digests([member])
    (folder / "inner" / "config.json").write_text("{}")
    assert changed(digests([member]), before) == str(folder / "inner")
