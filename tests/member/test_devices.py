"""Where members load: on a device that exists, as `HFLM` spells it, and never on another one in its place."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace

import pytest
import torch
from harness import by_default, requests
from lm_eval.models.huggingface import HFLM

from lm_eval_deepen import Ensemble
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness import model as host
from lm_eval_deepen.harness.distributed import refuse_fixed_devices
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.member.devices import existing_devices, place

ADVICE = "Give one of cpu, or leave device out: members then load on the first GPU where there is one, else on the CPU"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with a CPU alone; call it to give it GPUs."""

    def have(cuda: int = 0, xpu: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.xpu, "device_count", lambda: xpu)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    have()
    return have


@pytest.fixture
def untouched(monkeypatch):
    """Fail where a tokenizer or a model is loaded."""

    @functools.wraps(HFLM.__init__)  # members take the arguments that it names
    def refuse(*_, **__):
        raise AssertionError("loaded before the device was checked")

    monkeypatch.setattr(HFLM, "__init__", refuse)
    monkeypatch.setattr(HFLM, "_create_tokenizer", refuse)


def pair(pico, **second):
    paths = [str(pico["bytelevel"]), str(pico["metaspace"])]
    return {"pretrained": paths[0], "members": [{"pretrained": paths[0]}, {"pretrained": paths[1], **second}]}


def test_devices_of_a_machine(machine):
    assert existing_devices() == ("cpu",) and place(None, "here:") == "cpu"
    machine(cuda=2, xpu=1, mps=True)
    assert existing_devices() == ("cpu", "cuda:0", "cuda:1", "xpu:0", "mps:0")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, "cuda"),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        ("xpu", "xpu:0"),
        ("xpu:0", "xpu:0"),
        ("mps", "mps:0"),
        (torch.device("cuda", 1), "cuda:1"),
    ],
)
def test_a_device_is_spelled_as_hf_spells_it(machine, asked, expected):
    """`HFLM` takes `cpu:0` or `xpu`, which it does not list, for no device at all and loads on a GPU."""
    machine(cuda=2, xpu=1, mps=True)
    assert place(asked, "here:") == expected


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:7", "cpu:1", "mps", "xpu:0", "meta"])
def test_a_device_that_does_not_exist_is_named(asked):
    with pytest.raises(ConfigError, match=f"here: device='{asked}' does not exist on this machine. {ADVICE}"):
        place(asked, "here:")


def test_a_device_beyond_the_count_is_answered_with_those_there_are(machine):
    machine(cuda=2)
    with pytest.raises(ConfigError, match="'cuda:7' does not exist on this machine. Give one of cpu, cuda:0, cuda:1, "):
        place("cuda:7", "here:")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [("foo", "Expected one of cpu, cuda"), ("cuda:x", "Invalid device string"), (1, "a int is not"), ("", "")],
)
def test_what_is_no_device_at_all_is_an_error(asked, reason):
    with pytest.raises(ConfigError, match=f"here: device={asked!r} is not a device: .*{reason}.*. {ADVICE}"):
        place(asked, "here:")


@pytest.mark.parametrize("asked", ["cuda:1", "foo"])
def test_a_member_s_device_is_checked_before_anything_loads(pico, untouched, asked):
    with pytest.raises(ConfigError, match=f"member 'metaspace': device='{asked}'"):
        DeepenLM.create_from_arg_obj(pair(pico, device=asked), {"device": "cpu"})
    with pytest.raises(ConfigError, match=f"member 'metaspace': device='{asked}'"):
        Ensemble.load(configure(pair(pico, device=asked)))


