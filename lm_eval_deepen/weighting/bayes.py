"""Weights that learn from the text, by Bayes' rule over static ensembles. Learning starts again with every request."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from lm_eval_deepen.config import Shown
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.weighting.base import PromptLoss, Weighting, weighting
from lm_eval_deepen.weighting.experts import Experts


@weighting("bayes", paper="arXiv:1302.2820")
class Bayes(Weighting):
    """Options of ``weighting: bayes``: a Bayesian mixture of static ensembles.

    The experts are constant weights on a grid, each with the linear average and, for a method that has it, with the
    geometric one, as it is and less sure (see `POWERS`). After every step (or stretch) an expert's posterior is
    multiplied by the probability that it gave to what came. The mixture needs at most log2 K bits a text more than the
    best of its K experts, whatever the text. With ``learn_from: prompt`` what a prompt teaches may be wrong about what
    follows; a share of the prior stays, so that the bound is log2(K / prior_share). All depends on nothing but the
    bytes of its own request.
    """

    learn_from: Literal["prompt", "continuation"] = Field(
        "continuation",
        description="Where learning starts: at the continuation, or at the last part of the request's prompt.",
    )
    prompt_stretches: int = Field(
        32,
        ge=1,
        description="The number of last stretches of the prompt from which weights learn. A stretch lies between "
        "two places where tokens of all members end.",
    )
    prior_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="The share of the prior that stays in the weights after a prompt. A misleading prompt costs at "
        "most log2(1/prior_share) bits.",
    )
    averages: Literal["both", "linear"] = Field(
        "both", description="The averages of the experts: linear and, if the method has it, geometric; or only linear."
    )
    prior: Annotated[tuple[float, ...] | None, Shown(default="the same for all")] = Field(
        None,
        min_length=1,
        description="The prior of the experts: one number of 0 or more for each expert, in their order.",
    )

    @field_validator("prior")
    @classmethod
    def _believe_in_somebody(cls, prior: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if prior is not None and (min(prior) < 0 or not 0 < sum(prior) < math.inf):
            raise ConfigError(
                f"prior must be numbers of 0 or more with a finite sum above 0; got {list(prior)}", key="prior"
            )
        return prior

    @model_validator(mode="after")
    def _learn_from_the_prompt(self) -> Self:
        fields = type(self).model_fields
        for key in ("prompt_stretches", "prior_share") if self.learn_from == "continuation" else ():
            if (value := getattr(self, key)) != fields[key].default:
                raise ConfigError(
                    f"{key}={value} is about what a prompt teaches, and learn_from=continuation takes no prompt into "
                    f"account; give learn_from=prompt, or remove {key}",
                    key=key,
                    code="conflict",
                )
        return self

    def check_members(self, count: int, method: Any) -> None:
        """Refuse averages that a method has no other than, and another number of priors than of its experts."""
        geometric = getattr(method, "HAS_GEOMETRIC", False)
        if self.averages == "linear" and not geometric:
            raise ConfigError(
                f"averages=linear has no effect beside method={method.NAME}, whose experts have no geometric average; "
                "remove averages",
                key="averages",
                code="conflict",
            )
        if self.prior is not None:
            if getattr(method, "BY_STRETCHES", False):
                self.of_stretches(count)
            else:
                self.of_steps(count, geometric=geometric)

    @property
    def reads_prompts(self) -> bool:  # type: ignore[override]
        """Whether learning starts at the prompt."""
        return self.learn_from == "prompt"

    def build(self) -> Self:
        """Return itself: it says which experts there are; the posterior lives with the request."""
        return self

    def of_steps(self, members: int, *, geometric: bool) -> Experts:
        """Return the experts at steps for so many members; `geometric` says whether the method has that average."""
        both = geometric and self.averages == "both"
        return self._learning(Experts.of_steps(members, geometric=both, prior=self.prior))

    def of_stretches(self, members: int) -> Experts:
        """Return the experts at stretches for so many members."""
        return self._learning(Experts.of_stretches(members, prior=self.prior))

    def _learning(self, experts: Experts) -> Experts:
        if not self.reads_prompts:
            return experts
        return replace(experts, prompt_stretches=self.prompt_stretches, prior_share=self.prior_share)


def after_prompt(experts: Experts, losses: Sequence[PromptLoss | None]) -> Tensor:
    """Return the experts' log weights [K] after a prompt of which every member has a loss, or None where it abstains.

    The prompt is divided into stretches: at the places where the tokens of all members end. An expert gives a stretch
    the weighted mean of what the members give it by their own tokens, so that no distribution is fused for a prompt.
    The last stretches are most like what follows, and a long prompt would leave one expert alone.
    """
    known = [loss for loss in losses if loss is not None]
    weights = experts.weights
    if len(known) < len(losses):
        present = torch.tensor([loss is not None for loss in losses])
        weights = experts.among(present[None])[0][:, present]
    counts = [list(accumulate(length for _, length in loss.each)) for loss in known]  # bytes up to each token's end
    common = sorted(set.intersection(*map(set, counts)))
    if not common:
        return experts.log_prior
    sums = []
    for loss, ends in zip(known, counts, strict=True):
        each = loss.at_powers or [(value,) for value, _ in loss.each]
        cuts = [0, *(bisect_right(ends, at) for at in common)]  # tokens without bytes belong to the stretch before
        own = [[math.fsum(column[a:b]) for a, b in pairwise(cuts)] for column in zip(*each, strict=True)]
        sums.append(torch.tensor(own, dtype=torch.float64))  # [P, S]
    logp = torch.stack(sums, dim=1)[experts.places_of_powers()]  # [K, M, S]
    return experts.begun(torch.logsumexp(weights.log()[:, :, None] + logp, dim=1))
