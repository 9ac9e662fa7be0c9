"""The harness's view of an ensemble: requests in, results out, nothing else."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils
from lm_eval.api.model import CacheHook
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from lm_eval_deepen.caches import claim
from lm_eval_deepen.config import EnsembleConfig, parse_config
from lm_eval_deepen.distributed import Ranks, shared
from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.decoding import Generation, Job, generate
from lm_eval_deepen.engine.drafting import drafter
from lm_eval_deepen.engine.memory import nodes_per_forward, safe_batch
from lm_eval_deepen.engine.prompting import Prompter, Span
from lm_eval_deepen.engine.rolling import rolling_spans
from lm_eval_deepen.engine.scoring import FORWARDS_PER_ROUND, SpanScore, score
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.fusion import option_classes
from lm_eval_deepen.main_member import MainMemberView
from lm_eval_deepen.member.devices import existing_devices
from lm_eval_deepen.member.member import loading_keys
from lm_eval_deepen.member.sampling import Sampler, row_generator

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

TRANSFORMERS_SAMPLING = {"top_k": 50}  # what `generate` does where a request samples and names no top_k
ROUND_BATCHES = 4  # a kill loses the texts of at most a round, and a round's last batches are not full
# What the command line gives as the device where its user gives none.
COMMAND_LINE_DEVICE = {field.name: field.default for field in fields(EvaluatorConfig)}["device"]
AUTO_BATCH_TOKENS = 16_384  # `batch_size: auto` packs about this many tokens


def configure(arguments: dict[str, Any]) -> EnsembleConfig:
    """Return the configuration for `arguments` as the harness hands them over.

    Raises:
        ConfigError: an argument that cannot be honoured.
    """
    return parse_config(arguments, loading_keys=loading_keys(), methods=option_classes())


class DeepenLM(MainMemberView):
    """Several causal language models, evaluated as one from their fused next-token distribution.

    Processes of one launch share requests inside the request methods; ``rank`` and ``world_size`` stay those of
    a single process (see `lm_eval_deepen.distributed`).
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
        self.ensemble_config = configure({"pretrained": pretrained, **arguments})
        self.ranks = Ranks.join(self.ensemble_config)
        self.ensemble = Ensemble.load(self.ensemble_config, device)
        self.traces = [self.ensemble.trace]  # of all processes
        self._prompter = Prompter(self.ensemble)
        self._device = self.ensemble.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> DeepenLM:
        """Create the model from ``key=value,...`` or JSON; arguments named there win over the command line's."""
        if arg_string.lstrip().startswith("{"):
            return cls.create_from_arg_obj(json.loads(arg_string), additional_config)
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> DeepenLM:
        """Create the model from a mapping; arguments named there win over the command line's."""
        outer = {key: value for key, value in (additional_config or {}).items() if value is not None}
        device = outer.get("device")
        if device == COMMAND_LINE_DEVICE and device not in existing_devices():
            log.info("no device %r, the command line's default: members that name none load on the CPU.", device)
            del outer["device"]
        return cls(**{**outer, **arg_dict})

    def get_model_info(self) -> dict[str, Any]:
        """Return what ``hf`` reports of the main member, and everything about the ensemble under ``deepen``."""
        counts = Trace.total(self.traces).summary()
        return {**self._main.get_model_info(), "deepen": {**self.ensemble.describe(), **counts}}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Tie a response cache to this ensemble: its keys hold the request alone.

        Raises:
            CacheError: the cache belongs to another ensemble.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            claim(cache_hook.dbdict, self.ensemble_config.fingerprint(), self.ranks)

    # The three request types.

    @shared
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, is_greedy) of each continuation after its context."""
        self._refuse_thinking(requests)
        spans = [self._prompter.span(*request.args) for request in requests]
        answers: list[Any] = [None] * len(spans)
        for index, found in self._score(spans, disable_tqdm, "loglikelihood"):
            answers[index] = (found.total, found.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index].args, answers[index])
        return answers

    @shared
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability (nats) of each whole text."""
        owners: list[int] = []
        spans: list[Span] = []
        ends: list[int] = []
        for index, request in enumerate(requests):
            found = rolling_spans(self.ensemble, request.args[0])
            spans += found
            owners += [index] * len(found)
            ends.append(len(spans))
            if not found:
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, 0.0)
        left = Counter(owners)
        totals = [0.0] * len(requests)
        for at, result in self._score(spans, disable_tqdm, "loglikelihood_rolling", ends):
            index = owners[at]
            totals[index] += result.total
            left[index] -= 1
            if not left[index]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, totals[index])
        return totals

    @shared
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text of each request, stop strings removed."""
        repeats: Counter[str] = Counter()
        jobs, stops = [], []
        for request in requests:
            context, arguments = request.args
            job, until = self._job(context, arguments, repeats)
            jobs.append(job)
            stops.append(until)
        texts: list[Any] = [None] * len(jobs)
        size = self._batch(max((len(job.prompts[0].ids) + job.max_new for job in jobs), default=1))
        progress = self._progress(len(jobs), disable_tqdm, "generate_until")
        drafts = drafter(self.ensemble_config.speculate)
        for index, found in generate(self.ensemble, jobs, size, drafts):
            texts[index] = self._text(found, stops[index])
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
            progress.update()
        progress.close()
        self.ensemble.trace.record_drafts(drafts.counts, drafts.near_ties)
        return texts

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """Score token requests of the main member; the harness calls this through `loglikelihood` only."""
        raise NotImplementedError("an ensemble scores text: call loglikelihood with (context, continuation)")

    def _score(
        self, spans: Sequence[Span], disable_tqdm: bool, what: str, ends: Sequence[int] = ()
    ) -> Iterator[tuple[int, SpanScore]]:
        """Score spans, in rounds that finish whole texts where `ends` tells how many spans end each of them."""
        lengths = [len(span.prompts[0].ids) + len(span.target) for span in spans]
        nodes = nodes_per_forward(self.ensemble, self._batch(max(lengths, default=1)) * max(lengths, default=1))
        progress = self._progress(len(spans), disable_tqdm, what)
        start = 0
        for end in [*ends, len(spans)]:
            if sum(lengths[start:end]) < FORWARDS_PER_ROUND * nodes and end < len(spans):
                continue
            for index, found in score(self.ensemble, spans[start:end], nodes):
                yield start + index, found
                progress.update()
            start = end
        progress.close()

    def _progress(self, total: int, disable_tqdm: bool, what: str) -> tqdm:
        return tqdm(total=total, disable=disable_tqdm or self.ranks.index != 0, desc=f"Running {what} requests")

    def _batch(self, longest: int) -> int:
        """Return the batch size for texts of at most `longest` tokens; ``auto`` asks the memory model."""
        size = self.ensemble_config.batch_size
        if isinstance(size, int):
            return size
        return safe_batch(self.ensemble, longest, self.ensemble_config.max_batch_size)

    def _refuse_thinking(self, requests: Sequence[Instance]) -> None:
        if any(member.lm.enable_thinking for member in self.ensemble.active):
            names = sorted({request.task_name for request in requests if request.task_name})
            raise RequestError(
                f"enable_thinking=True is not compatible with loglikelihood tasks; triggered by {', '.join(names)}. "
                "Use generative tasks, or leave enable_thinking out."
            )

    def _job(self, context: str, arguments: dict, repeats: Counter[str]) -> tuple[Job, list[str]]:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(list(kwargs.pop("until")), eos=eos)
        max_new = kwargs.pop("max_gen_toks")
        prompts = self._prompter.prompts(context, max_new)
        if "max_length" in kwargs:
            max_new = kwargs.pop("max_length") - len(prompts[0].ids)
        sampler = Sampler.parse(kwargs, self._sampling_defaults())
        generator = None
        if sampler.do_sample:
            repeats[context] += 1
            generator = row_generator(torch.initial_seed(), context, str(repeats[context]))
        dummy = not self._prompter.solo and not context and self.ensemble.main.codec.dummy
        stops = tuple(stop for stop in until if stop)
        return Job(prompts, max_new, stops, sampler, generator, dummy), until

    def _sampling_defaults(self) -> dict[str, Any]:
        """Return what ``generate`` falls back on; the main member's own config only where it is alone, as ``hf``."""
        config = getattr(self._main.model, "generation_config", None)
        own = config.to_diff_dict() if self._prompter.solo and config is not None else {}
        return TRANSFORMERS_SAMPLING | {key: value for key, value in own.items() if value is not None}

    def _text(self, found: Generation, until: list[str]) -> str:
        """Return a generation as ``hf`` presents it: stop strings and thinking removed."""
        ids, end = found.ids, self._main.think_end_token
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
        text = self.tok_decode(ids)
        if isinstance(end, int):
            text = text.lstrip()
        return postprocess_generated_text(
            text, stop=until, think_end_token=end if isinstance(end, str) else None
        )