@pytest.mark.parametrize("asked", ["cuda", "cuda:1", "foo"])
def test_the_ensemble_s_device_is_checked_wherever_it_is_given(pico, untouched, asked):
    arguments = pair(pico)
    for inner, outer in (({"device": asked}, {"device": "cpu"}), ({}, {"device": asked})):
        with pytest.raises(ConfigError, match=f"the ensemble: device='{asked}'"):
            DeepenLM.create_from_arg_obj({**arguments, **inner}, outer)
    with pytest.raises(ConfigError, match=f"the ensemble: device='{asked}'"):
        DeepenLM(**arguments, device=asked)


def test_a_device_in_an_ensemble_file_is_each_member_s(pico, untouched, tmp_path):
    file = tmp_path / "pair.yaml"
    file.write_text(f"members: [{pico['bytelevel']}, {pico['metaspace']}]\ndevice: cuda:3\n")
    with pytest.raises(ConfigError, match="member 'bytelevel': device='cuda:3' does not exist"):
        DeepenLM(str(file))


def test_the_command_line_s_default_needs_no_gpu(pico, caplog):
    """It hands over `cuda:0` where its user says nothing; whoever writes that into model_args means it."""
    assert host.COMMAND_LINE_DEVICE == "cuda:0"
    path = str(pico["bytelevel"])
    with caplog.at_level(logging.INFO, logger="lm_eval_deepen"):
        model = DeepenLM.create_from_arg_obj({"pretrained": path}, {"device": "cuda:0", "batch_size": None})
    assert model.device.type == "cpu" and "no device 'cuda:0'" in caplog.text
    with pytest.raises(ConfigError, match="the ensemble: device='cuda:0' does not exist"):
        DeepenLM.create_from_arg_obj({"pretrained": path, "device": "cuda:0"}, {"device": "cuda:0"})


def test_the_command_line_s_default_is_used_where_it_exists(machine, monkeypatch):
    machine(cuda=1)
    monkeypatch.setattr(DeepenLM, "__init__", lambda self, **arguments: vars(self).update(given=arguments))
    given = DeepenLM.create_from_arg_obj({"pretrained": "A"}, {"device": "cuda:0"}).given
    assert given == {"pretrained": "A", "device": "cuda:0"}


def test_members_reach_hf_with_their_own_devices(machine, pico, tmp_path, monkeypatch):
    """The model itself stays on the CPU here: what is shown is where each member is asked to load."""
    machine(cuda=2)
    asked, original = [], HFLM.__init__

    @functools.wraps(original)
    def load(self, *, device, **arguments):
        asked.append(device)
        machine()
        original(self, device="cpu", **arguments)
        self._device = torch.device(device)  # where it says it is
        machine(cuda=2)

    monkeypatch.setattr(HFLM, "__init__", load)
    arguments = {**pair(pico, device="cuda:1"), "matrix_dir": str(tmp_path)}
    model = DeepenLM.create_from_arg_obj(arguments, {"device": "cuda:0"})
    assert asked == ["cuda:0", "cuda:1"]
    assert [member.config.loading_dict().get("device") for member in model.ensemble.members] == [None, "cuda:1"]


def test_two_spellings_of_the_cpu_are_one_place(pico, tmp_path):
    arguments = {"matrix_dir": str(tmp_path), "batch_size": 2}
    members = pair(pico, device="cpu:0")
    members["members"][0]["device"] = "cpu"
    model = DeepenLM(**members, **arguments)
    expected = by_default(pico["bytelevel"], pico["metaspace"], **arguments)
    batch = requests("loglikelihood", ("The fox", " jumps"), ("café", " 🙂"))
    assert model.loglikelihood(batch) == expected.loglikelihood(batch)
    texts = requests("generate_until", ("The fox", {"until": ["\n"], "max_gen_toks": 4}))
    assert model.generate_until(texts) == expected.generate_until(texts)
    assert {member.runner.device for member in model.ensemble.members} == {torch.device("cpu")}


def test_several_processes_name_what_is_no_device(pico):
    config = configure(pair(pico, device="foo"))
    state = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="member 'metaspace': device='foo' is not a device"):
        refuse_fixed_devices(config, state)
