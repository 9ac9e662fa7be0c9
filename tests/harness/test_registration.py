"""`deepen` is found without a flag, from a wheel and from an editable install, and nothing else changes.

Every install is a throw-away environment whose site-packages holds what the built wheel holds, so that the
start-up file is processed by a real interpreter start.
"""

import email
import json
import os
import re
from pathlib import Path

import pytest
from installed import Install, copy_harness

ROOT = Path(__file__).resolve().parents[2]

REGISTRY = """
import json
from lm_eval.api.registry import get_model, model_registry
dummy = get_model("dummy").__name__
found = model_registry._objs.get("deepen")
found = found if isinstance(found, (str, type(None))) else f"{found.__module__}:{found.__name__}"
print(json.dumps({"deepen": found, "dummy": dummy, "hf": "hf" in model_registry}))
"""

# Stands for the real class where only its being found matters: answers without any model.
STUB_HOST = """
from lm_eval.api.model import LM

class DeepenLM(LM):
    def __init__(self, pretrained, **kwargs):
        super().__init__()

    def loglikelihood(self, requests):
        return [(-float(len(r.args[1])), False) for r in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError
"""

TASK = """
task: hook_probe
custom_dataset: !function probe_data.load
output_type: multiple_choice
test_split: test
doc_to_text: "Q:"
doc_to_choice: [a, bb]
doc_to_target: 0
metric_list: [{metric: acc}]
"""

TASK_DATA = """
from datasets import Dataset

def load(**_):
    return {"test": Dataset.from_list([{"x": 1}, {"x": 2}])}
"""


@pytest.fixture(scope="module", params=["standard", "editable"])
def install(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Install:
    if os.name == "nt":
        pytest.skip("the layout of the throw-away environment is POSIX")
    folder = tmp_path_factory.mktemp(request.param)
    return Install(folder / "env", request.param, folder / "dist")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """A wheel whose model class is a stub, beside a harness without its thousands of task files."""
    folder = tmp_path_factory.mktemp("stubbed")
    installed = Install(folder / "env", "standard", folder / "dist")
    (installed.site / "lm_eval_deepen" / "harness" / "model.py").write_text(STUB_HOST)
    copy_harness(installed.site)
    own = installed.site.parent / "tasks"
    own.mkdir()
    (own / "probe.yaml").write_text(TASK)
    (own / "probe_data.py").write_text(TASK_DATA)
    return installed


# Where the package's files are makes no difference to the order in which modules are imported.
of_the_wheel = pytest.mark.parametrize("install", ["standard"], indirect=True)
EXPECTED = {"deepen": "lm_eval_deepen.harness.model:DeepenLM", "dummy": "DummyLM", "hf": True}


@of_the_wheel
@pytest.mark.parametrize(
    "first",
    [
        "",
        "import lm_eval.models",
        "import lm_eval.api.registry",
        "import lm_eval.evaluator",
        "import lm_eval_deepen, lm_eval_deepen.errors",
        "import lm_eval_deepen.harness.model",
        "import lm_eval_deepen._startup.registration as r; r.register()",
        "import lm_eval_deepen._startup.hook as h; h.install(); h.install()",
    ],
)
def test_deepen_and_the_built_in_models_resolve_whatever_was_imported_first(install: Install, first: str):
    assert install.json(f"{first}\n{REGISTRY}") == EXPECTED


def test_hook_installed_after_the_harness_registers_at_once(install: Install):
    code = "import lm_eval.models\nfrom lm_eval_deepen._startup import hook\nhook.install()\n" + REGISTRY
    assert install.json(code, LM_EVAL_DEEPEN_NO_HOOK="0") == EXPECTED
    assert install.json(code, LM_EVAL_DEEPEN_NO_HOOK="1") == {**EXPECTED, "deepen": None}


def test_off_switch_leaves_the_harness_alone_and_the_wrapper_overrides_it(install: Install):
    off = {"LM_EVAL_DEEPEN_NO_HOOK": "1"}
    assert install.json(REGISTRY, **off) == {**EXPECTED, "deepen": None}
    forced = "from lm_eval_deepen._startup.registration import register\nregister()\n"
    assert install.json(forced + REGISTRY, **off) == EXPECTED


def test_nothing_is_registered_where_the_harness_discovers_entry_points(install: Install):
    code = "import lm_eval.api.registry as r\nr.load_plugins = print\n" + REGISTRY
    assert install.json(code) == {**EXPECTED, "deepen": None}


def test_a_start_up_file_without_its_package_is_silent(wheel: Install):
    package = wheel.site / "lm_eval_deepen"
    package.rename(package.with_name("gone"))
    try:
        done = wheel.run("-c", "print('fine')")
    finally:
        package.with_name("gone").rename(package)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_registry_of_an_unknown_kind_warns_and_leaves_the_harness_usable(install: Install):
    code = """
import json, warnings
import lm_eval.api.registry as registry
def refuse(*args, **kwargs):
    raise TypeError("frozen")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lm_eval_deepen._startup.registration as r
    registry.model_registry.register, kept = refuse, registry.model_registry.register
    r.register_or_warn()
    registry.model_registry.register = kept
    import lm_eval.models
messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
print(json.dumps([*messages, "hf" in registry.model_registry]))
"""
    message, usable = install.json(code)
    assert "could not register the model 'deepen'" in message
    assert "frozen" in message
    assert "LM_EVAL_DEEPEN_NO_HOOK=1" in message
    assert usable


def test_harness_without_lazy_models_is_refused_with_the_remedy(install: Install):
    code = """
import lm_eval.models, lm_eval.api.registry as registry
del registry.model_registry
from lm_eval_deepen._startup.registration import register
register()
"""
    done = install.run("-c", code)
    assert done.returncode != 0
    assert "needs lm_eval >= 0.4.12: pip install -U lm_eval" in done.stderr


def test_loader_of_the_harness_keeps_its_type_and_a_reload_still_works(install: Install):
    code = """
import importlib, inspect, json
import lm_eval.models as models
source = inspect.getsource(models)
importlib.reload(models)
print(json.dumps([type(models.__spec__.loader).__name__, "MODEL_MAPPING" in source]))
"""
    assert install.json(code) == ["SourceFileLoader", True]


def test_the_wrapper_evaluates_deepen_where_the_hook_is_off(wheel: Install, tmp_path: Path):
    """`lm_eval` and `accelerate launch` do so with the hook: see the runs of `conformance/test_01_discovery.py`."""
    run = ["run", "--model", "deepen", "--model_args", "pretrained=x", "--tasks", "hook_probe"]
    run += ["--include_path", str(wheel.site.parent / "tasks"), "--output_path", str(tmp_path)]
    done = wheel.run("-m", "lm_eval_deepen.cli.main", *run, LM_EVAL_DEEPEN_NO_HOOK="1")
    assert done.returncode == 0, done.stderr
    [written] = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text("utf-8"))
    assert results["config"]["model"] == "deepen"
    assert results["results"]["hook_probe"]["acc,none"] == 1.0


