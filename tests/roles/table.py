"""The table of roles in docs/roles.md: `python tests/roles/table.py` writes it anew."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from numagraft.roles import ROLES, survey

PAGE = Path(__file__).resolve().parents[2] / "docs" / "roles.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
SHOWN = tuple(role for role in ROLES if role not in ("decoder_layer", "norm", "linear", "embedding"))


def rows(families) -> list[list[str]]:
    """Per family: its type, and per role the attribute names (below the decoder layer) that have it."""
    table = []
    for title, (model_type, _) in families.FAMILIES.items():
        infos = survey(families.build(title))
        cells = [title, f"`{model_type}`"]
        for role in SHOWN:
            found: dict[str, None] = {}
            for info in infos:
                if info.role == role and info.tower == "text":
                    short = re.sub(r"^.*?\.(?:layers|h|blocks)\.\d+\.", "", info.name)
                    found[re.sub(r"(?<=\.)\d+(?=\.|$)", "N", short)] = None
            # what lies in another of the same role (a router's own linear) is not listed again
            names = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
            cells.append(", ".join(f"`{name}`" for name in names) or "–")
        linears = sum(info.role == "linear" and info.tower == "text" for info in infos)
        layers = sum(info.role == "decoder_layer" and info.tower == "text" for info in infos)
        cells.append(f"{linears} in {layers} layers")
        table.append(cells)
    return table


def generate(families) -> str:
    head = ["family", "model type", *SHOWN, "linear"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(families)]
    return "\n".join([BEGIN, *lines, END])


def replace_generated(page: str, table: str) -> str:
    return re.sub(f"{BEGIN}.*{END}", lambda _: table, page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from roles import families

    PAGE.write_text(replace_generated(PAGE.read_text(), generate(families)))
