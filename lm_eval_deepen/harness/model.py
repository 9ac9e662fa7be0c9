"""The harness's view of an ensemble: requests in, results out, nothing else."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import CacheHook
from lm_eval.config.evaluate_config import EvaluatorConfig
from tqdm import tqdm

from lm_eval_deepen.config import Catalogue, EnsembleConfig, parse_config
from lm_eval_deepen.config.yaml_files import parse_json, refuse_repeated
from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.self_check import examine
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.fusion import METHODS
from lm_eval_deepen.harness.closing import tell_at_the_end
from lm_eval_deepen.harness.command import end_in_one_line
from lm_eval_deepen.harness.distributed import Ranks, shared
from lm_eval_deepen.harness.main_member import MainMemberView
from lm_eval_deepen.harness.pooled import Pool
from lm_eval_deepen.harness.requests import RequestHandler
from lm_eval_deepen.harness.response_cache import claim, keep, settling
from lm_eval_deepen.harness.step_files import StepFiles, choosing, folder_of, samples_folder
from lm_eval_deepen.harness.unanswered import SetAside, Unanswered, attempt, complete, unanswered
from lm_eval_deepen.member import Member
from lm_eval_deepen.member.devices import existing_devices, give_back_freed_memory
from lm_eval_deepen.member.loading import loading_keys
from lm_eval_deepen.member.model_files import digests
from lm_eval_deepen.pooling import POOLINGS
from lm_eval_deepen.storage import cache_bound
from lm_eval_deepen.weighting import WEIGHTINGS

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

# What the command line gives as the device where its user gives none.
COMMAND_LINE_DEVICE = {field.name: field.default for field in fields(EvaluatorConfig)}["device"]


@cache
def catalogue() -> Catalogue:
    """Return what ensembles can be made of."""
    return Catalogue(loading_keys(), {"method": METHODS, "weighting": WEIGHTINGS, "pooling": POOLINGS})


def configure(arguments: dict[str, Any], alike: Collection[str] = ()) -> EnsembleConfig:
    """Return the configuration for `arguments` as the harness hands them over; `alike` as `parse_config` takes it.

    Raises:
        ConfigError: an argument that cannot be honoured.
        StorageError: a bound of the cache folder that is no size.
    """
    cache_bound()
    return parse_config(arguments, catalogue(), alike)


class DeepenLM(RequestHandler):
    """Several causal language models, evaluated as one from their fused next-token distribution.

    Processes of one launch share requests inside the request methods; ``rank`` and ``world_size`` stay those of
    a single process (see `lm_eval_deepen.harness.distributed`).
    """

    def __init__(self, pretrained: str | None = None, **arguments: Any) -> None:
        """Load an ensemble.

        Args:
            pretrained: the main member, or a YAML file that describes the ensemble.
            arguments: members, weights, method and its options, and every loading argument of ``--model hf``;
                ``device`` is where members load that name no device of their own.

        Raises:
            DeepenError: bad arguments, or a member that cannot take part.
        """
        super().__init__()
        if pretrained is None:
            raise ConfigError(
                "pretrained is missing: give the main member, which is the first of members, or an ensemble file. "
                "The harness names the output folder after it."
            )
        device = arguments.pop("device", None)
        config = configure({"pretrained": pretrained, **arguments})
        folder_of(config)  # before anything loads
        ranks = Ranks.join(config)
        if config.trace is not None and ranks.slices > 1:
            raise ConfigError(
                "trace needs members that are whole in a process, and tp_plan divides them; leave one out"
            )
        self._adopt(Ensemble.load(config, device), ranks)
        if config.trace is not None:
            self.step_files = StepFiles(config, ranks.index, ranks.count)
        tell_at_the_end(self)

    @classmethod
    def around(cls, config: EnsembleConfig, members: Sequence[Member]) -> DeepenLM:
        """Return the model of a configuration whose members are loaded already, for this process alone."""
        model = cls.__new__(cls)
        MainMemberView.__init__(model)
        model._adopt(Ensemble.assemble(config, members), Ranks())
        return model

    def _adopt(self, ensemble: Ensemble, ranks: Ranks) -> None:
        self.adopt(ensemble)
        self.ranks = ranks
        self.traces = [ensemble.counters]
        self._device = ensemble.device
        self.pool = None
        if ensemble.config.pooling is not None:
            self.pool = Pool(ensemble.config, self, ensemble.members, self.around)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> DeepenLM:
        """Create the model from ``key=value,...`` or JSON; arguments named there win over the command line's."""
        end_in_one_line()
        if arg_string.lstrip().startswith("{"):
            return cls.create_from_arg_obj(parse_json(arg_string, "--model_args"), additional_config)
        refuse_repeated(arg_string, "--model_args")
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> DeepenLM:
        """Create the model from a mapping; arguments named there win over the command line's."""
        end_in_one_line()
        outer = {key: value for key, value in (additional_config or {}).items() if value is not None}
        device = outer.get("device")
        if device == COMMAND_LINE_DEVICE and device not in existing_devices():
            log.info(
                "no device %r here, which is the command line's default: members that name no device load on the CPU.",
                device,
            )
            del outer["device"]
        return cls(**{**outer, **arg_dict})

    def get_model_info(self) -> dict[str, Any]:
        """Return what ``hf`` reports of the main member, and everything about the ensemble under ``deepen``."""
        counts = Trace.total(self.traces).summary()
        described = {**self.ensemble.describe(), **counts, "self_check": self.findings}
        if self.ensemble_config.evidence:
            described["evidence"] = self.ensemble_config.to_dict()["evidence"]
        return {**self._main.get_model_info(), "deepen": described}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Tie a response cache to this ensemble: its keys hold the request alone.

        Raises:
            CacheError: the cache belongs to another ensemble, or to other weights under the same names.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            models = digests(self.ensemble_config.members)
            claim(cache_hook.dbdict, self.ensemble_config.fingerprint(), models, self.ranks)

    @property
    def source(self) -> RequestHandler | Pool:
        """What answers: the fused ensemble, or its members by themselves."""
        return self if self.pool is None else self.pool

    # The three request types.

    @complete
    @choosing
    @shared
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, is_greedy) of each continuation after its context."""
        if any(member.config.loading_dict().get("enable_thinking") for member in self.ensemble.active):
            names = sorted({request.task_name for request in requests if request.task_name})
            raise RequestError(
                f"enable_thinking=True is not compatible with loglikelihood tasks; triggered by {', '.join(names)}. "
                "Use generative tasks, or leave enable_thinking out."
            )
        return self._answer("loglikelihood", requests, disable_tqdm)

    @complete
    @choosing
    @shared
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability (nats) of each whole text."""
        return self._answer("loglikelihood_rolling", requests, disable_tqdm)

    @complete
    @choosing
    @shared
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text of each request, stop strings removed."""
        return self._answer("generate_until", requests, disable_tqdm)

    def _answer(self, kind: str, requests: list[Instance], disable_tqdm: bool) -> list[Any]:
        """Return the answers, each of which goes into the response cache as soon as it is there, or a `SetAside`."""
        if self.findings is None and self.ensemble_config.self_check and self.ranks.index == 0:
            self.findings = examine(self.ensemble)  # before the first request
            for warning in self.findings.get("warnings", ()):
                log.warning("%s: %s", warning["code"], warning["message"])
        give_back_freed_memory()  # of the self-check, and of requests of another kind
        self.results_in = samples_folder()
        answers: list[Any] = [None] * len(requests)
        before = Counter(self.ensemble.counters.outgrown)
        quiet = disable_tqdm or not self.ranks.speaks
        told = False
        progress = tqdm(total=len(requests), disable=quiet, desc=f"Running {kind} requests")
        with progress, settling(self.cache_hook):
            for index, answered in self.source.answers(kind, requests):
                answer = answered
                # harness 0.5 asks for a text as for a continuation of "", and wants a pair
                if (
                    kind == "loglikelihood_rolling"
                    and len(requests[index].args) > 1
                    and not isinstance(answer, SetAside)
                ):
                    answer = (answer, False)
                answers[index] = answer
                if not isinstance(answer, SetAside):
                    if self.step_files is not None and self.cache_hook.dbdict is not None:
                        self.step_files.flush()  # first: the run that goes on from a kill does not ask again
                    keep(self.cache_hook, kind, requests[index].args, answer)
                elif not told:  # at once, so that a person may rather end the run now
                    told = True
                    log.warning(
                        "task %r, document %s cannot be answered: %s Other requests are answered first, then the run "
                        "ends with a list of all those that cannot.",
                        requests[index].task_name,
                        requests[index].doc_id,
                        answer.reason,
                    )
                progress.update()
        steps = self.ensemble.counters.outgrown - before
        for member in self.ensemble.active:
            if steps[member.name]:
                log.warning(
                    "member %r abstained from %d steps, whose texts do not fit into its context of %d tokens: the "
                    "others answered them without it. Use fewer few-shots, a lower max_gen_toks, or leave the member "
                    "out.",
                    member.name,
                    steps[member.name],
                    member.max_length,
                )
        return answers

    def unprepared(self, kind: str, requests: Sequence[Instance]) -> list[Unanswered]:
        """Return the requests that cannot be answered, without answering the others."""
        prepared = [attempt(self.source.prepare, kind, request) for request in requests]
        return unanswered(requests, prepared)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """Score token requests of the main member; the harness calls this through `loglikelihood` only."""
        raise NotImplementedError("an ensemble scores text: call loglikelihood with (context, continuation)")
