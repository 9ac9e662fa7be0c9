"""DeePEn: average in the space of relative representations, then return to the main vocabulary."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lm_eval_deepen.errors import ConfigError, did_you_mean
from lm_eval_deepen.fusion._deepen_step import Alone, DeepenFuser
from lm_eval_deepen.fusion.seam import Fuser, MemberView, fusion
from lm_eval_deepen.inverse import get_solver
from lm_eval_deepen.relative.average import AVERAGES
from lm_eval_deepen.relative.build import BYTE_ROWS, MatrixSpec
from lm_eval_deepen.relative.flatness import row_entropy_share
from lm_eval_deepen.relative.pieces import Tokenizers
from lm_eval_deepen.relative.support import make_side
from lm_eval_deepen.relative.tops import Rule
from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids, duplicates, find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

if TYPE_CHECKING:
    from lm_eval_deepen.relative.store import MatrixStore

__all__ = ["Deepen", "DeepenFuser"]

log = logging.getLogger(__name__)

DEFAULT_NORMALIZATION = "centered"
DEFAULT_TEMPERATURE = 100.0
DEFAULT_TOP_M = 64
DEFAULT_SUPPORT = 512  # pieces per member, where rows come from embeddings
DEFAULT_MAX_TRUNCATED = 0.1


@fusion("deepen", paper="arXiv:2404.12715")
@dataclass(frozen=True)
class Deepen:
    """Options of ``method: deepen``.

    Attributes:
        rows: what stands for a piece: ``canonical`` or ``prefix`` anchors, both from bytes alone, its ``embedding``
            (published), or the latter with ``exact`` anchors.
        embeddings: which embedding that is: of the ``input`` (published, the default), or of the ``output`` head,
            whose rows are the same where a member ties them.
        average: of the members' relative vectors: ``linear`` (published) or ``geometric``.
        inverse: solver of the inverse: ``exact`` where rows come from bytes, ``em``, ``mirror`` or ``adamw`` (the
            published search); by default exact where that is possible, else em.
        steps: its iterations; 5 by default.
        learning_rate: of adamw (0.15 by default) or mirror (1.7).
        trust_region: largest KL divergence from the main member's distribution over the pieces of text that a step
            redistributes, in nats.
        normalization: of rows from embeddings: ``centered`` by default, ``cosine``, ``decorrelated`` or ``reference``
            (published).
        relative_temperature: factor on the normalised cosines of rows from embeddings; 100 by default.
        row_entropy: instead of it, the mean entropy in nats that every member's rows have.
        top_m: entries kept per row from embeddings, 64 by default; 0 keeps all (dense).
        max_anchors: use a seeded subset of this many anchors.
        min_anchors: fewer common anchors than this are an error.
        support: text pieces per member that a step redistributes: their number, the share of the member's text that
            they hold (a number between 0 and 1), or ``full`` (exact); by default full where rows come from bytes,
            and 512 elsewhere.
        max_support: with a share, this many pieces per member at most.
        max_truncated: the largest share of a member's text outside the support, 0.1 by default; rows that would
            leave out more get a larger support, up to the full one. 1 bounds nothing.
        anchor_seed: which subset, with max_anchors.
        eos: ``anchor`` gives end of text a role anchor of its own; ``reference`` treats EOS pieces as
            ordinary pieces and leaves rows whose main argmax is one, or learning rate 0, to the main member.
    """

    rows: str = "canonical"
    embeddings: str | None = None
    average: str = "linear"
    inverse: str | None = None
    steps: int | None = None
    learning_rate: float | None = None
    trust_region: float | None = None
    normalization: str | None = None
    relative_temperature: float | None = None
    row_entropy: float | None = None
    top_m: int | None = None
    max_anchors: int | None = None
    min_anchors: int = 16
    support: int | float | Literal["full"] | None = None
    max_support: int | None = None
    max_truncated: float | None = None
    anchor_seed: int = 0
    eos: str = "anchor"

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

    def __post_init__(self) -> None:
        """Check every value; ConfigError names the option."""
        solver = get_solver(self.solver)
        if self.learning_rate is not None:
            if solver.learning_rate is None:
                raise ConfigError(
                    f"learning_rate: inverse {solver.name!r} takes none, got {self.learning_rate!r}. "
                    "Remove it, or use inverse 'adamw'."
                )
            if not (isinstance(self.learning_rate, int | float) and 0 <= self.learning_rate < math.inf):
                raise ConfigError(f"learning_rate must be a number of at least 0, got {self.learning_rate!r}.")
        for name, least, optional in (
            ("steps", 1, True),
            ("top_m", 0, True),
            ("max_anchors", 1, True),
            ("max_support", 1, True),
            ("min_anchors", 1, False),
            ("anchor_seed", 0, False),
        ):
            value = getattr(self, name)
            if not _whole(value, least) and not (optional and value is None):
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        self._check_support()
        if self.eos not in ("anchor", "reference"):
            raise ConfigError(f"eos must be 'anchor' or 'reference', got {self.eos!r}.")
        if self.average not in AVERAGES:
            near = did_you_mean(str(self.average), AVERAGES)
            raise ConfigError(f"average must be {' or '.join(AVERAGES)}, got {self.average!r}.{near}")
        if self.trust_region is not None and not _positive(self.trust_region):
            raise ConfigError(f"trust_region must be a positive number of nats, got {self.trust_region!r}.")
        if self.max_anchors is not None and self.max_anchors < self.min_anchors:
            raise ConfigError(f"max_anchors {self.max_anchors} is less than min_anchors {self.min_anchors}.")
        if self.relative_temperature is not None and not _positive(self.relative_temperature):
            raise ConfigError(f"relative_temperature must be a positive number, got {self.relative_temperature!r}.")
        if self.inverse == "exact" and not self.from_bytes:
            raise ConfigError(
                f"inverse 'exact' needs one-hot rows, got rows {self.rows!r}. Use rows canonical or prefix, or another "
                "inverse."
            )
        self.matrix_spec()
        for name in ("embeddings", "normalization", "relative_temperature", "row_entropy", "top_m"):
            if self.from_bytes and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is of rows from embeddings, got {getattr(self, name)!r} with rows {self.rows!r}. "
                    "Remove it, or give rows: embedding (or exact)."
                )

    def _check_support(self) -> None:
        """Check how large the support is and what bounds it."""
        if isinstance(self.support, float) and self.support > 1 and self.support.is_integer():
            object.__setattr__(self, "support", int(self.support))  # the command line may write 512 as 512.0
        share = isinstance(self.support, float) and 0 < self.support < 1
        if self.support not in (None, "full") and not share and not _whole(self.support, 1):
            raise ConfigError(
                "support must be 'full', a whole number of at least 1 or a share between 0 and 1, "
                f"got {self.support!r}."
            )
        if self.max_support is not None and not share:
            raise ConfigError(
                f"max_support is for a support given as a share, such as 0.99, got max_support {self.max_support!r} "
                f"with support {self.support!r}. Remove it."
            )
        if self.max_truncated is None:
            return
        if not (_positive(self.max_truncated) and self.max_truncated <= 1):
            raise ConfigError(f"max_truncated must be a share above 0 and up to 1, got {self.max_truncated!r}.")
        if self.full:
            raise ConfigError(
                f"max_truncated is for a truncated support, got {self.max_truncated!r} with a full one. "
                "Remove it, or give support as a number or a share."
            )

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

    def support_rule(self) -> Rule | None:
        """Return which pieces a member brings to a row's support, None for all of them."""
        if self.full:
            return None
        bound = DEFAULT_MAX_TRUNCATED if self.max_truncated is None else float(self.max_truncated)
        if isinstance(self.support, float):
            return Rule(self.max_support, self.support, bound)
        assert not isinstance(self.support, str)
        return Rule(DEFAULT_SUPPORT if self.support is None else self.support, None, bound)

    def matrix_spec(self) -> MatrixSpec:
        """Return how the relative matrices are made."""
        described = "all" if self.eos == "reference" else "text"
        temperature = DEFAULT_TEMPERATURE if self.relative_temperature is None else float(self.relative_temperature)
        top_m = DEFAULT_TOP_M if self.top_m is None else self.top_m
        normalization = self.normalization or DEFAULT_NORMALIZATION
        which = "input" if self.embeddings is None else self.embeddings
        return MatrixSpec(normalization, temperature, top_m, described, self.rows, self.row_entropy, which)

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
        spec, tokenizers = self.matrix_spec(), Tokenizers.of(members)
        sides, matrices = [], []
        for member in members:
            vocabulary, matrix = member.vocabulary, store.get(member, anchors, spec, tokenizers)
            ids, twins = anchor_ids(vocabulary, anchors), duplicates(vocabulary, anchors)
            sides.append(make_side(vocabulary, matrix, ids, twins, spec.rows))
            info = store.info(member, anchors, spec, tokenizers)
            which = {} if spec.from_bytes else {"embeddings": _said(member, spec.embeddings)}
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


def _said(member: MemberView, which: str) -> str:
    return "output, tied to the input" if which == "output" and member.tied else which


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
