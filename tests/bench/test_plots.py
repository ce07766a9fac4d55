"""Plots of a run: what is drawn and what is not, words that do not cover each other, files, no trace left behind."""

import copy
import xml.etree.ElementTree as xml
from itertools import combinations

import pytest
from bench_records import case, sample_run

matplotlib = pytest.importorskip("matplotlib")

from tigon.bench import labels, plots, records  # noqa: E402
from tigon.bench.figures import style  # noqa: E402
from tigon.bench.variants import variants  # noqa: E402
from tigon.registry import PUBLIC  # noqa: E402

PLOTS = tuple(plots.PLANS)


@pytest.fixture(scope="module")
def run() -> dict:
    return sample_run()


@pytest.fixture(scope="module")
def drawn(run) -> dict:
    return {name: getattr(plots, name)(run) for name in PLOTS}


def texts(figure) -> list:
    """What is written; matplotlib keeps the labels of ticks beyond the axes too."""
    beyond = set()
    for ax in figure.findobj(matplotlib.axes.Axes):
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            out = (t for t in axis.get_major_ticks() if not low <= t.get_loc() <= high)
            beyond |= {label for tick in out for label in (tick.label1, tick.label2)}
    found = figure.findobj(matplotlib.text.Text)
    return [t for t in found if t.get_visible() and t.get_text() and t not in beyond]


