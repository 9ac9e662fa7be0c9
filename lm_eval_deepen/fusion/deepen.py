"""DeePEn: average in the space of relative representations, then return to the main vocabulary."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from typing_extensions import Self

from lm_eval_deepen.config import Choice, Options, Shown
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion._deepen_experts import OneHotExperts, write_rest
from lm_eval_deepen.fusion._events import Events, of_anchors, of_union
from lm_eval_deepen.fusion._expert_rows import ExpertRows, FusedByEach
from lm_eval_deepen.fusion._rows import left_alone
from lm_eval_deepen.fusion._threads import in_parts
from lm_eval_deepen.fusion.base import Fused, MemberView, fusion
from lm_eval_deepen.relative.average import Agreed, consistent, linear, power_mean, product
from lm_eval_deepen.relative.average import geometric as pool_geometrically
from lm_eval_deepen.relative.matrix import OneHotOperator, row_entropy_share
from lm_eval_deepen.relative.normalization import NORMALIZATIONS
from lm_eval_deepen.relative.operators import share_columns
from lm_eval_deepen.relative.rows_from_bytes import Tokenizers
from lm_eval_deepen.relative.rows_from_embeddings import BYTE_ROWS, MatrixSpec
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.relative.support import (
    WIDER,
    Side,
    Split,
    Support,
    TopRule,
    Tops,
    abstain,
    make_side,
    shares,
    split,
    supports,
    tops,
)
from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.solvers import SOLVERS
from lm_eval_deepen.solvers.base import Solver
from lm_eval_deepen.solvers.exact import UNDERFLOWS, exact_gain
from lm_eval_deepen.solvers.trust import within
from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids, duplicates, find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab
from lm_eval_deepen.weighting.experts import Experts

log = logging.getLogger(__name__)

DEFAULT_NORMALIZATION = "centered"
DEFAULT_TEMPERATURE = 100.0
DEFAULT_TOP_M = 64
DEFAULT_SUPPORT = 512  # pieces per member, where rows come from embeddings
DEFAULT_MAX_TRUNCATED = 0.1
STEP_OPTIONS = frozenset(
    "average inverse steps learning_rate trust_region support max_support max_truncated eos".split()
)  # how a step averages and inverts: whoever gives one asks for one static ensemble
CHUNK_BYTES = 64 << 20  # working memory of the rows that are fused at once; twice as much is slower on a CPU
ACCELERATOR = 8  # times as much elsewhere
LARGEST_SHARE = 4  # a row that needs more than a quarter of a vocabulary is fused in full


def _support(value: int | float | str | None) -> int | float | str | None:
    """Return how large a support is; the command line may write 512 as 512.0."""
    if isinstance(value, float) and value > 1 and value.is_integer():
        return int(value)
    share = isinstance(value, float) and 0 < value < 1
    whole = isinstance(value, int) and value >= 1
    if value is None or value == "full" or share or whole:
        return value
    raise ValueError(value)


@fusion("deepen", paper="arXiv:2404.12715")
class Deepen(Options):
    """Options of ``method: deepen``."""

    rows: Literal["canonical", "prefix", "embedding", "exact"] = Field(
        "canonical",
        description="The anchors that stand for a piece. From bytes alone: the anchor with which the members' "
        "tokenizers begin it (`canonical`), or the longest anchor with which it begins (`prefix`). From embeddings: "
        "the anchors that are similar to it (`embedding`, as published), or the same but an anchor stands for "
        "itself (`exact`).",
    )
    embeddings: Annotated[Literal["input", "output"] | None, Shown(default="input")] = Field(
        None,
        description="For rows from embeddings: the input embeddings (as published), or those of the output head. "
        "Both are the same if a member ties them.",
    )
    average: Annotated[
        Literal["linear", "geometric", "min", "max", "consistent"] | tuple[float, ...],
        Shown("'linear', 'geometric', 'min', 'max', 'consistent', a number but 0 or one number for each member"),
    ] = Field(
        "linear",
        description="How the members' relative vectors are averaged; `linear` is as published. A number p gives the "
        "power mean, with the limits `min` and `max`. A list gives the exponents of a product of experts; negative "
        "ones give contrastive decoding (arXiv 2210.15097). `consistent` weights by agreement (CoRE, arXiv "
        "2510.13855).",
    )
    inverse: Annotated[
        Annotated[str, Choice(SOLVERS)] | None, Shown(default="exact where rows come from bytes, else em")
    ] = Field(
        None,
        description="How the result gets back into the main vocabulary: `exact` needs rows from bytes, `adamw` is "
        "the published search.",
    )
    steps: Annotated[int | None, Shown(default="5")] = Field(
        None, ge=1, description="For an inverse that searches: the number of iterations."
    )
    learning_rate: Annotated[float | None, Shown(default="0.15 of adamw, 1.7 of mirror")] = Field(
        None, ge=0, description="For `inverse: adamw` and `mirror`: the size of a step."
    )
    trust_region: Annotated[float | None, Shown(default="no limit")] = Field(
        None,
        gt=0,
        description="The largest KL divergence from the main member's distribution over the text pieces that a step "
        "redistributes, in nats.",
    )
    normalization: Annotated[Annotated[str, Choice(NORMALIZATIONS)] | None, Shown(default=DEFAULT_NORMALIZATION)] = (
        Field(
            None,
            description="For rows from embeddings: how embeddings and cosines are normalised. `reference` is as "
            "published, and gives nearly flat rows on modern models.",
        )
    )
    relative_temperature: Annotated[float | None, Shown(default="100")] = Field(
        None,
        gt=0,
        description="For rows from embeddings: the factor on the normalised cosines. A larger factor gives sharper "
        "rows.",
    )
    row_entropy: Annotated[float | None, Shown(default="relative_temperature holds")] = Field(
        None,
        gt=0,
        description="For rows from embeddings: the mean entropy in nats of every member's rows. It determines the "
        "temperature instead of `relative_temperature`.",
    )
    top_m: Annotated[int | None, Shown(default="64")] = Field(
        None, ge=0, description="For rows from embeddings: the number of entries kept in a row; 0 keeps all (dense)."
    )
    max_anchors: Annotated[int | None, Shown(default="all common pieces")] = Field(
        None,
        ge=1,
        description="The largest number of anchors. If there are more common pieces, a random subset of them is used.",
    )
    min_anchors: int = Field(16, ge=1, description="The smallest number of common anchors; fewer are an error.")
    support: Annotated[
        int | float | Literal["full"] | None,
        AfterValidator(_support),
        Shown(
            "'full', a whole number of at least 1 or a share between 0 and 1",
            "full where rows come from bytes, else 512",
        ),
    ] = Field(
        None,
        description="The text pieces of each member that a step redistributes: their number, the share of the "
        "member's text probability that they hold, or all of them, which is exact.",
    )
    max_support: Annotated[int | None, Shown(default="no limit")] = Field(
        None, ge=1, description="For a support that is a share: the largest number of pieces per member."
    )
    max_truncated: Annotated[float | None, Shown(default="0.1")] = Field(
        None,
        gt=0,
        le=1,
        description="For a support that is not full: the largest share of a member's text probability outside the "
        "support. A row that would leave out more gets a larger support, up to the full one; 1 sets no limit.",
    )
    anchor_seed: int = Field(0, ge=0, description="With `max_anchors`: the seed of the subset of anchors.")
    eos: Literal["anchor", "reference"] = Field(
        "anchor",
        description="`anchor` gives end of text an anchor of its own. `reference`, as published, treats EOS pieces "
        "as ordinary pieces. It leaves a step to the main member if the likeliest piece there is EOS, or if the "
        "learning rate is 0.",
    )

    HAS_GEOMETRIC: ClassVar[bool] = True  # its experts may average geometrically
    COMPAT: ClassVar[dict[str, dict[str, Any]]] = {
        "reference": {
            "rows": "embedding",
            "embeddings": "input",
            "average": "linear",
            "inverse": "adamw",
            "steps": 5,
            "normalization": "reference",
            "relative_temperature": 100.0,
            "top_m": 0,
            "support": "full",
            "eos": "reference",
        }
    }

    @classmethod
    def covers(cls, given: Mapping[str, Any]) -> bool:
        """Return whether rows come from bytes: with others, covers are not measured."""
        return given.get("rows", "canonical") in BYTE_ROWS

    @classmethod
    def learns(cls, given: Mapping[str, Any]) -> bool:
        """Return whether all experts can be fused at once, and nothing is said about how a step averages."""
        return cls.covers(given) and not given.keys() & STEP_OPTIONS

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse options that have no effect beside each other; the error names the option."""
        if self.inverse == "exact" and not self.from_bytes:
            raise _conflict(
                "inverse", f"'exact' needs one-hot rows, got rows {self.rows!r}. Use rows canonical or prefix, or "
                "another inverse."
            )  # fmt: skip
        for name in ("steps", "learning_rate"):
            if (given := getattr(self, name)) is not None and name not in SOLVERS[self.solver].options.names():
                takes = [f"'{other}'" for other, solver in SOLVERS.items() if name in solver.options.names()]
                raise _conflict(
                    name, f"does not belong to inverse {self.solver!r}, got {given!r}. Remove it, or use inverse "
                    f"{' or '.join(takes)}."
                )  # fmt: skip
        if self.average == (0,):
            raise _conflict("average", "0 is the geometric average. Give average: geometric.")
        if isinstance(self.average, tuple) and len(self.average) != 1 and not max(self.average, default=0.0) > 0:
            raise _conflict("average", f"needs an exponent above 0, got {list(self.average)}.")
        if self.max_anchors is not None and self.max_anchors < self.min_anchors:
            raise _conflict("max_anchors", f"{self.max_anchors} is less than min_anchors {self.min_anchors}.")
        if self.anchor_seed and self.max_anchors is None:
            raise _conflict(
                "anchor_seed", f"chooses a subset of the anchors, got {self.anchor_seed} without max_anchors: all of "
                "them are taken. Remove it, or give max_anchors."
            )  # fmt: skip
        if self.row_entropy is not None and self.relative_temperature is not None:
            raise _conflict(
                "relative_temperature", f"{self.relative_temperature} has no effect beside row_entropy "
                f"{self.row_entropy}, which chooses the temperature. Remove one of the two."
            )  # fmt: skip
        if self.max_support is not None and not isinstance(self.support, float):
            raise _conflict(
                "max_support", f"is for a support given as a share, such as 0.99, got max_support "
                f"{self.max_support!r} with support {self.support!r}. Remove it."
            )  # fmt: skip
        if self.max_truncated is not None and self.full:
            raise _conflict(
                "max_truncated", f"is for a truncated support, got {self.max_truncated!r} with a full one. Remove it, "
                "or give support as a number or a share."
            )  # fmt: skip
        for name in ("embeddings", "normalization", "relative_temperature", "row_entropy", "top_m"):
            if self.from_bytes and getattr(self, name) is not None:
                raise _conflict(
                    name, f"is of rows from embeddings, got {getattr(self, name)!r} with rows {self.rows!r}. Remove "
                    "it, or give rows: embedding (or exact)."
                )  # fmt: skip
        return self

    @property
    def from_bytes(self) -> bool:
        """Whether rows come from bytes alone: one-hot, and all pieces are cheap."""
        return self.rows in BYTE_ROWS

    @property
    def full(self) -> bool:
        """Whether a step works on all pieces."""
        return self.from_bytes if self.support is None else self.support == "full"

    @property
    def solver(self) -> str:
        """The solver's name."""
        if self.inverse is not None:
            return self.inverse
        return "exact" if self.from_bytes else "em"

    def build_solver(self) -> Solver:
        """Return the solver with its options: those given here that it takes."""
        options = SOLVERS[self.solver].options
        given = {name: getattr(self, name) for name in options.names()}
        built: Solver = options(**{name: value for name, value in given.items() if value is not None})
        return built

    def support_rule(self) -> TopRule | None:
        """Return which pieces a member brings to a row's support, None for all of them."""
        if self.full:
            return None
        bound = DEFAULT_MAX_TRUNCATED if self.max_truncated is None else float(self.max_truncated)
        if isinstance(self.support, float):
            return TopRule(self.max_support, self.support, bound)
        assert not isinstance(self.support, str)
        return TopRule(DEFAULT_SUPPORT if self.support is None else self.support, None, bound)

    def matrix_spec(self) -> MatrixSpec:
        """Return how the relative matrices are made."""
        described: Literal["all", "text"] = "all" if self.eos == "reference" else "text"
        temperature = DEFAULT_TEMPERATURE if self.relative_temperature is None else float(self.relative_temperature)
        top_m = DEFAULT_TOP_M if self.top_m is None else self.top_m
        normalization = self.normalization or DEFAULT_NORMALIZATION
        which = "input" if self.embeddings is None else self.embeddings
        return MatrixSpec(normalization, temperature, top_m, described, self.rows, self.row_entropy, which)

    def check_members(self, count: int, method: Any) -> None:
        """Refuse another number of exponents than of members."""
        if isinstance(self.average, tuple) and 1 < count and len(self.average) not in (1, count):
            raise _conflict("average", f"has {len(self.average)} exponents for {count} members. Give one for each.")

    def check(self, vocabularies: Sequence[ByteVocab], names: Sequence[str]) -> AnchorSet:
        """Return the members' anchors.

        Raises:
            VocabularyError: too few of them.
            ConfigError: rows that are to be flatter than flat.
        """
        anchors = find_anchors(
            vocabularies, max_anchors=self.max_anchors, seed=self.anchor_seed, min_anchors=self.min_anchors, names=names
        )
        if self.row_entropy is not None and self.row_entropy >= (flat := math.log(len(anchors))):
            raise _conflict(
                "row_entropy", f"{self.row_entropy:g} is no less than flat rows have, {flat:.3g} nats with "
                f"{len(anchors)} anchors. Lower it."
            )  # fmt: skip
        return anchors

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> DeepenFuser:
        """Find the anchors, load or build every member's relative matrix, and return the fuser.

        Raises:
            VocabularyError: members without enough common anchors.
            MatrixError: a matrix that cannot be built or read.
        """
        anchors = self.check([member.vocabulary for member in members], [member.name for member in members])
        spec, tokenizers = self.matrix_spec(), Tokenizers.of(members)
        sides, matrices = [], []
        for member in members:
            vocabulary, matrix = member.vocabulary, store.get(member, anchors, spec, tokenizers)
            ids, duplicates_of = anchor_ids(vocabulary, anchors), duplicates(vocabulary, anchors)
            sides.append(make_side(vocabulary, matrix, ids, duplicates_of, spec.rows))
            info = store.info(member, anchors, spec, tokenizers)
            tied = spec.embeddings == "output" and member.tied
            which = {} if spec.from_bytes else {"embeddings": "output, tied to the input" if tied else spec.embeddings}
            matrices.append(
                {
                    "member": member.name,
                    **which,
                    "file": info.path.name,
                    "bytes": info.num_bytes,
                    "content_sha256": info.content_sha256,
                    "mean_dropped_mass": info.mean_dropped_mass,
                    "row_entropy_share": row_entropy_share(matrix),
                }
            )
        if spec.embeddings == "output" and all(member.tied for member in members):
            log.warning(
                "embeddings: output changes nothing here: the output head of every member (%s) is tied to its input "
                "embeddings.",
                ", ".join(member.name for member in members),
            )
        facts = {"anchors": len(anchors.pieces), "anchors_sha256": anchors.fingerprint, "matrices": matrices}
        return DeepenFuser(members[0].vocabulary, sides, self, facts)


