"""The report in a real browser: it loads alone, shows its plots, sorts, filters, fits and is readable."""

import copy
import json

import browser as browsers
import pytest
from bench_records import RED, case, result, sample_run

from tigon.bench import records, report

try:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select
    from selenium.webdriver.support.wait import WebDriverWait
except ImportError:
    Keys = Select = WebDriverWait = None  # every test here is skipped then

WHY = browsers.missing()
pytestmark = [
    pytest.mark.skipif(WHY is not None, reason=WHY or ""),
    pytest.mark.xdist_group("browser"),
]
HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> $x & "\''
)
CONTRAST = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
function behind(node) {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
}
const worst = {};
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
  if (!own || !node.getClientRects().length || node.closest("script, style, option")) continue;
  const style = getComputedStyle(node);
  const drawn = node instanceof SVGElement ? style.fill : style.color;
  const back = behind(node), alpha = Number(style.opacity);
  const ink = parse(drawn).slice(0, 3).map((c, i) => alpha * c + (1 - alpha) * back[i]);
  const [low, high] = [light(ink), light(back)].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) worst[node.textContent.trim().slice(0, 40)] = [ratio, drawn, back.join()];
}
return worst;
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browsers.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("report") / "report.html"
    report.write(sample_run(), made)
    return made


@pytest.fixture
def page(window, path):
    window.open(path)
    return window


def column(page, name: str) -> list[str]:
    """The words in a column of the rows that are shown."""
    heads = [button.text for button in page.all("#table thead button")]
    code = """return [...document.querySelectorAll('#table tbody tr:not([hidden])')]
        .map((row) => row.cells[arguments[0]].innerText.trim());"""
    return page.js(code, heads.index(name))


def button(page, name: str):
    return next(b for b in page.all("#table thead button") if b.text == name)


def choose(page, field: str, value: str) -> None:
    Select(page.one(f"#{field}")).select_by_visible_text(value)


def test_page_loads_alone_without_an_error_in_the_console(page, path):
    assert page.requests() == [path.as_uri()]
    assert page.console() == []
    assert page.driver.title == "Tigon benchmark · Imaginary GPU 80GB · 2026-12-01"


def test_policy_forbids_the_page_to_load_anything(page):
    page.js(
        "fetch('http://127.0.0.1:9/f').catch(() => {}); new Image().src = 'http://127.0.0.1:9/i'"
    )
    refused = [said for said in page.console() if "violates" in said and "Content Security" in said]
    assert any("9/f" in said for said in refused) and any("9/i" in said for said in refused)


@pytest.mark.parametrize("name", ["roofline", "speedups", "sweeps"])
def test_plot_is_drawn_with_its_words(page, name):
    box = page.one(f"#plot-{name} svg").rect
    assert box["width"] > 600 and box["height"] > 300
    words = page.js(
        f"return [...document.querySelectorAll('#plot-{name} text')].map(t => t.textContent)"
    )
    expected = {
        "roofline": "FLOP/s",
        "speedups": "ssd_update · int8",
        "sweeps": "share of the roof",
    }
    assert expected[name] in words
    shapes = page.js(
        f"return [...document.querySelectorAll('#plot-{name} path')].filter(p => p.getBBox().width).length"
    )
    assert shapes > 20


