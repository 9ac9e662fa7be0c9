"""Matrix files: identity, damage, atomic writes, one builder at a time."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tensor_worlds import member, trio, vocabulary, with_output_rows

import lm_eval_deepen.relative.store as store_module
from lm_eval_deepen.errors import MatrixError
from lm_eval_deepen.relative import blocks
from lm_eval_deepen.relative.files import describe
from lm_eval_deepen.relative.rows_from_embeddings import MatrixSpec
from lm_eval_deepen.relative.store import MatrixStore, default_folder
from lm_eval_deepen.vocabulary.anchors import find_anchors

MEMBERS = trio()
ANCHORS = find_anchors([m.vocabulary for m in MEMBERS], names=["a", "b", "c"])
SPARSE, DENSE = MatrixSpec("cosine", top_m=20), MatrixSpec("reference", top_m=0, rows="all")


def product(matrix) -> torch.Tensor:
    return matrix.full().project(torch.eye(matrix.shape[0]))


def visible(folder: Path) -> list[str]:
    """Return what is in a folder, but for the lock files, which stay."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("spec", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_a_matrix_is_built_once_and_read_back_the_same(tmp_path: Path, spec, monkeypatch) -> None:
    first = MatrixStore(tmp_path, progress=False).get(MEMBERS[0], ANCHORS, spec)
    monkeypatch.setattr(store_module, "build_matrix", lambda *a, **k: pytest.fail("built again"))
    store = MatrixStore(tmp_path, progress=False)
    again = store.get(MEMBERS[0], ANCHORS, spec)
    assert torch.equal(product(first), product(again))
    assert store.get(MEMBERS[0], ANCHORS, spec) is again
    assert visible(tmp_path) == [store.path(MEMBERS[0], ANCHORS, spec).name]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    store = MatrixStore(tmp_path, progress=False)
    named = replace(MEMBERS[0], name="org/model: main")
    matrix = store.get(named, ANCHORS, SPARSE)
    info = store.info(named, ANCHORS, SPARSE)
    assert info.path.name.startswith("org_model_main-") and info.path.suffix == ".safetensors"
    assert (info.num_rows, info.num_anchors) == (len(named.vocabulary), len(ANCHORS))
    assert info.num_bytes == info.path.stat().st_size and info.build_seconds >= 0
    text = matrix.values.sum(1) > 0
    assert info.mean_dropped_mass == pytest.approx(float(matrix.dropped_mass[text].mean()))
    assert 0 < info.mean_dropped_mass < 0.05
    assert info.identity["tokenizer"] == named.vocabulary.fingerprint
    assert info.identity["embedding"] == named.load_fingerprint()
    assert info.identity["anchors"] == ANCHORS.fingerprint
    tensors, rows = content(info.path)[0], len(named.vocabulary)
    assert tensors["values"].dtype == torch.float16 and tensors["indices"].dtype == torch.int32
    shapes = {"values": (rows, 20), "indices": (rows, 20), "dropped_mass": (rows,), "anchor_ids": (60,)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes


def test_members_that_differ_in_name_alone_share_a_file(tmp_path: Path) -> None:
    store = MatrixStore(tmp_path, progress=False)
    first = store.get(MEMBERS[0], ANCHORS, SPARSE)
    assert store.get(replace(MEMBERS[0], name="copy"), ANCHORS, SPARSE) is first
    assert len(visible(tmp_path)) == 1


def test_two_builds_have_one_content_hash(tmp_path: Path) -> None:
    hashes = set()
    for folder in ("a", "b"):
        store = MatrixStore(tmp_path / folder, progress=False)
        store.get(MEMBERS[0], ANCHORS, SPARSE)
        hashes.add(store.info(MEMBERS[0], ANCHORS, SPARSE).content_sha256)
    assert len(hashes) == 1


def test_another_tokenizer_revision_anchor_set_or_spec_has_another_file() -> None:
    store = MatrixStore("unused")
    base = MEMBERS[0]
    revised = replace(base, load_fingerprint=lambda: "another revision")
    retokenized = replace(base, vocabulary=vocabulary(90, tag="z", padded=4))
    fewer = find_anchors([m.vocabulary for m in MEMBERS], max_anchors=30, names=["a", "b", "c"])
    paths = [store.path(m, ANCHORS, SPARSE) for m in (base, revised, retokenized)]
    paths.append(store.path(base, fewer, SPARSE))
    for change in ({"normalization": "centered"}, {"temperature": 50.0}, {"top_m": 21}, {"rows": "all"}):
        paths.append(store.path(base, ANCHORS, replace(SPARSE, **change)))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("pieces", ["embedding", "exact"])
@pytest.mark.parametrize("top_m", [0, 20])
def test_rows_of_the_head_are_those_of_a_member_with_them_as_input(tmp_path: Path, pieces: str, top_m: int) -> None:
    store = MatrixStore(tmp_path, progress=False)
    spec = MatrixSpec("centered", top_m=top_m, pieces=pieces)
    head = replace(spec, embeddings="output")
    rows = MEMBERS[0].load_embeddings().roll(7, 0)
    untied, tied = with_output_rows(MEMBERS[0], rows), with_output_rows(MEMBERS[0], rows.roll(-7, 0))
    assert (untied.tied, tied.tied, MEMBERS[0].tied) == (False, True, True)
    own = store.get(untied, ANCHORS, spec)
    found = store.get(untied, ANCHORS, head)
    assert not torch.allclose(product(found), product(own), atol=1e-3)
    # the obvious way: a member whose input embeddings are those rows, without a store between
    copied = replace(MEMBERS[0], load_embeddings=lambda: rows, load_fingerprint=lambda: "copied")
    expected = MatrixStore(tmp_path / "other", progress=False).get(copied, ANCHORS, spec)
    assert torch.equal(product(found), product(expected))
    assert store.path(untied, ANCHORS, head) != store.path(untied, ANCHORS, spec)
    # one file where the rows are the same ones
    assert store.get(tied, ANCHORS, head) is store.get(MEMBERS[0], ANCHORS, head) is own


def test_damaged_rows_of_the_head_are_named(tmp_path: Path) -> None:
    store, head = MatrixStore(tmp_path, progress=False), replace(SPARSE, embeddings="output")
    short = with_output_rows(MEMBERS[0], torch.zeros(5, 4))
    with pytest.raises(MatrixError, match=r"'main' has output embeddings of shape \(5, 4\)"):
        store.get(short, ANCHORS, head)
    nan = with_output_rows(MEMBERS[0], torch.full((len(MEMBERS[0].vocabulary), 4), float("nan")))
    with pytest.raises(MatrixError, match="'main' has output embeddings that are not finite"):
        store.get(nan, ANCHORS, head)


def test_rows_of_a_head_need_their_digest() -> None:
    with pytest.raises(ValueError, match="belong together"):
        replace(MEMBERS[0], load_output_embeddings=MEMBERS[0].load_embeddings)


@pytest.mark.parametrize("what", ["tokenizer", "embedding"])
def test_a_file_built_for_something_else_names_both_sides(tmp_path: Path, what: str) -> None:
    store = MatrixStore(tmp_path, progress=False)
    store.get(MEMBERS[0], ANCHORS, SPARSE)
    if what == "tokenizer":
        other = replace(MEMBERS[0], vocabulary=vocabulary(90, tag="z", padded=4))
        sides = (MEMBERS[0].vocabulary.fingerprint, other.vocabulary.fingerprint)
    else:
        other = replace(MEMBERS[0], load_fingerprint=lambda: "beef")
        sides = (MEMBERS[0].load_fingerprint(), "beef")
    os.replace(store.path(MEMBERS[0], ANCHORS, SPARSE), store.path(other, ANCHORS, SPARSE))
    message = f"{what}: the file has '{sides[0]}', member 'main' needs '{sides[1]}'.*Delete it"
    with pytest.raises(MatrixError, match=message):
        MatrixStore(tmp_path, progress=False).get(other, ANCHORS, SPARSE)


def built(tmp_path: Path) -> Path:
    store = MatrixStore(tmp_path, progress=False)
    store.get(MEMBERS[0], ANCHORS, SPARSE)
    return store.path(MEMBERS[0], ANCHORS, SPARSE)


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def reload(tmp_path: Path):
    return MatrixStore(tmp_path, progress=False).get(MEMBERS[0], ANCHORS, SPARSE)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = built(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    message = rf"{path.name} is damaged: it is no complete matrix file.*Delete it"
    with pytest.raises(MatrixError, match=message):
        reload(tmp_path)


def test_an_altered_tensor_is_refused(tmp_path: Path) -> None:
    path = built(tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(MatrixError, match="damaged: its content has checksum .* its header says .*Delete it"):
        reload(tmp_path)


def test_an_altered_identity_is_refused(tmp_path: Path) -> None:
    path = built(tmp_path)
    tensors, metadata = content(path)
    identity = json.loads(metadata["identity"])
    save_file(tensors, path, metadata={**metadata, "identity": json.dumps({**identity, "temperature": 99.0})})
    with pytest.raises(MatrixError, match="temperature: the file has 99.0, member 'main' needs 100.0"):
        reload(tmp_path)
    save_file(tensors, path)
    with pytest.raises(MatrixError, match="no complete matrix file"):
        describe(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": "null"}, {"shape": "3"}, {"shape": "[1, 2, 3]"}, {"shape": '["a", "b"]'}, {"shape": "[-1, 60]"},
        {"shape": "[true, 60]"}, {"shape": "[" * 100_000}, {"shape": "{}"}, {"identity": "null"}, {"identity": "[]"},
        {"mean_dropped_mass": "nan"}, {"build_seconds": "x"}, {"build_seconds": "inf"},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_says_what_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    path = built(tmp_path)
    tensors, metadata = content(path)
    save_file(tensors, path, metadata={**metadata, **wrong})
    with pytest.raises(MatrixError, match="is damaged: it is no complete matrix file.*Delete it"):
        reload(tmp_path)


def test_a_header_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = built(tmp_path)
    tensors, metadata = content(path)
    for shape in ([len(MEMBERS[0].vocabulary), 3], [7, len(ANCHORS)]):
        save_file(tensors, path, metadata={**metadata, "shape": json.dumps(shape)})
        with pytest.raises(MatrixError, match="is damaged: its header says"):
            reload(tmp_path)


@pytest.mark.parametrize("folder", ["x" * 300, "a\0b", "x/" * 3000], ids=["long", "NUL", "deep"])
def test_a_folder_that_no_system_makes_is_named(tmp_path: Path, folder: str) -> None:
    store = MatrixStore(tmp_path / folder, progress=False)
    with pytest.raises(MatrixError, match=r"Matrix folder .* cannot be used .*matrix_dir"):
        store.get(MEMBERS[0], ANCHORS, SPARSE)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="drop"):
        MatrixStore(tmp_path, progress=False).get(MEMBERS[0], ANCHORS, MatrixSpec("cosine", 1.0, 2))
    assert visible(tmp_path) == []


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(MatrixError, match=r"cannot be used \(No space left.*matrix_dir"):
        MatrixStore(tmp_path, progress=False).get(MEMBERS[0], ANCHORS, SPARSE)
    assert visible(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MatrixError, match="Matrix folder .*file/sub cannot be used"):
        MatrixStore(tmp_path / "file" / "sub", progress=False).get(MEMBERS[0], ANCHORS, SPARSE)


def test_an_error_of_the_member_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    def unreadable():
        raise OSError("weights are gone")

    broken = replace(MEMBERS[0], load_embeddings=unreadable)
    with pytest.raises(OSError, match="weights are gone"):
        MatrixStore(tmp_path, progress=False).get(broken, ANCHORS, SPARSE)
    assert visible(tmp_path) == []


def build_slowly(folder: str, barrier, built_by) -> None:
    original = store_module.build_matrix

    def slow(*args, **kwargs):
        with built_by.get_lock():
            built_by.value += 1
        time.sleep(0.3)
        return original(*args, **kwargs)

    store_module.build_matrix = slow
    barrier.wait()
    MatrixStore(folder, progress=False).get(MEMBERS[0], ANCHORS, SPARSE)


def test_two_processes_build_one_matrix_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, built_by = context.Barrier(2), context.Value("i", 0)
    workers = [context.Process(target=build_slowly, args=(str(tmp_path), barrier, built_by)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert built_by.value == 1
    assert len(visible(tmp_path)) == 1


KILLED = """
import sys, time
sys.path[:0] = {tests!r}
import safetensors.torch
from test_store import ANCHORS, MEMBERS, SPARSE, MatrixStore

def half(tensors, path, metadata):
    open(path, "wb").write(b"half")
    print("writing", flush=True)
    time.sleep(60)

safetensors.torch.save_file = half
MatrixStore({folder!r}, progress=False).get(MEMBERS[0], ANCHORS, SPARSE)
"""


def test_a_builder_killed_while_writing_leaves_no_matrix_and_holds_no_lock(tmp_path: Path) -> None:
    code = KILLED.format(tests=[str(folder) for folder in list(Path(__file__).parents)[:2]], folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.glob("*.safetensors"))
    path = built(tmp_path)  # neither the dead builder's lock nor its half file is in the way
    assert visible(tmp_path) == [path.name]


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert MatrixStore().folder == default_folder() == tmp_path / "lm_eval_deepen" / "matrices"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "lm_eval_deepen" / "matrices"
    assert MatrixStore(tmp_path / "mine").folder == tmp_path / "mine"


def test_matrices_in_use_are_shared_and_others_are_released(tmp_path: Path) -> None:
    before = len(store_module._in_use)
    one = member("x", vocabulary(90, tag="a"), 16, 5)
    kept, again = (MatrixStore(tmp_path, progress=False).get(one, ANCHORS, SPARSE) for _ in range(2))
    assert kept is again and len(store_module._in_use) == before + 1
    path = MatrixStore(tmp_path).path(one, ANCHORS, SPARSE)
    path.write_bytes(path.read_bytes()[:-1])  # what is in use says nothing about a file that has changed since
    with pytest.raises(MatrixError, match="damaged"):
        MatrixStore(tmp_path, progress=False).get(one, ANCHORS, SPARSE)
    del kept, again
    assert len(store_module._in_use) == before


@pytest.mark.parametrize("spec", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_device_holds_one_copy_of_a_matrix_while_it_is_used(tmp_path: Path, spec: MatrixSpec) -> None:
    matrix, same = (MatrixStore(tmp_path, progress=False).get(MEMBERS[0], ANCHORS, spec) for _ in range(2))
    kept = matrix.to("meta")
    assert matrix.to("cpu") is matrix and same.to(torch.device("meta")) is kept is kept.to("meta")
    tensors = [value for value in vars(kept).values() if isinstance(value, torch.Tensor)]
    assert kept.shape == matrix.shape and {value.device.type for value in tensors} == {"meta"}
    released = weakref.ref(kept)
    del kept, tensors
    gc.collect()
    assert released() is None


def test_what_a_long_build_costs_is_said_after_two_seconds_of_it(monkeypatch, caplog):
    now = iter(range(0, 1000, 3))  # seconds: a block takes three
    monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    found = list(blocks.blocks("alignment of B", 1_000, 3, True))
    assert found[0] == slice(0, 3) and found[-1] == slice(999, 1_000)
    assert [record.getMessage() for record in caplog.records] == [
        "alignment of B: 1,000 rows take about 16.7 minutes here; it is built once."
    ]
    caplog.clear()
    list(blocks.blocks("alignment of B", 6, 3, True))
    list(blocks.blocks("alignment of B", 1_000, 3, False))
    assert not caplog.records
