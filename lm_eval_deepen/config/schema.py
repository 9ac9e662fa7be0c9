"""Every key of an ensemble and of its members: type, default, range and meaning beside each.

Options of methods, weightings, poolings and solvers stand in the file of each; keys of recipes in `recipes`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from lm_eval_deepen.config.describe import Shown
from lm_eval_deepen.config.errors import bad_value, conflict
from lm_eval_deepen.config.frozen import FrozenDict
from lm_eval_deepen.config.keys import Keys, to_number

QUOTE = "quote it if it is a number"
SAVED = "save a model that is loaded already, and its tokenizer, with save_pretrained, and give the folder"


def _batch_size(value: Any) -> Any:
    """Return a positive number, ``auto`` or ``auto:N``, as `--model hf` takes them."""
    number = to_number(value)
    if number is not None and number.is_integer() and number >= 1:
        return int(number)
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+(\.\d+)?)?", value):
        return value
    raise ValueError  # without the value, as in `describe.Choice`


def _pattern(value: str) -> str:
    """Return a regular expression with one group."""
    try:
        groups = re.compile(value).groups
    except re.error as error:
        said = f"source_pattern {value!r} is no regular expression ({error}); correct it"
        raise bad_value("source_pattern", said) from error
    if groups != 1:
        raise bad_value(
            "source_pattern",
            f"source_pattern {value!r} has {groups} groups; it needs one, which is the source text. Write other groups "
            "as (?:...)",
        )
    return value


def _folder(value: str | None) -> str | None:
    """Return the path of a folder, where `~` stands for the user's, as in the paths of members."""
    return None if value is None else os.path.expanduser(value)


