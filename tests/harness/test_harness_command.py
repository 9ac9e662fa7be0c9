"""The harness's own command ends in one line where we end it."""

from __future__ import annotations

import logging
import sys

import pytest

from lm_eval_deepen.harness.model import DeepenLM


@pytest.fixture
def command(monkeypatch):
    """Runs something as the harness's command does, and returns the hook that an error meets after it."""

    def run(call):
        names = {"__package__": "lm_eval", "call": call}
        exec("def cli_evaluate():\n    call()", names)
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        try:
            names["cli_evaluate"]()
        except BaseException:
            return sys.excepthook, sys.exc_info()
        raise AssertionError("nothing was raised")

    return run


@pytest.mark.parametrize("how", ["--verbosity=DEBUG", "logger"])
def test_the_traceback_is_there_for_who_asks(command, capsys, monkeypatch, how):
    hook, raised = command(lambda: DeepenLM.create_from_arg_obj({"pretrained": "m", "methd": "gac"}))
    logger = logging.getLogger("lm_eval")
    before = logger.level
    if how == "logger":
        logger.setLevel(logging.DEBUG)
    else:
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", how])
    try:
        with pytest.raises(SystemExit):
            hook(*raised)
    finally:
        logger.setLevel(before)
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.endswith(f"error: {raised[1]}\n")


def test_an_interrupt_is_one_line_and_other_errors_are_as_they_were(command, capsys):
    def broken():
        DeepenLM.create_from_arg_obj({"pretrained": object()})

    hook, _ = command(broken)
    with pytest.raises(SystemExit) as ended:
        hook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; a response cache (--use_cache) has what was answered\n"
    hook(ZeroDivisionError, ZeroDivisionError("a fault"), None)
    assert "ZeroDivisionError: a fault" in capsys.readouterr().err
