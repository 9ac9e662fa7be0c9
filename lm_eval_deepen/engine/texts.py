"""Texts in, texts out: what the harness's requests and calls from Python have in common.

`Texts` turns a prompt with generation arguments into a job and a finished generation into its text. The dataclasses
are what the calls of `Ensemble` return.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.drafts import drafter
from lm_eval_deepen.engine.following import Generation, Job, piece_of, text_of_bytes
from lm_eval_deepen.engine.generation import Decoder, generate
from lm_eval_deepen.engine.memory import nodes_per_forward, safe_batch
from lm_eval_deepen.engine.prompts import Prompter, Span
from lm_eval_deepen.engine.sampling_by_turns import TurnDecoder, takes_turns
from lm_eval_deepen.engine.steps import Step
from lm_eval_deepen.engine.writing_by_words import WordDecoder
from lm_eval_deepen.errors import RequestError
from lm_eval_deepen.member.chat import distinct
from lm_eval_deepen.member.encoder_decoder import divide
from lm_eval_deepen.member.generation import Asked, Settings, presented, row_generator, with_end
from lm_eval_deepen.member.runner import base_model


@dataclass(frozen=True)
class GeneratedText:
    """A text that was generated.

    Attributes:
        prompt: what it continues.
        text: the continuation, without the stop string that ended it.
        logp: fused natural-log probability (nats) of each piece that was chosen [T]; pieces behind a stop string's
            beginning are among them, the end of text is not. NaN where members took turns (``sampling: member``).
        reason: ``eos``, ``stop`` or ``length``.
        steps: what every member said at each piece, and at the end of text; empty where it was not asked for.
    """

    prompt: str
    text: str
    logp: tuple[float, ...]
    reason: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class ScoredText:
    """A text that was scored.

    Attributes:
        context: what comes before it.
        text: what was scored.
        logp: its fused natural-log probability, in nats.
        greedy: whether each of its tokens is the likeliest.
        token_logp: natural-log probability (nats) of each of the main member's tokens [T], or of each stretch where the
            method scores by stretches. They sum to `logp`, but where weights learn across the windows of a text.
        steps: what every member said at each token; empty where it was not asked for.
    """

    context: str
    text: str
    logp: float
    greedy: bool
    token_logp: tuple[float, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, eq=False)
class NextPiece:
    """What may follow a text.

    Attributes:
        context: the text.
        logp: fused natural-log probability (nats) of each piece [K], float32; -inf of pieces that cannot follow.
        pieces: what each piece spells [K], as bytes; control pieces spell nothing.
    """

    context: str
    logp: torch.Tensor
    pieces: tuple[bytes, ...]

    def likeliest(self, count: int = 5) -> tuple[tuple[bytes, float], ...]:
        """Return the likeliest pieces with their probabilities, the likeliest first."""
        best = self.logp.topk(min(count, len(self.pieces)))
        shares = best.values.exp().tolist()
        return tuple((self.pieces[at], share) for at, share in zip(best.indices.tolist(), shares, strict=True))


class Texts:
    """Texts for one ensemble."""

    def __init__(self, ensemble: EnsembleBase) -> None:
        self.ensemble = ensemble
        self.prompter = Prompter(ensemble)
        main = ensemble.main
        ends = None if self.prompter.solo else main.eos_ids
        self.settings = Settings(base_model(main.lm.model), main.name, ends)  # how its checkpoint generates

    def batch(self, longest: int) -> int:
        """Return the batch size for texts of at most `longest` tokens; ``auto`` asks the memory model."""
        size = self.ensemble.config.batch_size
        if isinstance(size, int):
            return size
        return safe_batch(self.ensemble, longest, self.ensemble.config.max_batch_size)

    def nodes(self, spans: Sequence[Span]) -> int:
        """Return how many tokens a member forwards at once to score spans."""
        longest = max((len(span.prompts[0].ids) + len(span.target) for span in spans), default=1)
        return nodes_per_forward(self.ensemble, self.batch(longest) * longest)

    def job(
        self, context: str, arguments: Mapping[str, Any], repeats: Counter[tuple], task: str | None = None
    ) -> tuple[Job, list[str]]:
        """Return the job of a prompt, and the strings that end its text.

        Args:
            context: the prompt.
            arguments: how to generate, as a task's `generation_kwargs`.
            repeats: how often each prompt was sampled before, by task and arguments: samples of one prompt differ.
            task: which task asks; what another one asks changes no sample.

        Raises:
            RequestError: arguments that cannot be honoured, or a prompt without room.
        """
        lm, solo = self.ensemble.main.lm, self.prompter.solo
        asked = Asked.read(arguments, lm.max_gen_toks)
        end = None if lm.eot_token_id is None else lm.tok_decode([lm.eot_token_id], skip_special_tokens=False)
        until = with_end(asked.until, end)
        prompts = self.prompter.prompts(context, asked.max_gen_toks)
        source, tokens = divide(prompts[0].ids)
        plan = self.settings.plan(asked, tokens, source)
        if self.ensemble.by_words and not plan.sampler.plain_greedy:
            raise RequestError(
                f"method={self.ensemble.config.method} writes the words that the members find likeliest, without "
                "sampling, penalties or other changes of scores, and the request, or the main member's "
                "generation_config.json, asks for one. Remove it, or choose a method that fuses steps."
            )
        generator = turns = None
        if plan.sampler.do_sample:
            asking = task, distinct([context]), repr(replace(asked, settings=dict(sorted(asked.settings.items()))))
            repeats[asking] += 1
            repeat, seed = str(repeats[asking]), self.ensemble.config.seed
            own = [f"seed {seed}"] if seed else []
            generator = row_generator(torch.initial_seed(), context, repeat, *own)
            turns = row_generator(torch.initial_seed(), "turns", "of members", repeat, *own)
        prefix_space = not solo and not context and self.ensemble.main.codec.prefix_space
        stops = tuple(stop for stop in until if stop)
        return Job(prompts, plan.max_new, stops, plan.sampler, generator, turns, prefix_space, plan.ends), until

    def generations(
        self, jobs: Sequence[Job], names: Sequence[Mapping[str, Any]] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Yield the index of each job and its generation, as soon as it is finished.

        Results name the request of each job by its `names`; by default, by its place among them.
        """
        most = self.ensemble.main.max_length  # a text ends where the main member's context does
        size = self.batch(max((min(len(job.prompts[0].ids) + job.max_new, most) for job in jobs), default=1))
        drafts = drafter(self.ensemble.config.speculate)
        decoder = WordDecoder if self.ensemble.by_words else Decoder
        by_turns = [index for index, job in enumerate(jobs) if takes_turns(self.ensemble, job)]
        fused = sorted(set(range(len(jobs))) - set(by_turns))
        for indices, kind in ((fused, decoder), (by_turns, TurnDecoder)):
            if indices:
                chosen = [jobs[index] for index in indices]
                yield from ((indices[at], text) for at, text in generate(self.ensemble, chosen, size, drafts, kind))
        # Texts that are sampled by turns are never drafted: a tie's number is a place among the fused.
        owners = [({"request": index} if names is None else names[index]) for index in fused]
        ties = [{**tie, **owners[tie["request"]]} for tie in drafts.near_ties]
        self.ensemble.counters.record_drafts(drafts.counts, ties)

    def finished(self, generation: Generation, until: Sequence[str]) -> str:
        """Return a generation as ``hf`` presents it: stop strings and thinking removed.

        One member's end of text stays in the text where it is no special token, as in ``hf``.
        """
        lm, ids, data = self.ensemble.main.lm, generation.ids, generation.data
        end = lm.think_end_token
        if self.prompter.solo and generation.end is not None:
            ids = [*ids, generation.end]
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
            data = b"".join(piece_of(self.ensemble, token) for token in ids)
        text = lm.tok_decode(ids) if self.ensemble.is_own(ids) else text_of_bytes(self.ensemble, data)
        if isinstance(end, int):
            text = text.lstrip()
        return presented(text, until, end if isinstance(end, str) else None)
