"""What the command says to one who errs, and what its help promises."""

import re

import pytest

from tigon import cli
from tigon.cli import COMMANDS, main


@pytest.fixture
def refused(capsys):
    """refused(*argv) -> what was said; it must exit with 1 before anything ran."""

    def run(*argv):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert code == cli.USAGE and "correct" not in out and "Roof" not in out, out
        return out + err

    return run


@pytest.mark.parametrize(
    "argv,said",
    [
        (("bnech", "all"), "no command 'bnech'; did you mean bench?"),
        (("bench", "ssd_scn"), "no op 'ssd_scn'; did you mean ssd_scan?"),
        (("explain", "all"), "one op at a time"),
        (("tune", "all", "--dryrun"), "tigon tune: no argument --dryrun; did you mean --dry-run?"),
        (("bench", "all", "--shape", "zz=3", "--dry-run"), "none of these ops has a size zz"),
        (("check", "all", "--shape", "zz=3"), "none of these ops has a size zz"),
        (("tune", "all", "--shape", "zz=3", "--dry-run"), "none of these ops has a size zz"),
        (("bench", "all", "--variant", "w5", "--dry-run"), "none of these ops has a variant 'w5'"),
        (("bench", "rms_norm", "--repeat", "0"), "'0' is not a whole number above 0"),
        (("bench", "rms_norm", "--time-budget", "-1"), "'-1' is not a number above 0"),
        (("bench", "rms_norm", "--arch", "90"), "--arch is for --dry-run"),
        (("bench", "rms_norm", "--peers", "nobody"), "unknown peer nobody; known: auto, none"),
        (("bench", "rms_norm", "--variant", "odd"), "rms_norm has no variant 'odd'"),
        (("bench", "rms_norm", "--sweep", "q=1"), "rms_norm has no size q"),
        (("bench", "rms_norm", "--json", "/no/such/a.json"), "there is no folder /no/such"),
        (("bench", "rms_norm", "--csv", "/"), "--csv / is a folder"),
        (("bench", "rms_norm", "--plot", "a.bmp"), "plots go to .png, .svg, .pdf"),
        (("bench", "rms_norm", "--dry-run", "--json", "a.json"), "leave out --json"),
        (("bench", "sample", "--mode", "step"), "sample has no backward: --mode forward"),
        (("bench", "moe_sort", "--preset", "nemotron-h-8b"), "tigon list presets shows"),
        (("tune", "rms_norm", "--graph", "--mode", "backward"), "gradients alone"),
    ],
)
def test_a_mistake_is_named_with_its_fix_before_anything_is_measured(argv, said, refused):
    assert said in refused(*argv)


def test_a_usage_error_is_short_and_points_to_the_help(refused):
    said = refused("bench", "rms_norm", "--mode", "backwards")
    assert "'backwards'" in said and said.endswith("see: tigon bench --help\n")
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("command", ["bench", "check"])
def test_a_gpu_that_is_not_there_is_the_environments_fault(command, tigon_command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out = tigon_command(command, "rms_norm", "--device", "cuda")
    assert code == cli.ENVIRONMENT and "tigon doctor" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_explained(command, tigon_command):
    code, out = tigon_command(command, "--help")
    options, codes = out.split("\noptions:")[1].split("\nexit codes:")
    assert code == 0 and "`" not in out and "2 a wrong result" in codes
    entries = re.split(r"\n  (?=-)", options)[1:]
    short = [e for e in entries if len(re.sub(r"^\S+( \S+)?(, --\S+)?", "", e).split()) < 2]
    assert len(entries) > 1 and short == []


@pytest.mark.parametrize("option", ["--dtype", "--mode", "--backend", "--device", "--arch"])
def test_an_option_means_the_same_in_every_command(option, tigon_command):
    said = {}
    for command in ("explain", "check", "bench", "tune"):
        _, out = tigon_command(command, "--help")
        found = re.search(rf"\n  {option} .*?(?=\n  --|\n\n)", out, re.DOTALL)
        if found and (command, option) != ("tune", "--device"):  # its cpu is the interpreter
            said[command] = " ".join(found[0].split()).split(" (default")[0]
    assert said and len(set(said.values())) == 1, said


def test_arch_is_obeyed_where_there_is_another_gpu(tigon_command, monkeypatch):
    monkeypatch.setattr("tigon.cli.explain.own_arch", lambda: 90)
    for argv in (("bench", "rms_norm", "--dry-run"), ("tune", "rms_norm", "--dry-run")):
        assert "on sm_90" in tigon_command(*argv)[1]
        assert "on sm_100" in tigon_command(*argv, "--arch", "100")[1]


def test_explain_takes_a_models_sizes_and_tells_of_arch_without_a_gpu(tigon_command, monkeypatch):
    monkeypatch.setattr("tigon.cli.explain.own_arch", lambda: None)
    code, out = tigon_command("explain", "ssd_scan", "--preset", "nemotron-3-nano")
    assert code == 0 and "h=64" in out and "--arch 80, 90, 100 or 120" in out
