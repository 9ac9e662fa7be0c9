"""A configuration is parsed once, and what was built then is what runs."""

from __future__ import annotations

from collections import Counter

import pytest
from harness import by_default
from pydantic import BaseModel

from lm_eval_deepen.config import Options
from lm_eval_deepen.config.recipes import shipped_recipes
from lm_eval_deepen.harness import model as host
from lm_eval_deepen.harness.ensemble_recipe import find_recipe
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.leaderboard.recipe import read_recipe


@pytest.fixture
def counted(monkeypatch):
    """Counts parsed configurations, and checked options by their name."""
    counts: Counter[str] = Counter()
    parse, check = host.parse_config, BaseModel.__init__

    def counting_parse(*args, **kwargs):
        counts["parsed"] += 1
        return parse(*args, **kwargs)

    def counting_check(self, **given):
        if isinstance(self, Options):
            counts[self.NAME] += 1
        check(self, **given)

    monkeypatch.setattr(host, "parse_config", counting_parse)
    monkeypatch.setattr(BaseModel, "__init__", counting_check)
    return counts


@pytest.mark.parametrize("name", shipped_recipes("leaderboard"))
def test_a_row_of_a_leaderboard_is_parsed_once(counted, name: str) -> None:
    recipe = read_recipe(shipped_recipes()[name])
    rows = len(recipe.rows)
    assert rows >= 3
    assert counted["parsed"] == rows + 1  # all members together, once more
    used = Counter(row.config.method for row in recipe.rows)
    for method, count in used.items():
        assert counted[method] == count + (method == "deepen")


def test_an_ensemble_is_parsed_once_and_the_fuser_has_its_options(pico, tmp_path, counted) -> None:
    pair = [pico["bytelevel"], pico["metaspace"]]
    model = by_default(*pair, matrix_dir=str(tmp_path), min_anchors=8, pooling="vote", with_fused=True)
    assert counted == {"parsed": 1, "deepen": 1, "exact": 1, "vote": 1}
    assert model.ensemble.fuser.options is model.ensemble_config.options
    assert model.pool.method is model.ensemble_config.pooling_options
    counted.clear()
    recipe = find_recipe("deepen_nq_2")
    assert recipe.configure() is recipe.configure() and counted["parsed"] == 1


def test_a_fuser_is_made_of_what_was_checked(pico, tmp_path) -> None:
    paths = [str(pico["bytelevel"]), str(pico["metaspace"])]
    config = configure({"pretrained": paths[0], "members": paths, "inverse": "mirror", "learning_rate": "1.5"})
    assert config.options.build_solver().learning_rate == 1.5
    assert configure(config.to_dict()) == config
