"""Every `tigon …` command that the pages, examples and tutorials show is one that the command line takes."""

import re
import shlex
from importlib import import_module

import pytest
from installs import ROOT

from tigon.cli import COMMANDS, main

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(p for room in ("docs", "examples", "tutorials") for p in (ROOT / room).glob("*.*"))
ALONE = ("doctor", "list", "demo")  # commands that need no argument
PLACEHOLDERS = {"OP": "ssd_scan", "OP…": "ssd_scan", "|": None, "all…": "all"}


def shown() -> list[tuple[str, str]]:
    """(page, command) of spans, and of lines of code; a mere name, alternatives and optional parts are left out."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^\s*tigon [^\n`]*$", text, re.MULTILINE)
        for command in [*re.findall(r"`(tigon [^`\n]+)`", text), *lines]:
            command = re.sub(r"\s(#|\[| \|).*", "", command.strip())
            words = [PLACEHOLDERS.get(w, w) for w in shlex.split(command)[1:]]
            known = words and words[0] in COMMANDS and (words[1:] or words[0] in ALONE)
            if known and not any(w is None or "…" in w for w in words):
                found.append((page.name, shlex.join(words)))
    return sorted(set(found))


SHOWN = shown()


def test_commands_were_found_and_the_readme_shows_every_one():
    assert len(SHOWN) > 25
    assert {c.split()[0] for page, c in SHOWN if page == "README.md"} == set(COMMANDS)


@pytest.mark.parametrize("page,command", SHOWN)
def test_a_command_in_prose_is_taken_as_typed(page, command, monkeypatch, capsys):
    words = shlex.split(command)
    ran = []
    monkeypatch.setattr(import_module(COMMANDS[words[0]][1]), "run", lambda args: ran.append(args))
    try:
        main(words)
    except SystemExit:
        pytest.fail(f"{page}: tigon {command}: {capsys.readouterr().err}")
    assert ran
