"""tigon list."""

import json
import subprocess
import sys

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


def test_presets_show_their_layers(tigon_command):
    code, out = tigon_command("list", "presets")
    assert code == 0
    assert "nemotron-h-8b" in out and "24M" in out
