"""DeePEn: average in the space of relative representations, then return to the main vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion.seam import Fused, Fuser, MemberView, fusion
from lm_eval_deepen.inverse import Solver, get_solver
from lm_eval_deepen.relative.build import MatrixSpec
from lm_eval_deepen.relative.support import Side, Split, make_side, sit_out, split, supports
from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids, duplicates, find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

if TYPE_CHECKING:
    from lm_eval_deepen.relative.store import MatrixStore

NEG_INF = float("-inf")
CHUNK_BYTES = 128 << 20  # working memory of the rows that are fused at once


@fusion("deepen", paper="arXiv:2404.12715")
@dataclass(frozen=True)
class Deepen:
    """Options of ``method: deepen``.

    Attributes:
        inverse: solver of the inverse, ``em`` or ``adamw`` (the published search).
        steps: its iterations; 5 by default.
        learning_rate: of adamw alone; 0.15 by default.
        normalization: how relative rows are made: ``centered``, ``cosine`` or ``reference`` (published).
        relative_temperature: factor on the normalised cosines.
        top_m: entries kept per relative row; 0 keeps all (dense).
        max_anchors: use a seeded subset of this many anchors.
        min_anchors: fewer common anchors than this are an error.
        support: text pieces per member that a step redistributes, or ``full`` (exact).
        anchor_seed: which subset, with max_anchors.
        eos: ``anchor`` gives end of text a role anchor of its own; ``reference`` treats EOS pieces as
            ordinary pieces and leaves rows whose main argmax is one, or learning rate 0, to the main member.
    """

    inverse: str = "em"
    steps: int | None = None
    learning_rate: float | None = None
    normalization: str = "centered"
    relative_temperature: float = 100.0
    top_m: int = 64
    max_anchors: int | None = None
    min_anchors: int = 16
    support: int | str = 512
    anchor_seed: int = 0
    eos: str = "anchor"

    COMPAT: ClassVar[dict[str, dict[str, Any]]] = {
        "reference": {
            "inverse": "adamw",
            "steps": 5,
            "normalization": "reference",
            "relative_temperature": 100.0,
            "top_m": 0,
            "support": "full",
            "eos": "reference",
        }
    }

    def __post_init__(self) -> None:
        """Check every value; ConfigError names the option."""
        solver = get_solver(self.inverse)
        if self.learning_rate is not None:
            if solver.learning_rate is None:
                raise ConfigError(
                    f"learning_rate: inverse {self.inverse!r} takes none, got {self.learning_rate!r}. "
                    "Remove it, or use inverse 'adamw'."
                )
            if not (isinstance(self.learning_rate, int | float) and 0 <= self.learning_rate < math.inf):
                raise ConfigError(f"learning_rate must be a number of at least 0, got {self.learning_rate!r}.")
        for name, least, optional in (
            ("steps", 1, True),
            ("top_m", 0, False),
            ("max_anchors", 1, True),
            ("min_anchors", 1, False),
            ("anchor_seed", 0, False),
        ):
            value = getattr(self, name)
            if not _whole(value, least) and not (optional and value is None):
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.support != "full" and not _whole(self.support, 1):
            raise ConfigError(f"support must be 'full' or a whole number of at least 1, got {self.support!r}.")
        if self.eos not in ("anchor", "reference"):
            raise ConfigError(f"eos must be 'anchor' or 'reference', got {self.eos!r}.")
        if self.max_anchors is not None and self.max_anchors < self.min_anchors:
            raise ConfigError(f"max_anchors {self.max_anchors} is less than min_anchors {self.min_anchors}.")
        if not (isinstance(self.relative_temperature, int | float) and 0 < self.relative_temperature < math.inf):
            raise ConfigError(f"relative_temperature must be a positive number, got {self.relative_temperature!r}.")
        self.matrix_spec()

    def matrix_spec(self) -> MatrixSpec:
        """Return how the relative matrices are made."""
        rows = "all" if self.eos == "reference" else "text"
        return MatrixSpec(self.normalization, float(self.relative_temperature), self.top_m, rows)

    def check(self, vocabularies: Sequence[ByteVocab], names: Sequence[str]) -> AnchorSet:
        """Return the members' anchors.

        Raises:
            VocabularyError: too few of them.
        """
        return find_anchors(
            vocabularies,
            max_anchors=self.max_anchors,
            seed=self.anchor_seed,
            min_anchors=self.min_anchors,
            names=names,
        )

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Find the anchors, load or build every member's relative matrix, and return the fuser.

        Raises:
            VocabularyError: members without enough common anchors.
            MatrixError: a matrix that cannot be built or read.
        """
        if len(members) == 1:
            return Alone(members[0].vocabulary)
        anchors = self.check([member.vocabulary for member in members], [member.name for member in members])
        spec = self.matrix_spec()
        sides, matrices = [], []
        for member in members:
            vocabulary, matrix = member.vocabulary, store.get(member, anchors, spec)
            ids, twins = anchor_ids(vocabulary, anchors), duplicates(vocabulary, anchors)
            sides.append(make_side(vocabulary, matrix, ids, twins, spec.rows))
            info = store.info(member, anchors, spec)
            matrices.append(
                {
                    "member": member.name,
                    "file": info.path.name,
                    "bytes": info.num_bytes,
                    "content_sha256": info.content_sha256,
                    "mean_dropped_mass": info.mean_dropped_mass,
                }
            )
        facts = {"anchors": len(anchors.pieces), "anchors_sha256": anchors.fingerprint, "matrices": matrices}
        return DeepenFuser(members[0].vocabulary, sides, self, facts)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Alone:
    """The fuser of an ensemble of one: every row is left to it."""

    def __init__(self, vocabulary: ByteVocab) -> None:
        """Keep the vocabulary."""
        self.out_vocab = vocabulary

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return all rows [B]."""
        return torch.ones(len(weights), dtype=torch.bool, device=logp[0].device)

    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Return the member's own distribution."""
        return Fused(logp[0].to(torch.float32))


