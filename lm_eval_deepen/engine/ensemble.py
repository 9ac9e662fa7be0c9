"""Members plus a fuser: one model made of several."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.drafts import Drafter
from lm_eval_deepen.engine.evidence import evidence
from lm_eval_deepen.engine.following import BatchRow, Follower, Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.memory import nodes_per_forward
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import SpanScore, score, total
from lm_eval_deepen.engine.selective import Selective
from lm_eval_deepen.engine.stretches import StretchPrompter, read_stretches, weighed, with_evidence
from lm_eval_deepen.engine.texts import GeneratedText, NextPiece, ScoredText, Texts
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.fusion.base import Fuser, MemberView, Spelling
from lm_eval_deepen.member import Member, Prompt, load_member
from lm_eval_deepen.member.devices import give_back_freed_memory
from lm_eval_deepen.member.loading import check_loading, preview_vocabularies
from lm_eval_deepen.member.tokenizer_files import load_tokenizer
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary import ByteVocab
from lm_eval_deepen.weighting.bayes import Bayes

_loaded: WeakSet[Ensemble] = WeakSet()  # what was loaded and is not freed yet


@dataclass(eq=False)
class Ensemble(EnsembleBase):
    """Several members evaluated as one model; its attributes are those of `EnsembleBase`."""

    @classmethod
    def load(cls, config: EnsembleConfig, device: str | None = None) -> Ensemble:
        """Load every member, then prepare fusion (matrices are built on first use).

        Raises:
            ConfigError: a loading argument that an ensemble cannot honour.
            MemberError: a member cannot be loaded; never replaced by the others.
            VocabularyError: a tokenizer without a byte mapping, or members without common anchors.
            MatrixError: a relative matrix that cannot be used.
        """
        check_loading(config.members, device)
        if _loaded:  # they hold themselves in circles, and reading tokenizers collects nothing
            gc.collect()
        tokenizers: list[Any] = [None] * len(config.members)
        if fuses(config):
            tokenizers = [load_tokenizer(member) for member in config.members]
            check_vocabularies(config, preview_vocabularies(config.members, tokenizers))
        loaded = zip(config.members, tokenizers, strict=True)
        ensemble = cls.assemble(config, tuple(load_member(member, device, tokenizer) for member, tokenizer in loaded))
        _loaded.add(ensemble)
        give_back_freed_memory()  # what reading vocabularies took
        return ensemble

    @classmethod
    def assemble(cls, config: EnsembleConfig, members: Sequence[Member], fuser: Fuser | None = None) -> Ensemble:
        """Build the ensemble around members that are loaded already, the main one first.

        A `fuser` is one that was built for these members by the same method and options.
        """
        weights = torch.tensor([member.weight for member in config.members], dtype=torch.float32)
        if not fuses(config):
            fuser = None
        elif fuser is None:
            fuser = config.options.build([view(member) for member in members], MatrixStore(config.matrix_dir))
        names = [member.name for member in members]
        weigher = config.weighting_options.build() if fuser and config.weighting_options is not None else None
        learns = isinstance(weigher, Bayes)  # from what there is: nothing, of a source
        _check_specialists(config, members, weigher is not None and weigher.reads_prompts and not learns)
        _check_thinking(config, members)
        selective = None
        if fuser and config.skip_when != "never":
            selective = Selective(config.skip_when, config.skip_above, config.skip_check)
        ensemble = cls(config, tuple(members), fuser, weights, Trace(names), weigher, selective)
        if weigher is not None and (prompts := getattr(weigher, "prompts", None)):  # those of a router
            weigher.learn(embedded(ensemble, prompts))
        return ensemble

    def generate(self, texts: Sequence[str], *, traced: bool = False, **arguments: Any) -> tuple[GeneratedText, ...]:
        """Continue texts, `batch_size` of the configuration at a time; the harness's `generate_until` gives the same.

        Args:
            texts: the prompts.
            traced: whether each text comes with its steps.
            arguments: how, as a task's `generation_kwargs`: `until`, `max_gen_toks` (256), `do_sample`, `temperature`.
                What is drawn at random depends on torch's seed, the prompt, and how often it is among `texts` before.

        Raises:
            RequestError: a prompt or an argument that cannot be honoured.
        """
        self._require_steps("generate")
        if traced and self.by_words:
            raise RequestError(f"method={self.config.method} writes whole words, which have no steps; leave out traced")
        if traced and arguments.get("do_sample") and self.config.sampling == "member" and self.fuser is not None:
            raise RequestError(
                "sampling=member asks one member at a time, and traced=True wants what all members said at each step; "
                "leave out one of the two"
            )
        own, repeats = Texts(self), Counter[tuple]()
        if own.prompter.solo:
            self.main.check_generation()
        jobs = [own.job(prompt, arguments, repeats) for prompt in texts]
        found: dict[int, GeneratedText] = {}
        for index, one in own.generations([replace(job, traced=traced) for job, _ in jobs]):
            if one.refusal:
                raise RequestError(f"prompt {index}: {one.refusal}")
            text = own.finished(one, jobs[index][1])
            found[index] = GeneratedText(texts[index], text, tuple(one.logp), one.reason, tuple(one.steps))
        return tuple(found[index] for index in range(len(texts)))

    def score(
        self, context: str | Sequence[str], continuations: Sequence[str], *, traced: bool = False
    ) -> tuple[ScoredText, ...]:
        """Score continuations, all in one pass; the harness's `loglikelihood` gives the same.

        Args:
            context: what comes before: one for all, or one for each.
            continuations: what is scored.
            traced: whether each score comes with its steps.

        Raises:
            RequestError: a text that cannot be scored, or steps of a method that scores by stretches.
        """
        self._require_steps("score")
        if traced:
            self._require_no_stretches("leave out traced")
        contexts = [context] * len(continuations) if isinstance(context, str) else list(context)
        if len(contexts) != len(continuations):
            raise RequestError(
                f"{len(contexts)} contexts for {len(continuations)} continuations; give one, or one for each"
            )
        self.require_scoring()
        own, pairs = Texts(self), list(zip(contexts, continuations, strict=True))
        if self.by_stretches:
            prompter = StretchPrompter(self)
            kept = [with_evidence(prompter.span(*pair), self.prompt_stretches or 0) for pair in pairs]
            nodes = nodes_per_forward(self, own.batch(1))
            readings = dict(read_stretches(self.active, kept, nodes, self.experts.powers))
            stretches = [weighed(self, readings[index]) for index in range(len(pairs))]
            return tuple(
                ScoredText(*pair, one.total, one.greedy, tuple(one.logp))
                for pair, one in zip(pairs, stretches, strict=True)
            )
        spans = [replace(own.prompter.span(*pair), traced=traced) for pair in pairs]
        scores = dict(score(self, spans, own.nodes(spans)))
        return tuple(_scored(pair, [scores[index]], scores[index].total) for index, pair in enumerate(pairs))

    def trace(self, text: str) -> ScoredText:
        """Return what every member said at each token of a text; its score is the harness's `loglikelihood_rolling`.

        Raises:
            RequestError: a text that cannot be scored, or a method that scores by stretches and has no steps.
        """
        self._require_steps("trace")
        self._require_no_stretches("use score for the score")
        self.require_scoring()
        spans = [replace(span, traced=True) for span in rolling_spans(self, text)]
        scores = dict(score(self, spans, Texts(self).nodes(spans)))
        windows = [scores[index] for index in range(len(spans))]
        return _scored(("", text), windows, total(self, windows) if windows else 0.0)

    def _require_no_stretches(self, remedy: str) -> None:
        if self.by_stretches:
            raise RequestError(
                f"method={self.config.method} scores texts by stretches, which have no steps; {remedy}, or use "
                "generate(..., traced=True) for the steps of a text"
            )

    def _require_steps(self, what: str) -> None:
        if self.config.pooling is not None:
            raise RequestError(
                f"pooling={self.config.pooling} combines whole answers, and {what} fuses steps; remove pooling, "
                "or use DeepenLM"
            )

    def next_logp(self, text: str) -> NextPiece:
        """Return the log-probabilities [K] of the pieces that may follow a text: the first step of `generate`.

        Raises:
            RequestError: a text that the main member cannot spell.
        """
        self._require_steps("next_logp")
        kept = _Kept()
        list(generate(self, [Job(Prompter(self).prompts(text, 1), 1)], 1, kept))
        return NextPiece(text, kept.logp.float(), self.pieces)


class _Kept(Drafter):
    """Proposes nothing, and keeps the distribution that was read last."""

    logp: Tensor

    def note(self, row: BatchRow, logp: Tensor) -> None:
        self.logp = logp


def _scored(pair: tuple[str, str], windows: Sequence[SpanScore], total: float) -> ScoredText:
    steps = tuple(window.steps[at] for window in windows for at in sorted(window.steps))
    logp = tuple(value for window in windows for value in window.logp)
    return ScoredText(*pair, total, all(window.greedy for window in windows), logp, steps)


def fuses(config: EnsembleConfig) -> bool:
    """Return whether distributions are fused at all: several members, not all weight on the main one."""
    return config.fuses_steps and len(config.members) > 1 and (config.weights_change or config.members[0].weight < 1)


def embedded(ensemble: EnsembleBase, texts: Sequence[str]) -> list[Tensor | None]:
    """Return the main member's embedding [d] of every text, None where it is not evidence; see `PromptLoss`."""
    prompts = [Prompter(ensemble).prompts(text) for text in texts]
    wanted = [evidence(ensemble, own)[0] for own in prompts]
    losses = Follower(ensemble, 0).prefill([own[0] for own in prompts], wanted)
    return [None if loss is None else loss.embedding for loss in losses]


