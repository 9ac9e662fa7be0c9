"""DeePEn: average in the space of relative representations, then return to the main vocabulary."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from lm_eval_deepen.config import Choice, Options, Shown
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion._deepen_step import Alone, DeepenFuser
from lm_eval_deepen.fusion.base import Fuser, MemberView, fusion
from lm_eval_deepen.relative.build import BYTE_ROWS, MatrixSpec
from lm_eval_deepen.relative.flatness import row_entropy_share
from lm_eval_deepen.relative.pieces import Tokenizers
from lm_eval_deepen.relative.spaces import NORMALIZATIONS
from lm_eval_deepen.relative.support import make_side
from lm_eval_deepen.relative.tops import TopRule
from lm_eval_deepen.solvers import SOLVERS
from lm_eval_deepen.solvers.base import Solver
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
STEP_OPTIONS = frozenset(
    "average inverse steps learning_rate trust_region support max_support max_truncated eos".split()
)  # how a step averages and inverts: whoever gives one asks for one static ensemble


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
        described = "all" if self.eos == "reference" else "text"
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
