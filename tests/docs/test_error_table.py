"""Every error text that the README explains is one that Tigon says."""

import ast
import re

import pytest
from installs import ROOT

SECTION = re.compile(r"## When something goes wrong\n(.*?)\n## ", re.DOTALL)
TEXTS = re.findall(
    r"^\| `(.*?)` \|", SECTION.search((ROOT / "README.md").read_text())[1], re.MULTILINE
)


def said() -> list[str]:
    """All texts of the sources, with … for what is filled in."""
    found = []
    for room in ("python", "kernels", "build_tools"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", None) for part in node.values)
                    found.append("".join(p if isinstance(p, str) else "…" for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


SAID = said()


def test_the_table_was_found():
    assert len(TEXTS) > 8


@pytest.mark.parametrize("text", TEXTS)
def test_explained_text_is_one_that_the_sources_say(text):
    parts = [re.escape(part) for part in text.split("…") if part.strip()]
    assert parts
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(source) for source in SAID)