def check_vocabularies(config: EnsembleConfig, vocabularies: Sequence[ByteVocab]) -> None:
    """Refuse members whose vocabularies cannot be fused, before any weight is loaded.

    Raises:
        VocabularyError: one that the method cannot use.
    """
    if len(vocabularies) == len(config.members) and hasattr(config.options, "check"):
        config.options.check(vocabularies, [member.name for member in config.members])


def view(member: Member) -> MemberView:
    """Return what fusion methods may know of a member."""
    codec = member.codec
    spelling = Spelling(lambda data: codec.follow(Prompt((), "", ()), data), str(codec.identity[0]))
    return MemberView(
        name=member.name,
        vocabulary=codec.vocab.events,
        load_embeddings=member.embeddings,
        load_fingerprint=lambda: member.embedding_fingerprint,
        load_output_embeddings=member.output_embeddings,
        load_output_fingerprint=lambda: member.output_fingerprint,
        spelling=spelling,
    )


def _check_specialists(config: EnsembleConfig, members: Sequence[Member], reads_prompts: bool) -> None:
    """Raise ConfigError for an option that needs a member that generates only to score, or to draft, a text."""
    for m, member in enumerate(members):
        if not member.generates_only:
            continue
        if reads_prompts:
            raise ConfigError(
                f"weighting={config.weighting} needs every member's loss on the prompt, and member {member.name!r} is "
                "an encoder-decoder model that scores no text. Give constant weights, or weighting=confidence."
            )
        if config.speculate == "draft" or (m == 0 and config.speculate != "off"):
            raise ConfigError(
                f"speculate={config.speculate} drafts tokens by members that continue the prompt, and member "
                f"{member.name!r} is an encoder-decoder model. Leave speculate out."
            )


def _check_thinking(config: EnsembleConfig, members: Sequence[Member]) -> None:
    """Raise ConfigError for an end of thinking, given as an id, that is no token, or not one of all that write."""
    end = members[0].lm.think_end_token
    if not isinstance(end, int):
        return
    writers = members if config.pooling is not None else members[:1]
    tokens = [member.lm.tokenizer.convert_ids_to_tokens(end) for member in writers]
    for member, token in zip(writers, tokens, strict=True):
        if token is None or token != tokens[0]:
            said = "is no token" if token is None else f"is {token!r}, and {tokens[0]!r} of the main member"
            raise ConfigError(
                f"member {member.name!r}: think_end_token={end} {said}, so thinking would stay in its answers. Give "
                "the token's text."
            )