def _conflict(option: str, message: str) -> ConfigError:
    return ConfigError(f"{option} {message}", key=option, code="conflict")


Group = tuple[Tensor, list[Tops]]  # indices of rows [b], and every member's own pieces of them


@dataclass(frozen=True)
class Rows:
    """Rows to fuse."""

    parts: Split  # what they are made of
    share: Tensor  # the members' weights [B, M]
    active: Tensor  # members that take part [B, M] (bool), the main one always
    out: Tensor  # where the fused text pieces go [B, V_0]
    with_end: bool  # whether there is an end of text


@dataclass(frozen=True)
class Found:
    """What was found beside the text pieces."""

    log_text: Tensor  # log mass of text given text or end [B]
    log_end: Tensor  # log mass of end given text or end [B]
    usable: Tensor  # rows that could be fused [B] (bool)
    stats: dict[str, Tensor]  # per-row statistics [B]

    @classmethod
    def together(cls, parts: Sequence[tuple[Tensor, Found]]) -> Found:
        """Return what was found for all rows, from parts of them and their indices."""
        order, names = torch.cat([index for index, _ in parts]).argsort(), list(parts[0][1].stats)
        rows = [(own.log_text, own.log_end, own.usable, *(own.stats[name] for name in names)) for _, own in parts]
        log_text, log_end, usable, *stats = (torch.cat(column)[order] for column in zip(*rows, strict=True))
        return cls(log_text, log_end, usable, dict(zip(names, stats, strict=True)))


