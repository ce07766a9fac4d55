"""tigon list."""

import json
import subprocess
import sys
from importlib import metadata

from tigon.bench.peers import find, flash_attn
from tigon.bench.variants import VARIANTS
from tigon.registry import PUBLIC


def test_every_public_op_is_listed_without_torch():
    code = (
        "import sys; from tigon.cli import main; code = main(['list']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in PUBLIC)


def test_json_holds_the_registry(tigon_command):
    code, out = tigon_command("list", "ops", "--json")
    assert code == 0
    assert [row["op"] for row in json.loads(out)] == list(PUBLIC)


def test_variants_show_the_default_first(tigon_command):
    code, out = tigon_command("list", "variants", "--json")
    rows = {row["op"]: row for row in json.loads(out)}
    assert code == 0 and set(rows) == set(VARIANTS)
    assert rows["scaled_mm"]["default"] == "fp8-row" and "w4a4" in rows["scaled_mm"]["others"]


def test_presets_show_their_layers(tigon_command):
    code, out = tigon_command("list", "presets")
    assert code == 0
    assert "nemotron-h-8b" in out and "24M" in out


def test_peers_show_what_is_installed_and_what_they_know(tigon_command, monkeypatch):
    monkeypatch.setattr(flash_attn, "PACKAGE", "no-such-package")
    code, out = tigon_command("list", "peers", "--json")
    assert code == 0
    rows = {row["peer"]: row for row in json.loads(out)}
    assert list(rows) == list(find.NAMES)
    assert rows["torch_eager"]["version"] == metadata.version("torch")
    assert rows["flash_attn"]["version"] == "not installed"
    assert rows["causal_conv1d"]["devices"] == "cuda"
    assert rows["causal_conv1d"]["ops"] == "causal_conv1d causal_conv1d_update"
    assert tigon_command("list", "peers")[0] == 0
