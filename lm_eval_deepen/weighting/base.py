"""The plugin interface of weightings: where the members' weights come from, orthogonal to how distributions are fused.

A weighting is one file in this folder: a `Weighting`, decorated with ``@weighting(name, paper=...)``. It has weights to
begin with (``start``, known before anything is loaded) and, where these change while a run goes on, a `Weigher`, which
is itself as a rule. An ensemble uses one so::

    weigher = options.build()                        # None: the configured weights [M] hold throughout
    # once per request, before any of its rows is fused
    base = configured.expand(R, -1)                  # [R, M]
    if weigher and weigher.reads_prompts:
        base = weigher.prepare(losses, configured)   # losses[r][m] is a PromptLoss
    # for every chunk of rows, each of some request
    weights = base[request_of_row] * present         # a member that abstains has weight 0; then rows sum to 1
    if weigher and weigher.reads_steps:
        weights = weigher.weights(logp, weights)     # logp as given to Fuser.fuse: [B, V_m] per member
    fused = fuser.fuse(logp, weights)

A distribution that is shared by requests with different prompts is fused once per prompt: with a weigher that reads
prompts, the weights belong to what makes a row distinct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from lm_eval_deepen.config import Options
from lm_eval_deepen.config.registry import Registry
from lm_eval_deepen.errors import ConfigError

TOLERANCE = 1e-3  # of the sum of weights around 1, in fp32


@dataclass(frozen=True)
class PromptLoss:
    """What one member makes of one request's prompt: its loss on bytes that are the same for every member.

    The prompt is what comes before the first scored or generated token: of a loglikelihood request the context,
    never the continuation. Control tokens (BOS, chat markers) are conditioned on, not counted. So are the first bytes,
    by all members, where one of them has nothing before its first token or a space of its own in it; then counting
    begins at the first byte where all members' tokens begin. Of a conversation only the messages count, and what was
    appended to it, not the words of a member's chat template. A window of loglikelihood_rolling has no prompt, and so
    has a request with an empty context.

    Attributes:
        nats: minus the sum of the natural log-probabilities of the tokens that count.
        tokens: how many these are, in this member's tokenisation; 0 where nothing counts.
        num_bytes: their length as text, the same for every member.
        each: natural-log probability and length in bytes of each of these tokens, in the order of the text.
        at_powers: natural-log probability of each of these tokens at each of some powers of the distributions [T, P].
        embedding: the mean of the states from which the member predicts these tokens [d], fp32 on the CPU; None without
            tokens.
    """

    nats: float
    tokens: int
    num_bytes: int
    each: tuple[tuple[float, int], ...] = ()
    at_powers: tuple[tuple[float, ...], ...] = ()
    embedding: Tensor | None = field(default=None, compare=False, repr=False)


@runtime_checkable
class Weigher(Protocol):
    """Weights that depend on what the members see. No I/O, no model, no state.

    One that has ``prompts`` is given the main member's embedding of each by ``learn``, when the ensemble is built.
    """

    @property
    def reads_prompts(self) -> bool:
        """Whether `prepare` is called, which needs every member's loss on every prompt."""
        ...

    @property
    def reads_steps(self) -> bool:
        """Whether `weights` is called for every fused row."""
        ...

    def prepare(self, losses: Sequence[Sequence[PromptLoss]], configured: Tensor) -> Tensor:
        """Return the weights [R, M] of R requests.

        Args:
            losses: of every request, one per member.
            configured: the ensemble's weights [M]; a request without a prompt keeps them.
        """
        ...

    def weights(self, logp: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return the weights [B, M] of rows; they sum to 1, and where `base` is 0 they are 0.

        Args:
            logp: the members' natural log-probabilities [B, V_m]; a row of a member with weight 0 may hold
                anything.
            base: the weights so far [B, M], of the request and without the members that abstain.
        """
        ...


class Weighting(Options):
    """The options of a weighting: equal weights that stay, where a class does not say otherwise.

    Attributes:
        TAKES_WEIGHTS: whether `weights` or members' own weights may be given beside it.
        reads_prompts, reads_steps: as of a `Weigher`.
    """

    TAKES_WEIGHTS: ClassVar[bool] = False
    reads_prompts: ClassVar[bool] = False
    reads_steps: ClassVar[bool] = False

    def start(self, given: Sequence[float] | None, count: int) -> list[float]:
        """Return the ensemble's weights, summing to 1; for a weigher what it starts from.

        Args:
            given: the weights in the configuration, None where there are none; always None for a weighting that
                takes none.
            count: number of members.

        Raises:
            ConfigError: weights that are missing, or options that do not fit so many members.
        """
        return [1 / count] * count if given is None else list(given)

    def build(self) -> Weigher | None:
        """Return what changes the weights, or None where they are constant."""
        return self if self.reads_prompts or self.reads_steps else None

    def prepare(self, losses: Sequence[Sequence[PromptLoss]], configured: Tensor) -> Tensor:
        """Return the configured weights for every request [R, M]."""
        return configured.expand(len(losses), -1)

    def weights(self, logp: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return the weights of the requests, unchanged."""
        return base


WEIGHTINGS = Registry("weighting", "lm_eval_deepen.weighting", "weighting", helpers=("base", "experts"))
weighting = WEIGHTINGS.register


def checked(name: str, weights: object, base: Tensor) -> Tensor:
    """Return what the weigher of `name` gives for the rows of `base` [B, M], which has 0 for who has no say.

    Raises:
        ConfigError: no weights, which would leave rows to the main member, or count them more than once.
    """
    if not isinstance(weights, Tensor) or weights.shape != base.shape:
        got = f"a tensor of {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
        raise ConfigError(
            f"weighting={name} gives {got} as weights of {tuple(base.shape)} rows and members; correct it"
        )
    right = (
        (weights >= 0).all(1)
        & ((weights.sum(1) - 1).abs() < TOLERANCE)
        & ~((weights > 0) & (base.to(weights.device) == 0)).any(1)
    )
    if not bool(right.all()):
        raise ConfigError(
            f"weighting={name} gives the weights {weights[~right][0].tolist()}; they must be 0 or more, sum to 1, and "
            "be 0 for a member that abstains. Correct it"
        )
    return weights