def _as_written(value: Any) -> Any:
    """Return a bare ``off`` or ``on`` as it was written: YAML reads it as a truth value."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class Composition(Keys):
    """The parts of an ensemble. Each part has keys of its own, see below."""

    pretrained: Annotated[Any, Shown("a hub name, a folder or a YAML file")] = Field(
        None, description="The main member, in whose vocabulary texts are generated; or a YAML file with these keys."
    )
    members: Annotated[Any, Shown("a list of models (inline: A+B)", "the main member alone")] = Field(
        None, description="All members, the main member first; in JSON and YAML each is a name or a mapping."
    )
    weights: Annotated[Any, Shown("a list of numbers (inline: 0.6+0.4)", "those of the weighting")] = Field(
        None, description="One weight for each member; they sum to 1."
    )
    method: Annotated[Any, Shown("the name of a method")] = Field(
        "deepen", description="How the members' next-token distributions are fused."
    )
    weighting: Annotated[
        Any,
        Shown(
            "the name of a weighting",
            "the weights that are given; if none are, bayes for mixture, and for deepen with rows from bytes and no "
            "option of a step's average or inverse; else, and with compat or a pooling, equal weights",
        ),
    ] = Field(None, description="The source of the members' weights.")
    pooling: Annotated[Any, Shown("the name of a pooling", "steps are fused")] = Field(
        None, description="How the members' own answers are combined. With a pooling, steps are not fused."
    )


class Settings(Keys):
    """The other keys of an ensemble."""

    compat: Annotated[str | None, Shown(default="the options as given")] = Field(
        None, description="A named set of the method's options: `reference` gives those of its paper."
    )
    seed: int = Field(
        0, ge=0, description="The seed of texts that are drawn at random, together with the seeds of the harness."
    )
    chat_fallback: Literal["error", "plain"] = Field(
        "error",
        description="What happens if a member has no chat template: an error, or the member reads conversations as "
        "plain text.",
    )
    matrix_dir: Annotated[
        str | None, AfterValidator(_folder), Shown("the path of a folder", "the user's cache folder")
    ] = Field(None, min_length=1, description="The folder for relative matrices and maps of vocabularies.")
    batch_size: Annotated[
        int | str, AfterValidator(_batch_size), Shown("a whole number of at least 1, auto or auto:N")
    ] = Field(
        1, description="The number of texts that are generated together. Scoring packs tokens independently of it."
    )
    max_batch_size: int = Field(64, ge=1, description="The largest batch that `batch_size: auto` takes.")
    speculate: Annotated[Literal["off", "lookup", "draft"], BeforeValidator(_as_written)] = Field(
        "off",
        description="The source of draft tokens in greedy decoding: repeated text (`lookup`) or the smallest member "
        "(`draft`). The ensemble verifies drafts, so no text changes. It drafts only where that saves time, seldom "
        "in a batch on a CPU.",
    )
    sampling: Literal["fused", "member"] = Field(
        "fused",
        description="How `do_sample` draws a token: from the fused distribution, or from one member that is drawn "
        "by its weight (`member`). With `member`, the other members need no forward pass until their turn. It needs "
        "linear averages, temperature 1 and `top_k: 0`; `mixture` then writes without a main member.",
    )
    skip_when: Literal["never", "agree", "confident", "safe"] = Field(
        "never",
        description="Which steps are left to the main member. `agree`: all members have the same likeliest piece. "
        "`confident`: the main member is confident. `safe`, as in SAFE: another member is inside one of its own "
        "tokens, or all agree, or the main member's likeliest piece has more than half of the mean probability.",
    )
    skip_above: float = Field(
        0.9, gt=0, le=1, description="For `skip_when`: the probability from which the main member counts as confident."
    )
    skip_check: bool = Field(
        False,
        description="Whether skipped steps are fused too, to count what skipping changes. Weights that learn are "
        "then equal.",
    )
    self_check: bool = Field(
        True,
        description="Whether the ensemble is measured on a small text before the first request. It changes no result.",
    )
    trace: Annotated[
        Annotated[int, Field(ge=0)] | bool | None,
        AfterValidator(lambda documents: documents or None),
        Shown("true, false or a number of documents", "false"),
    ] = Field(
        None,
        description="Whether a trace is written beside the samples: what each member said at every step, and the "
        "fused result. A number traces the first documents of each task. It changes no result.",
    )
    trace_dir: Annotated[
        str | None, AfterValidator(_folder), Shown("the path of a folder", "where `--output_path` puts the samples")
    ] = Field(None, min_length=1, description="The folder for traces.")
    covers: Annotated[
        Literal["off", "on"] | None,
        BeforeValidator(_as_written),
        Shown(default="on for deepen with rows from bytes, and for mixture; off with compat and elsewhere"),
    ] = Field(
        None,
        description="Whether the other members are asked what follows if the main member's token ends inside one of "
        "their tokens.",
    )
    evidence: Annotated[FrozenDict, Shown("a mapping, as `lm-eval-deepen tune` writes it")] = Field(
        FrozenDict(), description="What `lm-eval-deepen tune` measured. Results show it; it changes nothing."
    )


class MemberKeys(Keys):
    """Keys of one member, in addition to its loading arguments."""

    name: Annotated[str, Shown("non-empty text", "the end of `pretrained`", QUOTE)] = Field(
        "", min_length=1, pattern=r"\S", description="The member's name in messages and results; it must be unique."
    )
    pretrained: Annotated[str, Shown("a hub name or a path, as text", remedy=f"{QUOTE}; {SAVED}")] = Field(
        pattern=r"\S", description="A model's hub name or folder, as `--model hf` takes it."
    )
    weight: Annotated[float | None, Shown(default="equal weights")] = Field(
        None, ge=0, description="The member's share. Give one to all members or to none; they sum to 1."
    )
    temperature: float = Field(1.0, gt=0, description="The member's logits are divided by it before fusion.")
    hf_kwargs: FrozenDict = Field(
        FrozenDict(), description="Arguments for `from_pretrained` that are not checked here."
    )
    source_pattern: Annotated[
        Annotated[str, AfterValidator(_pattern)] | None, Shown("non-empty text", "the whole prompt")
    ] = Field(
        None,
        min_length=1,
        description="For an encoder-decoder member: a regular expression with one group. The encoder reads the "
        "group of the last match in the prompt.",
    )
    source_language: Annotated[str | None, Shown("non-empty text")] = Field(
        None,
        min_length=1,
        description="For an encoder-decoder member: the language of the source, as its tokenizer names it.",
    )
    target_language: Annotated[str | None, Shown("non-empty text")] = Field(
        None,
        min_length=1,
        description="For an encoder-decoder member: the language to write, as its tokenizer names it.",
    )

    allow_altered_tokenizer: bool = Field(
        False, description="Whether to accept a tokenizer that transformers builds differently from its own file."
    )
    allow_missing_weights: bool = Field(
        False,
        description="Whether to load a model whose files lack some of its weights, or have them in another shape. "
        "These weights are random.",
    )
    allow_unexpected_weights: bool = Field(
        False, description="Whether to load a model whose files have weights for which the model has no place."
    )

    @property
    def source(self) -> dict[str, str]:
        """What is said of an encoder-decoder member's source, as the configuration spells it."""
        keys = ("source_language", "source_pattern", "target_language")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}

    @property
    def allowed(self) -> dict[str, bool]:
        """What is allowed of the member that is an error otherwise."""
        return {key: True for key in ALLOWANCES if getattr(self, key)}


ALLOWANCES = tuple(name for name in MemberKeys.names() if name.startswith("allow_"))


class LoadingKeys(Keys):
    """Loading arguments of a member whose values are checked here. The harness checks the others."""

    backend: Literal["default", "causal", "seq2seq"] = Field(
        "default", description="The kind of model; `default` follows the model's configuration."
    )
    chat_template_args: Annotated[FrozenDict, Shown("a mapping (in JSON or YAML)")] = Field(
        FrozenDict(), description="Arguments of the chat template, in addition to the messages."
    )
    max_length: Annotated[int | None, Shown(default="the model's own")] = Field(
        None, ge=1, description="The length of the longest text, in the member's tokens."
    )
    think_end_token: Annotated[
        Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=0)] | None,
        Shown("a token's text, or its id of at least 0", "none"),
    ] = Field(None, description="The token that ends the thinking in a generated text. The answer begins after it.")
    tp_plan: Annotated[str | FrozenDict | None, Shown("text, or a mapping of layers to ways", "none")] = Field(
        None, description="How a member is divided over several processes; `auto` is the plan of its architecture."
    )
    tp_size: Annotated[int | None, Shown(default="all of the launch")] = Field(
        None, ge=2, description="The number of processes over which a member is divided."
    )

    @model_validator(mode="after")
    def _divided(self) -> Self:
        if self.tp_size and not self.tp_plan:
            raise conflict(
                "tp_size",
                f"tp_size={self.tp_size} says how many processes a member is divided over, and this member has no "
                "tp_plan: give tp_plan=auto as well, or leave tp_size out",
            )
        return self
