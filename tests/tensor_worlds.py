"""Small synthetic members for tests of the tensor layer: shared pieces, random embeddings."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from lm_eval_deepen.fusion.base import MemberView, Spelling
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

BYTES = [bytes([byte]) for byte in b"abcs0123456789"]  # the pieces <0x61>, <0x62>, ... of byte fallback
TEXT_TOO = [b"a", b"b", b"1"]  # of these, what is a piece of text as well, under a later id


def vocabulary(
    own: int,
    *,
    tag: str,
    shared: int = 60,
    eos: tuple[int, ...] = (1,),
    control: int = 3,
    padded: int = 0,
    byte_pieces: bool = False,
) -> ByteVocab:
    """Control ids, byte pieces, pieces shared by all, own pieces, duplicates of shared and byte pieces, padding."""
    fallback = frozenset(range(control, control + len(BYTES))) if byte_pieces else frozenset()
    pieces = [b""] * control + BYTES[: len(fallback)]
    pieces += [b"s%d" % i for i in range(shared)] + [f"{tag}{i}".encode() for i in range(own)]
    pieces += [b"s5", b"s7"] + (TEXT_TOO if byte_pieces else []) + [b""] * padded
    unused = frozenset(range(len(pieces) - padded, len(pieces)))
    return ByteVocab(tuple(pieces), frozenset(range(control)), unused, eos, fallback)


def member(name: str, vocab: ByteVocab, dim: int, seed: int) -> MemberView:
    """A member with random embedding rows [V, dim]; rows of unused ids are zero."""
    embeddings = torch.randn(len(vocab), dim, generator=torch.Generator().manual_seed(seed))
    embeddings[sorted(vocab.unused)] = 0.0
    found = view(name, vocab, embeddings)
    return replace(found, spelling=spelling(vocab)) if vocab.byte_fallback else found


def view(name: str, vocab: ByteVocab, embeddings: Tensor) -> MemberView:
    """A member with these embedding rows."""
    return MemberView(name, vocab, lambda: embeddings, lambda: digest(embeddings))


def spelling(vocab: ByteVocab) -> Spelling:
    """A tokenizer that takes the longest piece, and of ids with the same bytes no ``<0xNN>`` piece, as real ones do."""

    def encode(data: bytes) -> list[int] | None:
        ids = []
        while data:
            length = next((n for n in range(len(data), 0, -1) if data[:n] in vocab.ids_of), None)
            if length is None:
                return None
            ids.append(vocab.preferred(vocab.ids_of[data[:length]]))
            data = data[length:]
        return ids

    return Spelling(encode, f"longest:{vocab.fingerprint}")


def with_output_rows(member: MemberView, rows: Tensor) -> MemberView:
    """The member with a head of these rows [V, d]."""
    return replace(member, load_output_embeddings=lambda: rows, load_output_fingerprint=lambda: digest(rows))


def digest(rows: Tensor) -> str:
    """A hex digest of some rows."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def trio(byte_pieces: bool = False) -> list[MemberView]:
    """Three members: the main one with padded rows, one with two EOS ids, one larger."""
    return [
        member("main", vocabulary(90, tag="a", padded=4, byte_pieces=byte_pieces), 16, 0),
        member("second", vocabulary(140, tag="b", eos=(1, 2), byte_pieces=byte_pieces), 24, 1),
        member("third", vocabulary(40, tag="c", byte_pieces=byte_pieces), 12, 2),
    ]


def rows(members: list[MemberView], count: int, *, seed: int = 7, scale: float = 3.0) -> list[Tensor]:
    """Random log-probabilities [count, V_m] per member; unused ids have mass, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.log_softmax(scale * torch.randn(count, len(m.vocabulary), generator=generator), dim=-1) for m in members
    ]


def renormalised(logp: Tensor, vocab: ByteVocab) -> Tensor:
    """Rows without their unused ids."""
    logp = logp.clone()
    logp[:, sorted(vocab.unused)] = float("-inf")
    return torch.log_softmax(logp, dim=-1)