class DeepenFuser:
    """Fuses rows as DESIGN.md's "The method, exactly" says; `sides` has the main member first.

    Attributes:
        out_vocab: the main member's pieces.
        facts: anchors and matrices, for the diagnostics of a run.
    """

    def __init__(self, out_vocab: ByteVocab, sides: Sequence[Side], options: Deepen, facts: dict[str, Any]) -> None:
        """Take the members' sides and the options; nothing is computed."""
        self.out_vocab, self.options, self.facts = out_vocab, options, facts
        self.solver: Solver = get_solver(options.inverse)
        self.steps = options.steps or self.solver.steps
        rate = self.solver.learning_rate if options.learning_rate is None else options.learning_rate
        self.learning_rate = 0.0 if rate is None else float(rate)
        self._eos_ids = sorted(set(out_vocab.eos))
        self._placed: dict[torch.device, tuple[Side, ...]] = {torch.device("cpu"): tuple(sides)}

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] without another member; with ``eos: reference`` also those the paper leaves."""
        left = ~(weights[:, 1:] > 0).any(1).to(logp[0].device)
        if self.options.eos == "reference":
            eos = torch.tensor(self._eos_ids, dtype=torch.int64, device=left.device)
            left |= torch.isin(logp[0].argmax(1), eos)
            if self.solver.learning_rate is not None and self.learning_rate == 0:
                left[:] = True
        return left

    @torch.no_grad()
    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Fuse rows; see the seam for shapes.

        Stats: ``end_mass`` of the result; ``residual_kl`` and ``lost_mass`` of the inverse;
        ``truncated_mass``, the members' weighted text mass outside the support; ``dropped_control_mass``, the
        weighted mass of the other members' control pieces, which have no counterpart, and of unused ids.
        """
        device = logp[0].device
        sides = self._sides(device)
        rows = max(1, CHUNK_BYTES // self._row_bytes(sides, [x.shape[1] for x in logp]))
        parts = []
        for start in range(0, max(1, len(weights)), rows):
            chunk = slice(start, start + rows)
            parts.append(_fuse(self, [x[chunk].to(device) for x in logp], weights[chunk].to(device), sides))
        stats = {name: torch.cat([part.stats[name] for part in parts]) for name in parts[0].stats}
        return Fused(torch.cat([part.logp for part in parts]), stats)

    def _sides(self, device: torch.device) -> tuple[Side, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(side.to(device) for side in self._placed[torch.device("cpu")])
        return self._placed[device]

    def _row_bytes(self, sides: Sequence[Side], widths: Sequence[int]) -> int:
        anchors = sides[0].matrix.shape[1]
        work = 16 * (sum(widths) + 2 * anchors)
        if self.options.support != "full":
            work += 2 * sides[0].matrix.at_bytes(int(self.options.support) * len(sides))
        return work


def _fuse(fuser: DeepenFuser, logp: Sequence[Tensor], weights: Tensor, sides: Sequence[Side]) -> Fused:
    """Fuse a chunk of rows."""
    main, active = logp[0], weights > 0
    with_end = len(sides[0].eos) > 0 or fuser.options.eos == "reference"
    parts = [split(main, sides[0], with_end=with_end)]
    for i in range(1, len(logp)):
        parts.append(split(sit_out(logp[i], active[:, i]), sides[i], with_end=with_end))

    share = weights * torch.stack([part.valid for part in parts], dim=1)  # [B, M]
    share = (share / share.sum(1, keepdim=True).clamp(min=1e-30)).log()
    end = torch.logsumexp(share + torch.stack([part.log_end for part in parts], dim=1), dim=1)  # [B], logs
    text = share + torch.stack([part.log_text for part in parts], dim=1)  # [B, M], logs
    text_mass = torch.logsumexp(text, dim=1)
    usable = (parts[0].log_text > NEG_INF) & (text_mass > NEG_INF)  # else there is nothing to start from
    # the members' weights given that the next piece is text
    blend = (text - torch.where(usable, text_mass, 0.0)[:, None]).exp()

    body, stats = _invert(fuser, parts, sides, blend, active)
    main_part = parts[0]
    out = body.add_((main_part.log_kept + text_mass)[:, None])
    if len(sides[0].eos):
        out[:, sides[0].eos] = _end_logp(main, sides[0].eos) + (main_part.log_kept + end)[:, None]
    if len(sides[0].control):
        out[:, sides[0].control] = main[:, sides[0].control].float() - main_part.log_total[:, None]
    if not bool(usable.all()):
        own = main.to(torch.float32, copy=True).index_fill_(1, sides[0].unused, NEG_INF)
        out = torch.where(usable[:, None], out, own - main_part.log_total[:, None])
    dropped = torch.stack([part.dropped for part in parts[1:]], dim=1)
    stats = {name: torch.where(usable, value, 0.0) for name, value in stats.items()}
    stats["end_mass"] = torch.where(usable, end, main_part.log_end).exp() * main_part.log_kept.exp()
    stats["dropped_control_mass"] = (weights[:, 1:] * dropped).sum(1)
    return Fused(out, stats)


def _end_logp(main: Tensor, eos: Tensor) -> Tensor:
    """Return log-probabilities [B, n] of EOS ids given end: the main member's, uniform if it has none."""
    own = torch.log_softmax(main[:, eos].float(), dim=1)
    return torch.where(own.isnan(), -math.log(len(eos)), own)


def _invert(
    fuser: DeepenFuser, parts: Sequence[Split], sides: Sequence[Side], blend: Tensor, active: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the fused text distribution given text [B, V_0] (``-inf`` elsewhere) and statistics."""
    if fuser.options.support == "full":
        found = None
        logps = [part.text for part in parts]
        operators = [side.matrix.full() for side in sides]
        truncated = torch.zeros_like(blend[:, 0])
    else:
        taking_part = torch.cat([torch.ones_like(active[:, :1]), active[:, 1:]], dim=1)
        found = supports([part.text for part in parts], sides, taking_part, int(fuser.options.support))
        logps = [support.logp for support in found]
        operators = [side.matrix.at(support.ids) for side, support in zip(sides, found, strict=True)]
        held = torch.stack([support.log_mass for support in found], dim=1).exp()
        truncated = (blend * (1 - held).clamp(min=0)).sum(1)
    r = sum(blend[:, i, None] * operators[i].project(logps[i].exp()) for i in range(len(parts)))
    assert isinstance(r, Tensor)
    solved = fuser.solver.run(logps[0], r, operators[0], fuser.steps, fuser.learning_rate)
    stats = {**solved.stats, "truncated_mass": truncated}
    return (solved.logp if found is None else found[0].scatter(parts[0].text, solved.logp)), stats
