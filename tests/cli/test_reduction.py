"""tigon reduction."""

import json

from tigon.models.presets import preset


def test_the_plan_names_both_numbers_and_every_layer(tigon_command):
    code, out = tigon_command(
        "reduction", "nemotron-nano-2-9b", "--kind", "fastv", "--average", "0.25"
    )
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == len(preset("nemotron-nano-2-9b").pattern) + 3
    assert lines[-1].startswith("layer-average 0.250, final 0.208")
    assert "fewer FLOPs" in lines[-1]


def test_a_budget_out_of_reach_is_a_usage_error_with_the_range(tigon_command):
    code, out = tigon_command("reduction", "tiny", "--kind", "linear", "--average", "0.25")
    assert code == 1 and "cannot be reached" in out and "average can be" in out


def test_json_holds_the_plan(tigon_command):
    code, out = tigon_command("reduction", "tiny", "--visual", "1k", "--text", "0", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["shares"][0] == 1.0 and plan["layers"][0]["visual"] == 1024
