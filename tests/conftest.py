"""Shared fixtures: offline, single-threaded, deterministic."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gc  # noqa: E402

gc.disable()  # until all is collected: what is imported and parametrised stays, and each pass would read it anew

import functools  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.utils.collect_env as collect_env  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

import pico as pico_models  # noqa: E402
from hypothesis import settings  # noqa: E402

from lm_eval_deepen.build.demo_models import DEMO_MODELS, is_available  # noqa: E402
from lm_eval_deepen.relative.store import MatrixStore  # noqa: E402

torch.set_num_threads(1)
# The harness describes the machine in the results of every run: it starts pip and other programs for it.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)
settings.register_profile("nightly", max_examples=2_500, deadline=None, print_blob=True)


@pytest.hookimpl(tryfirst=True)  # a worker of xdist asks no hook after its own
def pytest_runtestloop() -> None:
    """Leave all that was imported and collected out of garbage collections, which leaderboards and builds ask for."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs the two real models where they are not installed."""
    if item.get_closest_marker("real") and not all(map(is_available, DEMO_MODELS)):
        pytest.skip("the models of the extra `demo` are not installed")


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the pico ensemble's models by name: bytelevel, metaspace, padded."""
    return pico_models.build_pico(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MatrixStore:
    """A folder for matrices and maps, which the tests of a file share."""
    return MatrixStore(tmp_path_factory.mktemp("matrices"), progress=False)


@pytest.fixture(scope="module", autouse=True)
def garbage_of_no_earlier_file() -> None:
    """Leave out what earlier files imported, too: mergekit, Ray and the trainer are tens of thousands of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def drafts_are_made_whether_or_not_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of texts are about what drafts do; where they pay is a test of its own."""
    monkeypatch.setattr("lm_eval_deepen.engine.drafts.MARGIN", -1.0)


@pytest.fixture(autouse=True)
def logs_of_no_earlier_test() -> None:
    """Start without what the harness set up for its log in an earlier test of this process.

    It makes one handler for the stream that stands for stderr at that moment, and keeps its lines from the root logger.
    Under `capsys` that stream is the test's own, and closed after it. Other libraries do the like.
    """
    harness = logging.getLogger("lm_eval")
    harness.handlers.clear()
    harness.propagate = True
    harness.setLevel(logging.NOTSET)
    if "lm_eval.utils" in sys.modules:
        sys.modules["lm_eval.utils"].__dict__.update(_LOGGING_CONFIGURED=False)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
                handler.stream = sys.stderr  # `setStream` would flush the closed one
