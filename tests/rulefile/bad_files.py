"""Bad rule files with their exact messages: `bad_files.txt` holds, per case, the file and what is said about it.

`python tests/rulefile/bad_files.py` writes the messages anew; read the difference before committing it.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).with_name("bad_files.txt")


@dataclass(frozen=True)
class Case:
    name: str
    text: str
    expected: str


def cases() -> list[Case]:
    found = []
    for block in DATA.read_text().split("=== ")[1:]:
        head, _, expected = block.partition("--- says\n")
        name, _, text = head.partition("\n")
        found.append(Case(name, text, expected.rstrip("\n")))
    return found


def said(text: str, folder: Path) -> str:
    """What is said about the file, the folder's name left out; "" when it is accepted."""
    from numagraft.errors import RuleError
    from numagraft.platform import Platform
    from numagraft.rulefile import load_rules

    path = folder / "rules.yaml"
    path.write_text(text)
    try:
        load_rules(path, platform=Platform.virtual(1))
    except RuleError as error:
        return str(error).replace(f"{folder}/", "")
    return ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = "".join(
            f"=== {case.name}\n{case.text}--- says\n{said(case.text, Path(folder))}\n" for case in cases()
        )
    DATA.write_text(text)
    sys.stdout.write(text)
