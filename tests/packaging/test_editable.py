"""An editable install finds every room, and a checkout shadows nobody's package."""

import shutil
import subprocess
import sys

import pytest
from installs import ROOT


def test_editable_install_finds_every_room_and_later_folders(sources, environment, tmp_path):
    sources = shutil.copytree(sources, tmp_path / "checkout")
    env = environment(borrow=True)
    env.pip_install("-e", sources, TIGON_BUILD="none")
    later = sources / "python" / "later"
    later.mkdir()
    (later / "__init__.py").write_text("")
    code = "import tigon.kernels, tigon.later, tigon.cli; print(tigon.__file__, *tigon.kernels.__path__)"
    said = env.says(code)
    assert said.split() == [str(sources / "python/__init__.py"), str(sources / "kernels")]
    assert env.tigon("doctor").returncode == 0


@pytest.mark.parametrize("room", ["kernels", "bench", "csrc", "tests", "docs", "build_tools"])
def test_checkout_does_not_shadow_other_peoples_package(room, tmp_path):
    """A folder without __init__.py gives way to a real package of the same name, wherever that is."""
    (tmp_path / room).mkdir()
    (tmp_path / room / "__init__.py").write_text("owner = 'somebody else'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import {room}; print({room}.owner)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == "somebody else", said.stderr


def test_transformers_does_not_take_our_kernels_folder_for_the_kernels_package(tmp_path):
    pytest.importorskip("transformers")
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    ours, elsewhere = (
        subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True).stdout
        for cwd in (ROOT, tmp_path)
    )
    assert ours == elsewhere != ""
