"""docs/api.md holds every public name, and every name there exists and has a docstring."""

import re
from importlib import import_module
from types import ModuleType

import pytest
from installs import ROOT

ROOMS = (
    "tigon",
    "tigon.ops",
    "tigon.modules",
    "tigon.models",
    "tigon.generation",
    "tigon.distributed",
    "tigon.integrations",
    "tigon.integrations.mamba_ssm",
)
DIRECTIVE = re.compile(r"^\.\. auto(\w+):: (\S+)\n((?:   :.*\n)*)", re.MULTILINE)
PAGE = (ROOT / "docs/api.md").read_text()


def public(room: str) -> dict[str, object]:
    """The names of a module that users import, without submodules."""
    module = import_module(room)
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == room]
    names = getattr(module, "__all__", [n for n in own if not n.startswith("_")])
    found = {f"{room}.{name}": getattr(module, name) for name in names if name != "__version__"}
    return {name: value for name, value in found.items() if not isinstance(value, ModuleType)}


def resolve(path: str) -> object:
    """The module, class, function or method of that name; of a module and its namesake inside, the latter."""
    parent, _, name = path.rpartition(".")
    found = resolve(parent) if parent else import_module(name)
    return found if not parent else getattr(found, name, None) or import_module(path)


def shown() -> dict[str, object]:
    """What the page's directives show."""
    found = {}
    for kind, path, options in DIRECTIVE.findall(PAGE):
        if kind != "module":
            found[path] = resolve(path)
        elif listed := re.search(r":members:(.*)", options):
            names = listed[1].replace(" ", "").split(",")
            if names == [""]:
                found |= public(path)
            else:
                found |= {f"{path}.{name}": getattr(import_module(path), name) for name in names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_on_the_page(room):
    there = {id(thing) for thing in shown().values()}
    assert [name for name, thing in public(room).items() if id(thing) not in there] == []


def test_what_the_page_shows_is_explained():
    callables = {name: thing for name, thing in shown().items() if callable(thing)}
    assert len(callables) > 60
    assert [n for n, thing in callables.items() if len((thing.__doc__ or "").split()) < 4] == []


def test_a_docstring_that_points_to_the_top_of_its_module_has_it_on_the_page():
    modules = {path for kind, path, _ in DIRECTIVE.findall(PAGE) if kind == "module"}
    pointing = {
        thing.__module__
        for thing in shown().values()
        if "top of the module" in (thing.__doc__ or "")
    }
    assert pointing and pointing <= modules