class DeepenFuser:
    """Fuses rows as "The method" in docs/design.md says; `sides` has the main member first.

    Attributes:
        out_vocab: the main member's pieces.
        options: how it fuses.
        facts: anchors and matrices, for the diagnostics of a run.
        by_stretches: whether given texts are scored by stretches instead (`method: mixture`).
        by_words: the options under which texts are written by words instead (`method: adafuse`).
        vocabularies: the members', with `by_stretches`.
    """

    by_stretches = False
    by_words: Options | None = None
    vocabularies: tuple[ByteVocab, ...] = ()

    def __init__(self, out_vocab: ByteVocab, sides: Sequence[Side], options: Deepen, facts: dict[str, Any]) -> None:
        self.out_vocab, self.options, self.facts = out_vocab, options, facts
        self.solver = options.build_solver()
        self.rule = options.support_rule()  # None: everything
        self.average = averaging(options.average)
        self._placed: dict[torch.device, tuple[Side, ...]] = {torch.device("cpu"): tuple(sides)}

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] without another member; with ``eos: reference`` also those the paper leaves."""
        left = left_alone(logp, weights)
        if self.options.eos == "reference":
            eos = torch.tensor(self.out_vocab.eos, dtype=torch.int64, device=left.device)
            left |= torch.isin(argmax(logp[0]), eos)
            if getattr(self.solver, "learning_rate", None) == 0:
                left[:] = True
        return left

    @torch.no_grad()
    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Fuse rows; see `fusion.base` for shapes.

        Stats: ``end_mass`` of the result; ``residual_kl`` and ``lost_mass`` of the inverse; ``held_back``, the share
        of the change that the trust region took back;
        ``truncated_mass``, the members' weighted text mass outside the support, and its maximum; ``rows_widened``,
        rows whose support is larger than asked for, since that left out more than ``max_truncated``;
        ``dropped_control_mass``, the weighted mass of the other members' control pieces, which have no counterpart,
        and of unused ids.
        """
        device, sides = logp[0].device, self._sides(logp[0].device)
        width = sum(x.shape[1] for x in logp) + sides[0].matrix.shape[1]
        if self.rule is None:
            row_bytes = 16 * (width + sides[0].matrix.shape[1])
        else:
            row_bytes = 8 * width + support_bytes(sides, self.rule.first)
        rows = max(1, chunk_bytes(device) // row_bytes)
        out = torch.empty(logp[0].shape, dtype=torch.float32, device=device)
        parts = in_parts(
            len(weights), rows, device,
            lambda part: _fuse(self, [x[part] for x in logp], weights[part], sides, out[part]),
        )  # fmt: skip
        return Fused(out, {name: torch.cat([stats[name] for stats in parts]) for name in parts[0]})

    def experts(self, logp: Sequence[Tensor], weights: Tensor, experts: Experts) -> ExpertRows:
        """Fuse rows under several static ensembles; see `by_expert`.

        With one-hot rows and the exact inverse the experts share nearly all work; else each of them fuses.
        """
        if self._in_closed_form:
            return OneHotExperts(logp, weights, experts, self._sides(logp[0].device))
        return FusedByEach([self.pooled_as(*kind) for kind in experts.kinds()], logp, weights)

    def events(self) -> Events | None:
        """Return what the members' tokens stand for; None where a step is no mixture of their distributions."""
        if self.by_stretches:
            return of_union(self.vocabularies)
        if not self._in_closed_form or self.options.average != "linear":
            return None
        return of_anchors(self.out_vocab, self._placed[torch.device("cpu")])

    @property
    def _in_closed_form(self) -> bool:
        """Whether rows are one-hot and fused in full, by masses of classes alone."""
        exact = self.rule is None and self.options.solver == "exact"
        return exact and self.options.eos == "anchor" and self.options.trust_region is None

    def pooled_as(self, geometric: bool, power: float) -> DeepenFuser:
        """Return this fuser with another average."""
        fuser = copy.copy(self)
        fuser.average = partial(pool_geometrically, power=power) if geometric else averaging("linear")
        return fuser

    def projecting(self) -> DeepenFuser:
        """Return this fuser with plain averages and no trust region: with all weight on a member it projects that."""
        fuser = self.pooled_as(False, 1.0)
        fuser.options = self.options.replace(trust_region=None)
        return fuser

    def _sides(self, device: torch.device) -> tuple[Side, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(side.to(device) for side in self._placed[torch.device("cpu")])
        return self._placed[device]


def averaging(average: str | tuple[float, ...]) -> Callable[..., Agreed]:
    """Return what averages as an option says."""
    if isinstance(average, tuple):
        return partial(power_mean, power=average[0]) if len(average) == 1 else partial(product, exponents=average)
    named: dict[str, Callable[..., Agreed]] = {
        "linear": linear,
        "geometric": pool_geometrically,
        "min": partial(power_mean, power=-math.inf),
        "max": partial(power_mean, power=math.inf),
        "consistent": consistent,
    }
    return named[average]


def chunk_bytes(device: torch.device) -> int:
    """Return the working memory of the rows that are fused at once."""
    return CHUNK_BYTES * (1 if device.type == "cpu" else ACCELERATOR)


def support_bytes(sides: Sequence[Side], width: int) -> int:
    """Return what the rows of all matrices take in a step with `width` pieces per member, for one distribution."""
    return sum(side.matrix.at_bytes(width * len(sides)) for side in sides)


def _fuse(
    fuser: DeepenFuser, logp: Sequence[Tensor], weights: Tensor, sides: Sequence[Side], out: Tensor
) -> dict[str, Tensor]:
    """Fuse a chunk of rows into `out` [B, V_0] and return statistics."""
    device, main, side = out.device, logp[0], sides[0]
    weights = weights.to(device)
    active = weights > 0
    with_end = len(side.eos) > 0 or fuser.options.eos == "reference"
    given = [main, *(abstain(logp[i].to(device), active[:, i]) for i in range(1, len(logp)))]
    full = fuser.rule is None
    parts = split(given, sides, with_end=with_end, grouped=not full, one_hot=_one_hot(sides) if full else None)
    share = shares(weights, parts.valid)  # [B, M]
    kept, total = parts.log_kept[:, 0], parts.log_total[:, 0]
    taking_part = torch.cat([torch.ones_like(active[:, :1]), active[:, 1:]], dim=1)
    rows = Rows(parts, share, taking_part, out, with_end)
    inverted = _invert_full(fuser, rows, sides) if full else _invert_truncated(fuser, rows, sides)
    write_rest(out, main, side, kept + inverted.log_end, total, inverted.usable)
    stats = {name: value.masked_fill(~inverted.usable, 0.0) for name, value in inverted.stats.items()}
    if not full:
        stats["max_truncated_mass"] = stats["truncated_mass"]
    stats["end_mass"] = (torch.where(inverted.usable, inverted.log_end, parts.log_end[:, 0]) + kept).exp()
    stats["dropped_control_mass"] = (weights[:, 1:] * parts.dropped[:, 1:]).sum(1)
    return stats


def _one_hot(sides: Sequence[Side]) -> list[OneHotOperator] | None:
    """Return the members' matrices where every row is one-hot."""
    operators = [op for op in (side.matrix.full() for side in sides) if isinstance(op, OneHotOperator)]
    return operators if len(operators) == len(sides) else None


def _invert_full(fuser: DeepenFuser, rows: Rows, sides: Sequence[Side]) -> Found:
    """Write the fused text pieces to ``rows.out`` [B, V_0], from all pieces of all members."""
    parts, op = rows.parts, sides[0].matrix.full()
    own = None  # the main member's log-probabilities given text [B, V_0]
    if parts.classes[0] is None:
        texts = [_given_text(rows, side, i) for i, side in enumerate(sides)]
        own = texts[0]
        projected = [side.matrix.full().project(text.exp()) for side, text in zip(sides, texts, strict=True)]
    else:
        projected = [own_mass for own_mass in parts.classes if own_mass is not None]
    agreed = fuser.average(projected[0], projected[1:], rows.share, parts, with_end=rows.with_end)
    mass = parts.log_kept[:, 0] + agreed.log_text
    nothing = torch.zeros_like(mass)
    stats = {"truncated_mass": nothing}
    if fuser.rule is not None:
        stats["rows_widened"] = torch.ones_like(mass)
    if fuser.options.solver == "exact" and fuser.options.trust_region is None and isinstance(op, OneHotOperator):
        gain, lost = exact_gain(agreed.r, projected[0])
        moved = (mass - parts.log_sum[:, 0])[:, None]
        op.gather(gain.add_(moved), moved, out=rows.out).add_(parts.rows[0])
        stats |= {"residual_kl": nothing, "lost_mass": lost}
        return Found(agreed.log_text, agreed.log_end, agreed.usable, stats)
    if own is None:
        own = _given_text(rows, sides[0], 0)
    solved = fuser.solver.solve(own, agreed.r, op, projected[0])
    logp, stats = _held_back(fuser, own, solved.logp, {**solved.stats, **stats})
    torch.add(logp, mass[:, None], out=rows.out)
    return Found(agreed.log_text, agreed.log_end, agreed.usable, stats)


def _given_text(rows: Rows, side: Side, member: int) -> Tensor:
    """Return a member's log-probabilities given text [B, V]; ``-inf`` for what is not text."""
    return (rows.parts.rows[member] + side.mask).sub_(rows.parts.log_sum[:, member, None])


def _invert_truncated(fuser: DeepenFuser, rows: Rows, sides: Sequence[Side]) -> Found:
    """Write the fused text pieces to ``rows.out`` [B, V_0], from supports of every row's own size."""
    groups, rest = _groups(fuser, rows, sides)
    moved = [_invert_group(fuser, rows, sides, index, own) for index, own in groups]
    inverted = [(index, found) for (index, _), (found, _, _) in zip(groups, moved, strict=True)]
    whole = rows.out.new_empty(len(rest), rows.out.shape[1])
    if len(rest):
        again = split([x[rest] for x in rows.parts.rows], sides, with_end=rows.with_end, one_hot=_one_hot(sides))
        left = replace(rows, parts=again, share=rows.share[rest], active=rows.active[rest], out=whole)
        inverted.append((rest, _invert_full(fuser, left, sides)))
    together = inverted[0][1] if len(inverted) == 1 else Found.together(inverted)
    scale = (rows.parts.log_kept[:, 0] + together.log_text - rows.parts.log_sum[:, 0])[:, None]
    torch.add(rows.parts.rows[0], scale, out=rows.out)
    for (index, _), (_, support, logp) in zip(groups, moved, strict=True):
        support.scatter(rows.out, logp + (scale[index] + support.log_mass[:, None]))
    rows.out[rest] = whole
    return together


def _groups(fuser: DeepenFuser, rows: Rows, sides: Sequence[Side]) -> tuple[list[Group], Tensor]:
    """Return rows whose supports are of similar size together, and the rows that are to be fused in full [n].

    A wide row would make all others of its group as wide. Where rows are one-hot, everything costs less than many.
    """
    rule, parts, device = fuser.rule, rows.parts, rows.out.device
    assert rule is not None
    groups: list[Group] = []
    rest, width = torch.arange(len(rows.share), device=device), rule.first
    while True:
        room = chunk_bytes(device) // max(1, support_bytes(sides, width))
        too_wide = not room or any(LARGEST_SHARE * width > len(side.anchor_of) for side in sides)
        if width > rule.first and (too_wide or fuser.options.from_bytes):
            return groups, rest
        active = rows.active[rest]
        own = [tops(parts, m, side, rest, active[:, m], rule, width) for m, side in enumerate(sides)]
        enough = torch.stack([top.enough for top in own], dim=1).all(1)
        for at in enough.nonzero()[:, 0].split(max(1, room if width > rule.first else len(enough))):
            groups.append((rest[at], [top.at(at) for top in own]))
        rest, width = rest[~enough], width * WIDER
        if not len(rest):
            return groups or [(rest, own)], rest


def _invert_group(
    fuser: DeepenFuser, rows: Rows, sides: Sequence[Side], index: Tensor, own: Sequence[Tops]
) -> tuple[Found, Support, Tensor]:
    """Find the log-probabilities [b, K] given the main member's support, from own pieces and their counterparts."""
    parts, share, active = rows.parts.masses(index), rows.share[index], rows.active[index]
    chosen = supports(rows.parts.rows, index, sides, active, [top.ids for top in own])
    operators = share_columns([side.matrix.at(at.ids) for side, at in zip(sides, chosen, strict=True)])
    held = torch.stack([support.log_mass for support in chosen], dim=1) - parts.log_sum
    projected = [op.project(support.logp.exp()) for op, support in zip(operators, chosen, strict=True)]
    nobodys = torch.stack(projected).amax(0) == 0  # as columns that a longer row beside it has: they have no say
    agreed = fuser.average(projected[0], projected[1:], share, parts, with_end=rows.with_end)
    logp0, r = chosen[0].logp, agreed.r.masked_fill(nobodys, 0.0)
    r.div_(r.sum(1, keepdim=True).clamp_min_(UNDERFLOWS))
    solved = fuser.solver.solve(logp0, r, operators[0], projected[0])
    widened = torch.stack([top.widened for top in own], dim=1).any(1).float()
    truncated = (agreed.blend * (1 - held.exp()).clamp(min=0)).sum(1)
    stats = {**solved.stats, "truncated_mass": truncated, "rows_widened": widened}
    logp, stats = _held_back(fuser, logp0, solved.logp, stats)
    return Found(agreed.log_text, agreed.log_end, agreed.usable, stats), chosen[0], logp


def _held_back(
    fuser: DeepenFuser, logp0: Tensor, logp: Tensor, stats: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Keep a result within the trust region, if there is one."""
    if fuser.options.trust_region is None:
        return logp, stats
    logp, held_back = within(logp0, logp, fuser.options.trust_region)
    return logp, {**stats, "held_back": held_back}
