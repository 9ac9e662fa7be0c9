"""What the harness reads off a model besides its answers. All of it is the main member's."""

from __future__ import annotations

import copy
import hashlib
from operator import attrgetter
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.errors import MemberError, RenderError
from lm_eval_deepen.harness.response_cache import rendering_digest
from lm_eval_deepen.member.chat import ChatPrompt, digest

LONGEST_NAMES = 40  # bytes of tokenizers' names; a file's name has 255, of which the harness takes up to 200


class MainMemberView(TemplateLM):
    """Tokens, lengths and chat templates of the main member, by the code of ``hf`` itself where it has some."""

    ensemble_config: EnsembleConfig  # what was asked for
    ensemble: Ensemble  # the members

    _DEFAULT_MAX_LENGTH = HFLM._DEFAULT_MAX_LENGTH
    max_length = HFLM.max_length
    tok_encode = HFLM.tok_encode
    tok_batch_encode = HFLM.tok_batch_encode
    tok_decode = HFLM.tok_decode

    @property
    def _main(self) -> Any:
        """The harness's own model class around the main member."""
        return self.ensemble.main.lm

    model = property(attrgetter("_main.model"), doc="The main member's model.")
    add_bos_token = property(
        attrgetter("_main.add_bos_token"), doc="Whether prompts get a BOS; None: the tokenizer says."
    )
    _max_length = property(attrgetter("_main._max_length"), doc="The length that was asked for.")
    tokenizer = property(attrgetter("_main.tokenizer"), doc="The main member's tokenizer.")
    eot_token_id = property(attrgetter("_main.eot_token_id"), doc="The main member's end-of-text token.")
    prefix_token_id = property(
        attrgetter("_main.prefix_token_id"), doc="The token that an empty context stands for, in the main member."
    )
    max_gen_toks = property(attrgetter("_main.max_gen_toks"), doc="Tokens to generate where a task names no number.")

    @property
    def batch_size(self) -> int | str:
        """As given: a number, ``auto`` or ``auto:N``."""
        return self.ensemble_config.batch_size

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches rendered requests: all members' tokenizers and how they render.

        It becomes part of a file's name, which not every harness keeps short enough: long names are hashed.
        """
        names = "+".join(member.lm.tokenizer_name for member in self.ensemble.active)
        if len(self.ensemble.active) > 1 and len(names.encode()) > LONGEST_NAMES:
            names = f"{len(self.ensemble.active)}-members-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
        names = f"{names}-plain" if self._plain_chat else names
        if len(self.ensemble.active) == 1 and not self._main.chat_template_args:
            return names  # as `hf`, which leaves out what is hashed here
        return f"{names}-{rendering_digest(self.ensemble.active)}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation by the main member's template, and keep it for the other members' own.

        A system message that the templates of all members leave out is left out, as in ``hf``. A conversation that some
        template cannot render is the request's fault, which is told with its document when it is asked for.

        Raises:
            MemberError: a member that cannot render any conversation, or that would be the only one without its system
                message.
        """
        messages = copy.deepcopy(chat_history)
        fallback = self.ensemble_config.chat_fallback
        # Every member renders now, so that one that cannot fails before anything is computed.
        members = self.ensemble.active if self.ensemble_config.pooling is None else self.ensemble.members
        try:
            texts = [member.render(messages, add_generation_prompt, fallback) for member in members]
        except RenderError as error:
            for member in members:  # a template that cannot render a greeting, either, fails by itself
                try:
                    member.render([{"role": "user", "content": "Hello"}], True, fallback)
                except RenderError:
                    raise error from None
            return ChatPrompt(str(messages), messages, add_generation_prompt, failure=str(error))
        if len(members) > 1 and any(message.get("role") == "system" for message in messages):
            without = [m.name for m in members if m.drops_system(messages, add_generation_prompt, fallback)]
            if 0 < len(without) < len(members):
                others = [member.name for member in members if member.name not in without]
                raise MemberError(
                    f"the chat template of member {', '.join(map(repr, without))} leaves out the system message, which "
                    f"that of {', '.join(map(repr, others))} renders: they would be told different things. Evaluate "
                    "without a system message (--system_instruction, a task's description), or give that member a "
                    "tokenizer whose template takes one (member argument tokenizer=...)."
                )
            if without:
                messages = [message for message in messages if message.get("role") != "system"]
        return ChatPrompt(texts[0], messages, add_generation_prompt, others=digest(texts[1:]))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the main member's template, for the results file, as ``hf`` does."""
        if chat_template and self._plain_chat:
            return "none (chat_fallback=plain)"
        return super().chat_template(chat_template)

    @property
    def _plain_chat(self) -> bool:
        return self.ensemble_config.chat_fallback == "plain" and not self.ensemble.main.has_chat_template