def words(figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def boxes(figure) -> list[tuple[str, object]]:
    """(text, place in pixels) of all that is written, without the line from a number to its marker."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    extent, renderer = matplotlib.text.Text.get_window_extent, canvas.get_renderer()
    return [(t.get_text(), extent(t, renderer)) for t in texts(figure)]


@pytest.mark.parametrize("name", PLOTS)
def test_no_words_cover_each_other_or_leave_the_figure(drawn, name):
    found = boxes(drawn[name])
    width, height = drawn[name].get_size_inches() * drawn[name].dpi
    for text, box in found:
        assert box.x0 >= -0.5 and box.x1 <= width + 0.5, f"{text} leaves the figure"
        assert box.y0 >= -0.5 and box.y1 <= height + 0.5, f"{text} leaves the figure"
    upright = [
        (text, box) for text, box in found if not text.startswith("copy ")
    ]  # that one is tilted
    for (one, a), (other, b) in combinations(upright, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or along <= 2, f"{one} covers {other}"


def test_names_with_their_dtypes_keep_off_the_marks_of_the_next_column():
    ops = [(op, variants(op)[0]) for op in PUBLIC if op != "tree_ancestors"]
    cases = [case(op, variant=variant) for op, variant in ops]
    for number, item in enumerate(cases):
        item["case"]["dtype"] = ("bfloat16", "float32")[number % 2]
    figure = plots.roofline(sample_run() | {"cases": cases})
    found = boxes(figure)
    panels = (figure, *figure.subfigs)
    marks = [m for p in panels for m in p.artists if isinstance(m, matplotlib.lines.Line2D)]
    assert len(marks) == 5  # a family each
    for mark in marks:
        x, y = mark.get_transform().transform((mark.get_xdata()[0], mark.get_ydata()[0]))
        for text, box in found:
            beside = box.x1 < x - 6 or box.x0 > x + 6
            assert beside or not box.y0 < y < box.y1, f"{text} covers a mark"


def test_roofline_names_every_op_once_and_says_what_has_no_flops(drawn, run):
    said = words(drawn["roofline"])
    named = [text.split("  ", 1)[1] for text in said if "  " in text]
    assert len(named) == len(set(named))
    counted = {
        labels.title(item["case"])
        for item in run["cases"]
        if labels.measured(item) and item["work"]["flops"]
    }
    assert set(named) == counted
    assert any("not shown: 2 of" in text for text in said)


def test_roofline_draws_the_measured_roof(drawn):
    said = words(drawn["roofline"])
    assert "copy 3 TB/s" in said
    assert {"260 TFLOP/s float32", "700 TFLOP/s bfloat16", "1.3 PFLOP/s float8_e4m3fn"} < set(said)
    [ax] = drawn["roofline"].findobj(matplotlib.axes.Axes)
    slope = ax.lines[0].get_xydata()
    assert slope[:, 1] / slope[:, 0] == pytest.approx(3e12)
    assert slope[-1, 1] == pytest.approx(1.3e15)


def test_ceilings_that_are_alike_are_one_line():
    run = sample_run()
    run["roof"]["gemm"] = {"bfloat16": 7e14, "float16": 7.05e14, "float32": 1e14}
    said = words(plots.roofline(run))
    assert "705 TFLOP/s bfloat16, float16" in said and "100 TFLOP/s float32" in said


def test_roofline_points_lie_where_work_and_time_put_them():
    run = sample_run() | {"cases": [case("rms_norm")]}
    item = run["cases"][0]
    [ax] = plots.roofline(run).findobj(matplotlib.axes.Axes)
    filled = next(line for line in ax.lines if line.get_markerfacecolor() == style.TIGON)
    flops = item["work"]["flops"]
    expected = (flops / item["work"]["bytes"], flops / labels.own(item)["time"]["median"])
    assert filled.get_xydata()[0] == pytest.approx(expected)
    [hollow] = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert len(hollow.get_xydata()) == len(labels.peers(item))


def test_speedups_are_peers_times_over_tigons_with_whiskers():
    run = sample_run() | {"cases": [case("ssd_scan")]}
    item = run["cases"][0]
    figure = plots.speedups(run)
    [ax] = [a for a in figure.findobj(matplotlib.axes.Axes) if a.patches]
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends == pytest.approx([labels.ratio(item, peer) for peer in labels.peers(item)])
    mine, other = (r["time"] for r in item["results"][:2])
    whisker = next(line for line in ax.lines if len(set(line.get_xdata())) == 2)
    expected = [other["p20"] / mine["p80"], other["p80"] / mine["p20"]]
    assert list(whisker.get_xdata()) == pytest.approx(expected)


def test_speedup_of_a_doubtful_result_is_hollow_and_says_so(drawn):
    said = words(drawn["speedups"])
    assert (
        sum("(flagged)" in text for text in said) == 3
    )  # both peers of the suspect, the one that differs


def test_red_gate_is_in_no_plot(drawn):
    for figure in drawn.values():
        assert not any("w4a4" in text for text in words(figure))


def test_sweeps_join_the_size_that_was_asked_for(drawn, run):
    found = {(items[0]["case"]["op"], letter): items for letter, items in labels.sweeps(run)}
    sizes = [item["case"]["shape"]["l"] for item in found["ssd_scan", "l"]]
    assert sizes == [512, 1024, 2048, 4096, 8192]
    assert [i["case"]["mode"] for i in found["grouped_mm", "rows"]] == ["step"] * 4
    assert len(found) == 2
    axes = drawn["sweeps"].findobj(matplotlib.axes.Axes)
    assert len(axes) == 4
    tigon = next(line for line in axes[0].lines if line.get_markerfacecolor() == style.TIGON)
    times = [1e3 * labels.own(item)["time"]["median"] for item in found["ssd_scan", "l"]]
    assert list(tigon.get_ydata()) == pytest.approx(times)


def test_there_is_no_plot_of_nothing():
    run = sample_run()
    red = [item for item in run["cases"] if not item["check"]["ok"]]
    alone = case("tree_ancestors")  # no FLOPs
    alone["results"] = alone["results"][:1]
    for cases in ([], red, [alone]):
        assert [getattr(plots, name)(run | {"cases": cases}) for name in PLOTS] == [None] * 3


@pytest.mark.parametrize("suffix, head", [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_all_plots_go_into_one_file(tmp_path, suffix, head):
    run = sample_run()
    run["cases"] = [item for item in run["cases"] if item["case"]["op"] == "ssd_scan"]
    plots.save(run, tmp_path / f"plots.{suffix}")
    written = (tmp_path / f"plots.{suffix}").read_bytes()
    assert written.startswith(head) and len(written) > 5_000


def test_svg_follows_the_colour_scheme_and_repeats_byte_for_byte(tmp_path, run):
    small = run | {"cases": [case("rms_norm")]}
    for name in ("a.svg", "b.svg"):
        plots.save(small, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "prefers-color-scheme:dark" in text and style.INK not in text.replace(plots.ALONE, "")
    said = [node.text for node in xml.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert "Roofline" in said and "rms_norm" in said


def test_other_suffixes_and_empty_runs_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf files; got 'plots.jpg'"):
        plots.save(sample_run(), tmp_path / "plots.jpg")
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.save(sample_run() | {"cases": []}, tmp_path / "plots.png")
    assert not list(tmp_path.iterdir())


def test_record_without_a_roof_is_drawn_without_one():
    old = records.from_schema_1(
        [
            {
                "schema": 1,
                "env": {},
                "case": {"op": item["case"]["op"], "mode": "forward", "dtype": "float32",
                         "shape": item["case"]["shape"]},
                "work": {part: item["work"][part] for part in ("bytes", "flops")},
                "check": item["check"],
                "results": [{k: v for k, v in r.items() if k != "share"} for r in item["results"]],
                "missing": {},
                "repro": "tigon bench",
            }
            for item in (case("ssd_scan"), case("rms_norm"))
        ]
    )  # fmt: skip
    said = words(plots.roofline(old))
    assert not any("copy" in text for text in said)
    assert plots.speedups(old) is not None and plots.sweeps(old) is None


def test_names_with_dollars_and_markup_are_drawn_as_they_are():
    run = sample_run() | {"cases": [copy.deepcopy(case("rms_norm"))]}
    run["cases"][0]["results"][1]["name"] = "$x_{<b>"
    figure = plots.speedups(run)
    assert "$x_{<b>" in words(figure)
    xml.fromstring(plots.svg(figure, "speedups"))


def test_nothing_of_matplotlibs_state_is_changed(run):
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    plots.svg(plots.speedups(run | {"cases": [case("rms_norm")]}), "speedups")
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.figs


def test_colours_stand_out_on_white_and_on_near_black():
    def light(colour: str) -> float:
        parts = matplotlib.colors.to_rgb(colour)
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (style.TIGON, *style.COLOURS):
        for paper in ("#ffffff", "#14171b"):
            low, high = sorted((light(colour), light(paper)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, paper)