def test_wheel_ships_tasks_hook_and_licence_but_no_lint_configuration(wheel: Install):
    for name in ("lm_eval_deepen_hook.pth", "lm_eval_deepen_hook.start"):
        assert name in wheel.files
    assert any(f.startswith("lm_eval_deepen/_data/task_configs/demo/") for f in wheel.files)
    assert any(f.endswith("licenses/LICENSE") for f in wheel.files)
    for name in wheel.files:
        assert not name.endswith("ruff.toml")
    hook = {"lm_eval_deepen_hook.pth", "lm_eval_deepen_hook.start"}
    tops = {name.partition("/")[0] for name in wheel.files} - hook
    [info] = tops - {"lm_eval_deepen"}
    assert info.endswith(".dist-info") and "lm_eval_deepen/py.typed" in wheel.files
    told = email.message_from_string((wheel.site / info / "METADATA").read_text("utf-8"))
    description = told.get_payload()
    assert "lm_eval run" in description and not re.search(r"\]\((?!https://)", description)
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.10"} <= set(told.get_all("Classifier"))
    assert len(told.get_all("Project-URL")) == 2


def test_the_oldest_versions_are_the_lower_bounds():
    lines = (ROOT / "constraints-lowest.txt").read_text("utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = {
        name: re.search(rf'"{name}(?:\[hf\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text("utf-8"))
        for name in ("torch", "transformers", "lm_eval", "accelerate", "jinja2")
    }
    for name, bound in bounds.items():
        assert bound is not None and (oldest[name] + ".").startswith(bound[1] + "."), name


def test_start_file_names_the_callable_that_the_pth_file_calls():
    pth = (ROOT / "lm_eval_deepen" / "_startup" / "lm_eval_deepen_hook.pth").read_text("utf-8").splitlines()
    start = (ROOT / "lm_eval_deepen" / "_startup" / "lm_eval_deepen_hook.start").read_text("utf-8").split()
    assert len(pth) == 1 and pth[0].startswith("import ")
    [(module, _, function)] = [entry.partition(":") for entry in start]
    assert f"{module.rpartition('.')[2]}.{function}()" in pth[0]


def test_path_command_finds_the_shipped_tasks(install: Install):
    done = install.run("-m", "lm_eval_deepen.cli.main", "path", "tasks")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "demo").is_dir()
    # An editable install must read the checkout, not a copy made when it was installed.
    inside_site = str(install.site) in done.stdout
    assert inside_site == any(f.startswith("lm_eval_deepen/_data/") for f in install.files)
