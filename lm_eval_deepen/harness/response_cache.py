"""The harness's caches, one per ensemble: of responses (``--use_cache``) and of requests (``--cache_requests``).

The harness keeps responses in a database of pickles: reading it runs what its writer put there. So a database that
others can write to is refused, and of every other one nothing but numbers, texts and tuples of them is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api import model as api

from lm_eval_deepen.errors import CacheError
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.member.chat import distinct
from lm_eval_deepen.member.model_files import changed

if TYPE_CHECKING:
    from lm_eval.api.model import CacheHook
    from sqlitedict import SqliteDict

    from lm_eval_deepen.member import Member

FINGERPRINT_KEY = "lm_eval_deepen fingerprint"


def claim(stored: SqliteDict, fingerprint: str, models: Mapping[str, str], ranks: Ranks) -> None:
    """Tie a cache database to an ensemble and its models (see `digests`): the harness's keys hold the request alone.

    Of a conversation they hold the main member's rendering alone. Two that it renders alike are told apart here.

    Every process of a run has its own database. All of them are brought to hold the same answers, since the
    harness asks for what its process does not have, and the processes answer together.

    Raises:
        CacheError: some process's database can be written by others, is damaged, or belongs to another ensemble; raised
            in all of them.
    """
    tell_conversations_apart()
    stored.decode = functools.partial(read_answer, where=stored.filename)
    for objection in ranks.gather(_open_to_others(stored) or _objection(stored, fingerprint, models)):
        if objection:
            raise CacheError(objection)
    stored[FINGERPRINT_KEY] = {"fingerprint": fingerprint, "models": dict(models)}
    stored.commit()  # on disk, whatever the database's own habit
    if ranks.count * ranks.slices > 1:
        held = ranks.gather(set(stored.keys()))  # a killed run leaves each process with its own
        everywhere = set.intersection(*held)
        before = set().union(*held[: ranks.process])
        for answers in ranks.gather({key: stored[key] for key in held[ranks.process] - everywhere - before}):
            stored.update({key: value for key, value in answers.items() if key not in held[ranks.process]})
        stored.commit()


def tell_conversations_apart() -> None:
    """Make keys of the response cache hold the other members' renderings as well; other keys are the harness's own."""
    keyed = api.hash_args
    if getattr(keyed, "tells_conversations_apart", False):
        return

    @functools.wraps(keyed)
    def hash_args(attr: str, args: Iterable[Any]) -> str:
        return keyed(attr, distinct(args))

    hash_args.tells_conversations_apart = True  # type: ignore[attr-defined]
    api.hash_args = hash_args


class _Plain(pickle.Unpickler):
    """Reads what an answer is made of, and nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every object that is no number, text, tuple, list or dict."""
        raise pickle.UnpicklingError(f"an object of {module}.{name} is no answer")


def read_answer(data: bytes, where: str) -> Any:
    """Return an answer of the response cache; `where`, the database, stands in messages.

    Raises:
        CacheError: it is none, or damaged.
    """
    try:
        return _Plain(io.BytesIO(bytes(data))).load()
    except Exception as error:  # whatever bytes that are no pickle make of it
        raise CacheError(
            f"the response cache {where} holds something that is no answer ({type(error).__name__}: {error}): it is "
            "damaged, or another program wrote it. Delete the file, or give --use_cache another path."
        ) from error


def keep(hook: CacheHook, kind: str, arguments: tuple[Any, ...], answer: Any) -> None:
    """Put an answer into the response cache, if there is one; raises CacheError where it cannot be written."""
    try:
        hook.add_partial(kind, arguments, answer)
    except sqlite3.Error as error:
        where = getattr(hook.dbdict, "filename", "")
        raise CacheError(
            f"the response cache {where} cannot be written ({error}). Free space on the disk, or give --use_cache "
            "another path. What is in it is kept."
        ) from error


@contextlib.contextmanager
def settling(hook: CacheHook) -> Iterator[None]:
    """Bring what was written to the disk where a run ends early, so that no journal stays beside the database."""
    try:
        yield
    except BaseException:
        if hook.dbdict is not None:
            with contextlib.suppress(Exception):  # the run ends for another reason, which must not be hidden
                hook.dbdict.commit()
        raise


def _open_to_others(stored: SqliteDict) -> str:
    """Return why a database, its journals or its folder are not this user's alone; nothing of it is read before.

    A database without answers that only its mode opens to others is closed to them.
    """
    if os.name != "posix":
        return ""
    path = Path(os.path.realpath(stored.filename))
    if path.is_file() and path.stat().st_uid == os.geteuid() and not len(stored):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)
    files = [path, *(path.with_name(path.name + end) for end in ("-journal", "-wal", "-shm"))]
    for place in [*(file for file in files if file.exists()), path.parent]:
        if who := _who_else(place):
            mend = "" if "belongs" in who else f"Where you trust what is in it, `chmod go-w {place}`; else give"
            return (
                f"the response cache {stored.filename} is not yours alone: {place} {who}. Reading it runs what "
                f"they put there. {mend or 'Give'} --use_cache a path in a folder of your own."
            )
    return ""


def _who_else(place: Path) -> str:
    """Return who else than this user can put something into a file or folder; root is trusted."""
    status = place.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (id {status.st_uid})"
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return ""  # as /tmp: others can neither replace nor remove what is ours
    if status.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
        return f"can be written by its group (id {status.st_gid})"
    return ""


def _is_own_group(group: int) -> bool:
    """Return whether nobody but this user is in a group, as where every user has a group of the same name."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    if set(entry.gr_mem) - {user.pw_name}:
        return False
    return {other.pw_name for other in pwd.getpwall() if other.pw_gid == group} <= {user.pw_name}


def _objection(stored: SqliteDict, fingerprint: str, models: Mapping[str, str]) -> str:
    try:
        held = stored.get(FINGERPRINT_KEY)
    except CacheError as error:
        return str(error)
    if not isinstance(held, dict):  # as older versions left it
        held = {"fingerprint": held}
    owner = held.get("fingerprint")
    if owner == fingerprint and (others := changed(models, held.get("models"))):
        return (
            f"the response cache {stored.filename} holds answers that were given before the files in {others} changed: "
            "other weights under the same name. Give --use_cache another path, or delete the file."
        )
    if owner == fingerprint or (owner is None and not len(stored)):
        return ""
    whose = f"the ensemble with fingerprint {owner}" if owner else "a model that left no fingerprint"
    return (
        f"the response cache {stored.filename} holds answers of {whose}; this ensemble has {fingerprint}. "
        "Give --use_cache another path, or delete the file."
    )


def rendering_digest(members: Sequence[Member]) -> str:
    """Return a short digest of what decides how members render a conversation, beside their tokenizers' names."""
    facts = [[getattr(member.lm.tokenizer, "chat_template", None), member.lm.chat_template_args] for member in members]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
