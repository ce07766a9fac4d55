"""Every environment variable that the project reads stands in docs/environment.md, and no other does."""

import re

from installs import ROOT

READ = re.compile(r"""(?:environ[^\n"']*|getenv\(|setenv\()["'](TIGON_\w+)["']""")


def read_by_the_project() -> set[str]:
    sources = [ROOT / "setup.py", ROOT / "Makefile"]
    for room in ("python", "kernels", "bench", "build_tools", "tests"):
        sources += (path for path in (ROOT / room).rglob("*.py") if "packaging" not in path.parts)
    names = {name for path in sources for name in READ.findall(path.read_text())}
    return names | set(re.findall(r"(TIGON_\w+)=", (ROOT / "Makefile").read_text()))


def test_the_page_lists_what_is_read_and_nothing_else():
    page = set(re.findall(r"`(TIGON_\w+)`", (ROOT / "docs/environment.md").read_text()))
    assert page == read_by_the_project()
