"""Rows that are fused on several threads: the same rows as on one, in their order; errors come through."""

import os

import pytest
import torch

from lm_eval_deepen.fusion._threads import in_parts

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "largest"), [(0, 4), (1, 4), (2, 1), (7, 2), (8, 100), (9, 3)])
def test_parts_cover_the_rows_once_and_in_order(rows: int, largest: int, threads: int):
    given = torch.arange(rows)
    found = in_parts(rows, largest, CPU, lambda part: given[part] * 2)
    assert torch.equal(torch.cat(found), given * 2)
    assert max(len(part) for part in found) <= largest
    assert len(found) >= min(rows, threads)
    assert torch.get_num_threads() == threads


def test_another_device_gets_parts_as_large_as_they_may_be(threads: int):
    assert in_parts(8, 5, torch.device("meta"), lambda part: part) == [slice(0, 5), slice(5, 10)]


def test_parts_write_into_tensors_of_inference_mode_and_of_none(threads: int):
    for inference in (True, False):
        with torch.inference_mode(inference):
            out = torch.zeros(6)
            in_parts(6, 6, CPU, lambda part, out=out: out[part].add_(1))
        assert out.tolist() == [1.0] * 6


def test_workers_use_one_thread_each_and_track_no_gradients(threads: int):
    weight = torch.ones(4, requires_grad=True)
    found = in_parts(4, 2, CPU, lambda part: (torch.get_num_threads(), (weight[part] * 2).requires_grad))
    if threads > 1:
        assert set(found) == {(1, False)}


def test_an_error_of_a_part_is_the_call_s(threads: int):
    def work(part: slice) -> None:
        raise ValueError(f"part from {part.start}")

    with pytest.raises(ValueError, match="part from 0"):
        in_parts(4, 1, CPU, work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_workers_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_parts(4, 1, CPU, lambda part: None)
        child = os.fork()
        if not child:
            os._exit(0 if in_parts(4, 1, CPU, lambda part: part.start) == [0, 1, 2, 3] else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