def test_no_two_elements_share_an_id(page):
    ids = page.js("return [...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_sorting_by_median_orders_rows_and_returns_to_the_runs_order(page):
    before = column(page, "median ms")
    times = {"ascending": [], "descending": []}
    for direction in times:
        button(page, "median ms").click()
        head = button(page, "median ms").find_element("xpath", "..")
        assert head.get_attribute("aria-sort") == direction
        shown = column(page, "median ms")
        assert shown[-1] == "", "what has no time comes last"
        times[direction] = [float(text) for text in shown if text]
    assert times["ascending"] == sorted(times["ascending"])
    assert times["descending"] == times["ascending"][::-1]
    assert len(set(times["ascending"])) > 50
    button(page, "median ms").click()
    assert column(page, "median ms") == before


def test_words_are_sorted_by_alphabet(page):
    button(page, "who").click()
    shown = column(page, "who")
    assert shown == sorted(shown, key=str.lower) and len(set(shown)) > 5


def test_sorting_works_from_the_keyboard(page):
    button(page, "median ms").send_keys(Keys.ENTER)
    times = [float(text) for text in column(page, "median ms") if text]
    assert times == sorted(times)


def test_filters_narrow_the_rows_and_reset_shows_all(page):
    everything = column(page, "op")
    choose(page, "by-op", "ssd_scan")
    assert set(column(page, "op")) == {"ssd_scan"}
    choose(page, "by-mode", "step")
    choose(page, "by-who", "mamba_ssm")
    assert column(page, "who") == ["mamba_ssm"]
    assert page.one("#count").text == f"1 of {len(everything)} rows"
    button(page, "op").click()
    page.one("button[type=reset]").click()
    assert column(page, "op") == everything
    assert page.one("#count").text == f"{len(everything)} of {len(everything)} rows"
    page.one("#by-text").send_keys("w4a4 RED")
    assert column(page, "variant") == ["w4a4"]


def test_flagged_only_leaves_flags_and_red_gates(page):
    page.one("#by-flag").click()
    shown = column(page, "flags")
    assert len(shown) == 4 and all(shown) and "gate is red" in shown


@pytest.mark.parametrize("width", [400, 800, 1280, 2000])
def test_page_never_scrolls_sideways(window, path, width):
    window.open(path, width=width)
    inside, outside = window.js(
        "document.querySelectorAll('details').forEach((d) => { d.open = true; });"
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert inside <= outside
    boxes = window.js(
        "return [...document.querySelectorAll('.box')].map(b => b.getBoundingClientRect().right)"
    )
    assert max(boxes) <= outside


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_what_is_behind_it(window, path, scheme):
    window.open(path, scheme=scheme)
    window.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert window.js(CONTRAST) == {}
    back = window.js("return getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_red_gate_is_named_first_and_has_no_time(page):
    first = page.one("main > section")
    assert "Red gates" in first.text and "scaled_mm · w4a4" in first.text and "wrong" in first.text
    choose(page, "by-op", RED[0])
    page.one("#by-text").send_keys(RED[1])
    for name in ("median ms", "p20–p80", "GB/s", "TFLOP/s", "% of roof", "× Tigon", "peak MB"):
        assert column(page, name) == [""], name


def test_time_of_a_red_gate_is_not_shown_even_if_a_record_holds_one(window, tmp_path):
    leak = case(*RED) | {
        "results": [result("tigon", 7.7777e-3, 4e-3), result("other", 9.1919e-3, 4e-3)]
    }
    run = sample_run() | {"cases": [case("rms_norm"), leak]}
    report.write(run, tmp_path / "leak.html")
    window.open(tmp_path / "leak.html")
    shown = window.js(
        "return document.body.innerText + document.querySelector('#plots').textContent"
    )
    assert "rms_norm" in shown
    assert "7.778" not in shown and "9.192" not in shown and "1.18" not in shown


def test_all_green_run_has_no_red_section(window, tmp_path):
    report.write(sample_run() | {"cases": [case("rms_norm")]}, tmp_path / "green.html")
    window.open(tmp_path / "green.html")
    assert window.all(".red") == []
    assert "All gates are green" in window.one("header").text


def test_embedded_json_is_the_run(page):
    assert json.loads(page.js("return document.getElementById('run').textContent")) == sample_run()


def test_download_link_saves_the_run(page, tmp_path):
    page.downloads_to(tmp_path)
    page.one("#download").click()
    saved = tmp_path / "tigon-bench-2026-12-01.json"
    WebDriverWait(page.driver, 10).until(lambda _: saved.is_file())
    assert records.load(saved) == sample_run()


def test_strings_of_a_record_are_inert_wherever_they_stand(window, tmp_path):
    run = hostile(sample_run())
    report.write(run, tmp_path / "hostile.html")
    window.open(tmp_path / "hostile.html")
    assert window.js("return window.hacked") is None
    assert window.console() == []
    assert window.all("img") == []
    assert len(window.all("script")) == 2
    assert json.loads(window.js("return document.getElementById('run').textContent")) == run
    assert HOSTILE in window.js("return document.querySelector('#summary').textContent")
    button(window, "op").click()  # the script runs as ever
    assert len(column(window, "op")) > 50


def hostile(run: dict) -> dict:
    """The run with markup in every string that a user, a package or a machine writes."""
    run = copy.deepcopy(run)
    run["command"] = run["env"]["date"] = run["env"]["device"] = run["env"]["commit"] = HOSTILE
    run["env"]["os"]["name"] = run["env"]["packages"]["torch"] = run["roof"]["device"] = HOSTILE
    run["roof"]["gemm"][HOSTILE] = 1e14
    for item in run["cases"]:
        item["missing"] = {HOSTILE: HOSTILE}
        item["case"]["preset"] = item["case"]["variant"] = item["case"]["backend"] = HOSTILE
        item["check"]["rows"][0]["name"] = HOSTILE
        for r in item["results"][1:]:
            r["name"] = r["name"] + HOSTILE
            r["flags"] = [HOSTILE]
    return run


def test_on_paper_everything_is_open(page):
    assert page.printed().startswith(b"%PDF")
    assert page.js("return [...document.querySelectorAll('details')].map((d) => d.open)") == [
        True,
        True,
    ]
