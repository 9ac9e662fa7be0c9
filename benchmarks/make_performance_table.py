"""Put the figures of a run of benchmarks/cost.py into docs/performance.md.

    python benchmarks/cost.py | tee cost.txt
    python benchmarks/make_performance_table.py cost.txt

Only the text between the markers `<!-- table: DEVICE -->` and `<!-- end -->` changes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from costs.figures import markdown, number

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def section(found: Mapping[str, Any]) -> str:
    """Return the text for one JSON line of the benchmark."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {release}" for name, release in found["versions"].items())
    hardware = machine["gpu"] if found["device"].startswith("cuda") else f"{machine['cpu']}, {machine['cores']} cores"
    members = " + ".join(member["name"] if isinstance(member, Mapping) else member for member in found["members"])
    facts = (
        members,
        f"{hardware}, {machine['torch_threads']} threads",
        found["dtype"],
        f"batch size {found['batch_size']}, `hf` at {found['hf_batch_sizes']}",
        versions,
        f"{found['data']} questions",
        f"{found['scale']['repeats']} repeats, {number(found['seconds'] / 60)} minutes",
    )
    return f"{'; '.join(facts)}.\n\n{markdown(found['figures'])}"


def insert(page: str, device: str, text: str) -> str:
    """Return `page` with `text` between the markers of `device`.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- table: {device} -->", "<!-- end -->"
    head, found, tail = page.partition(begin)
    _, closed, rest = tail.partition(end)
    if not (found and closed):
        raise ValueError(f"no {begin} ... {end} in the page: add the two markers where the table belongs")
    return f"{head}{begin}\n{text}\n{end}{rest}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the last line of a run's output and change the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="what benchmarks/cost.py printed")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    found = json.loads(args.output.read_text("utf-8").splitlines()[-1])
    device = found["device"].partition(":")[0]
    args.page.write_text(insert(args.page.read_text("utf-8"), device, section(found)), "utf-8")


if __name__ == "__main__":
    main()
