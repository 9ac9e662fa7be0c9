"""The ground of the harness's own `test_max_length.py`: in what order a context length is looked for."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from harness import deepen, hf
from lm_eval.models import utils
from transformers import Gemma3Config

from lm_eval_deepen.harness.model import DeepenLM

if not hasattr(utils, "resolve_max_length"):
    pytest.skip("this harness resolves lengths in another order", allow_module_level=True)
UNSET = utils.TOKENIZER_INFINITY


def length(config: dict, tokenizer: int = UNSET, given: int | None = None):
    """Return our class's `max_length` for a model config, as the harness's tests ask for it."""
    nested = config.pop("text_config", None)
    if nested is not None:
        config["text_config"] = SimpleNamespace(**nested)
    stub = SimpleNamespace(
        _max_length=given,
        _DEFAULT_MAX_LENGTH=DeepenLM._DEFAULT_MAX_LENGTH,
        model=SimpleNamespace(config=SimpleNamespace(**config)),
        tokenizer=SimpleNamespace(model_max_length=tokenizer),
    )
    return DeepenLM.max_length.fget(stub)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"config": {"max_position_embeddings": 4096}, "given": 512}, 512),
        ({"config": {"max_position_embeddings": 1200, "text_config": {"max_position_embeddings": 32768}}}, 32768),
        ({"config": {"text_config": {"max_position_embeddings": 131072}}, "tokenizer": 4096}, 131072),
        ({"config": {"n_positions": 1024, "max_position_embeddings": 2048, "n_ctx": 512}}, 1024),
        ({"config": {"n_positions": None, "max_position_embeddings": 4096.0}}, 4096),
        ({"config": {}, "tokenizer": 8192}, 8192),
        ({"config": {}}, 2048),
    ],
)
def test_max_length_is_looked_for_in_the_order_of_hf(arguments, expected):
    found = length(**arguments)
    assert found == expected and isinstance(found, int)


def test_max_length_of_a_real_nested_config():
    config = Gemma3Config()
    stub = SimpleNamespace(
        _max_length=None,
        _DEFAULT_MAX_LENGTH=DeepenLM._DEFAULT_MAX_LENGTH,
        model=SimpleNamespace(config=config),
        tokenizer=SimpleNamespace(model_max_length=UNSET),
    )
    assert DeepenLM.max_length.fget(stub) == config.text_config.max_position_embeddings > 2048


def test_max_length_of_loaded_models_is_that_of_hf(pico, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pico["bytelevel"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 100}))
    for path, given in ((pico["bytelevel"], None), (folder, None), (folder, 64)):
        assert deepen(path, max_length=given).max_length == hf(path, max_length=given).max_length


def test_max_length_of_every_member_counts(pico, tmp_path):
    model = deepen(pico["bytelevel"], pico["metaspace"], max_length=32, matrix_dir=str(tmp_path))
    assert [member.max_length for member in model.ensemble.members] == [32, 32]
    assert model.max_length == 32
