"""The dashboard in a real browser: what is drawn, and what mouse and keyboard change."""

import json
from pathlib import Path

import pytest

from tests.tracking.recorded import CONFIG, lines, serving, write, write_usual
from txl_dist.tracking.dashboard.dashboard import write_dashboard, write_page

REPO = Path(__file__).resolve().parents[2]

# Counts the pixels of a chart's lines: those that differ from white, black and grey.
COLOURED = """chart => {
  const canvas = chart.querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let at = 0; at < data.length; at += 4) {
    const [red, green, blue, alpha] = data.slice(at, at + 4);
    if (alpha > 60 && Math.max(red, green, blue) - Math.min(red, green, blue) > 60) count += 1;
  }
  return count;
}"""
PICTURE = "chart => chart.querySelector('canvas').toDataURL()"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The address of a page of one run."""
    return write_dashboard(str(write_usual(tmp_path_factory.mktemp("one") / "first"))).as_uri()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The address of a page of two runs."""
    folder = tmp_path_factory.mktemp("several")
    other = CONFIG | {"model": {"n_layer": 2, "mem_len": 0}}
    runs = [write_usual(folder / "first"), write_usual(folder / "second", loss=5.0, config=other)]
    write_page(list(map(str, runs)), folder / "page.html")
    return (folder / "page.html").as_uri()


def card(page, title):
    """Return the card of a chart."""
    return page.locator("article.card").filter(has=page.get_by_role("heading", name=title, exact=True, level=3))


def coloured(page, title):
    return card(page, title).evaluate(COLOURED)


def picture(page, title):
    return card(page, title).evaluate(PICTURE)


def state(page, expression):
    """Return what the page's script knows."""
    return page.evaluate(f"page.{expression}")


def test_every_chart_has_its_curves(open_page, one):
    page = open_page(one)
    titles = page.locator("article.card:has(.plot) h3").all_text_contents()
    assert titles[:3] == ["Loss", "Loss of a step", "Bits per byte"] and "Attention on memory" in titles
    for title in titles:
        assert coloured(page, title) > 200, title
    assert page.locator("section h2").all_text_contents() == [
        *("Loss", "Optimization", "Memory", "Speed", "Samples", "Starts")
    ]


def test_a_legend_button_hides_its_line(open_page, one):
    page = open_page(one)
    before = coloured(page, "Loss")
    button = card(page, "Loss").get_by_role("button", name="validation")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    button = card(page, "Loss").get_by_role("button", name="validation")
    assert button.get_attribute("aria-pressed") == "false" and coloured(page, "Loss") < before
    button.click()
    assert coloured(page, "Loss") == before


def test_in_an_overlay_a_legend_button_hides_a_run_in_all_charts(open_page, several):
    page = open_page(several)
    titles = ["Loss", "Learning rate", "Bits per byte"]
    before = [coloured(page, title) for title in titles]
    legend = page.locator("article .legend button[data-label=second]")
    card(page, "Learning rate").get_by_role("button", name="second").click()
    after = [coloured(page, title) for title in titles]
    assert all(0 < now < then for now, then in zip(after, before, strict=True)), (before, after)
    assert set(legend.evaluate_all("all => all.map(b => b.getAttribute('aria-pressed'))")) == {"false"}
    page.locator("table.runs").get_by_role("button", name="second").click()
    assert [coloured(page, title) for title in titles] == before


def test_an_overlay_has_a_table_of_differences(open_page, several):
    page = open_page(several)
    rows = page.locator("details[data-key=differences] tbody tr").all_text_contents()
    assert rows == ["model.mem_len640"]


@pytest.mark.parametrize("axis, end", [("Tokens", 400_000), ("Steps", 400), ("Time", 400 / 60)])
def test_the_axis_is_chosen_for_all_charts(open_page, one, axis, end):
    page = open_page(one)
    page.get_by_role("radio", name="Steps" if axis == "Tokens" else "Tokens").check(force=True)
    page.get_by_role("radio", name=axis).check(force=True)
    ends = page.evaluate("[...page.charts.values()].map(({ uplot }) => uplot.scales.x.max)")
    assert ends == pytest.approx([end] * len(ends), rel=0.01)


def test_a_run_without_times_has_no_time_axis(open_page, tmp_path):
    write_page([str(REPO / "tests/fixtures/v0_1/run")], tmp_path / "page.html")
    page = open_page((tmp_path / "page.html").as_uri())
    assert page.get_by_role("radio", name="Time").is_disabled() and coloured(page, "Loss") > 200


def test_a_logarithmic_scale_is_of_what_is_not_negative(open_page, tmp_path):
    page = open_page(write_dashboard(str(write(tmp_path, lines(**{"memory/gain": -0.1})))).as_uri())
    kinds = "Object.fromEntries([...page.charts].map(([title, { uplot }]) => [title, uplot.scales.y.distr]))"
    before = page.evaluate(kinds)
    page.get_by_role("button", name="Log scale").click()
    after = page.evaluate(kinds)
    assert before["Loss"] == 1 and after["Loss"] == 3 and after["Learning rate"] == 3 and after["Gain of memory"] == 1
    assert coloured(page, "Loss") > 200


def test_a_zoom_is_of_all_charts_and_is_reset(open_page, one):
    page = open_page(one)
    box = card(page, "Loss").locator(".u-over").bounding_box()
    reset = page.get_by_role("button", name="Reset zoom")

    def drag():
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60, steps=4)
        page.mouse.up()

    def ranges():
        scales = page.evaluate("[...page.charts.values()].map(({ uplot: { scales: { x } } }) => [x.min, x.max])")
        assert len(set(map(tuple, scales))) == 1
        return scales[0]

    def double_click():
        page.mouse.dblclick(box["x"] + 100, box["y"] + 100)

    for undo in (lambda: reset.click(), lambda: page.keyboard.press("Escape"), double_click):
        assert reset.is_disabled() and ranges() == [0, 400_000]
        drag()
        assert ranges() == pytest.approx([100_000, 200_000], rel=0.02)
        undo()


def test_smoothing_is_chosen(open_page, tmp_path):
    page = open_page(write_dashboard(str(write(tmp_path, lines(200)))).as_uri())
    pictures = {picture(page, "Loss of a step")}
    for smoothing in ("0.06", "0.005", "0"):
        page.get_by_label("Smoothing").select_option(smoothing)
        pictures.add(picture(page, "Loss of a step"))
    assert len(pictures) == 4


@pytest.mark.parametrize("count, is_smoothed", [(200, True), (24, False)])
def test_few_points_and_curves_without_noise_are_not_smoothed(open_page, tmp_path, count, is_smoothed):
    page = open_page(write_dashboard(str(write(tmp_path, lines(count)))).as_uri())
    names = ["Bits per byte", "Learning rate", "Loss of a step"]
    moderate = [picture(page, name) for name in names]
    page.get_by_label("Smoothing").select_option("none")
    changed = [picture(page, name) != before for name, before in zip(names, moderate, strict=True)]
    assert changed == [False, False, is_smoothed]


def test_the_cursor_is_that_of_all_charts_and_says_values(open_page, one):
    page = open_page(one)
    values = page.locator("article .legend button[data-label=validation] b")
    last = values.all_text_contents()
    box = card(page, "Loss").locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
    where = page.locator("output.where")
    where.filter(has_text="step 100").wait_for()
    assert "100k tokens" in where.text_content() and "checkpoint: validation loss 3.5000" in where.text_content()
    at_100 = [line["valid/loss"] for line in lines() if line["step"] == 100]
    assert values.first.text_content() == f"{at_100[0]:.4g}" != last[0]
    page.mouse.move(2, 2)
    where.filter(has_not_text="step").wait_for(state="attached")
    assert values.all_text_contents() == last


def test_marks_are_drawn_and_can_be_left_out(open_page, one):
    page = open_page(one)
    before = picture(page, "Learning rate")
    for name in ("2 starts", "1 bad step", "2 checkpoints"):
        page.get_by_role("button", name=name).click()
        after = picture(page, "Learning rate")
        assert after != before, name
        before = after
        assert page.get_by_role("button", name=name).get_attribute("aria-pressed") == "false"


def press_until(page, keys, selector, limit=80):
    """Press a key until an element has the focus."""
    for _ in range(limit):
        page.keyboard.press(keys)
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached")


def test_all_is_reached_and_used_by_keyboard(open_page, one):
    page = open_page(one)
    press_until(page, "Tab", "input[type=radio]")
    page.keyboard.press("ArrowRight")
    assert state(page, "axis") == "step"
    press_until(page, "Tab", "button.plain")
    page.keyboard.press("Enter")
    assert state(page, "log") is True
    press_until(page, "Tab", "button.mark.bad_step")
    page.keyboard.press("Space")
    assert state(page, "shownMarks.has('bad_step')") is False
    press_until(page, "Tab", ".legend button[data-label=training]")
    page.keyboard.press("Enter")
    focused = "document.activeElement.dataset.label + document.activeElement.getAttribute('aria-pressed')"
    assert page.evaluate(focused) == "trainingfalse"
    press_until(page, "Tab", ".plot")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.locator("output.where").filter(has_text="step 50").wait_for()
    page.locator("[aria-live]").filter(has_text="validation 4.0").wait_for(state="attached")
    page.keyboard.press("+")
    page.wait_for_timeout(100)  # of several frames
    assert state(page, "zoom") is not None and state(page, "at") == 50
    page.keyboard.press("Escape")
    assert state(page, "zoom") is None
    press_until(page, "Tab", "details summary")
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


def test_the_slider_of_a_heat_map_chooses_the_step(open_page, tmp_path):
    record = [line | {f"memory/share/layer.0.head.{head}": line["step"] / 400 for head in (0, 1)} for line in lines()]
    page = open_page(write_dashboard(str(write(tmp_path, record))).as_uri())
    heat = card(page, "Attention on memory, each head")
    assert heat.locator("tbody td").all_text_contents() == ["1.00", "1.00"]
    heat.get_by_role("slider").focus()
    page.keyboard.press("Home")
    assert heat.locator("tbody td").all_text_contents() == [".03", ".03"]
    assert heat.locator("output").text_content() == "step 10"


def test_starts_show_their_config_and_what_differs(open_page, one):
    page = open_page(one)
    first, second = page.locator("#starts details").all()
    second.locator("summary").click()
    assert second.locator("table.differences tbody tr").all_text_contents() == ["engine.zero_stage–2"]
    assert "mem_len64" in second.locator(".config").text_content()
    first.locator("summary").click()
    assert first.locator("table").count() == 0 and "preempted" in first.text_content()


def test_samples_are_texts(open_page, one):
    page = open_page(one)
    newest = page.locator("#samples article").first
    assert newest.locator("h3").text_content() == "step 400"
    assert newest.locator("p").all_text_contents() == ["It was <b>a</b> dark night", "import os\nimport sys"]
    assert newest.locator("strong").all_text_contents() == ["It was ", "import "]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["one", "several"])
def test_nothing_is_wider_than_the_screen(open_page, request, kind, width):
    page = open_page(request.getfixturevalue(kind), width)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_page_is_dark_where_the_browser_is(open_page, one):
    background = "getComputedStyle(document.body).backgroundColor"
    light = open_page(one, color_scheme="light")
    dark = open_page(one, color_scheme="dark")
    assert light.evaluate(background) != dark.evaluate(background)
    before = picture(light, "Loss")
    light.emulate_media(color_scheme="dark")
    light.wait_for_function(
        f"chart => ({PICTURE})(chart) !== {json.dumps(before)}", arg=card(light, "Loss").element_handle()
    )
    assert picture(light, "Loss") == picture(dark, "Loss")


def test_an_empty_run_has_a_page_that_says_so(open_page, tmp_path):
    page = open_page(write_dashboard(str(tmp_path)).as_uri())
    assert page.get_by_text("Nothing is recorded yet.").is_visible()


def test_a_picture_of_a_dashboard_is_made(browser, run, tmp_path):
    run_dir = write_usual(tmp_path / "run")
    run(REPO / "docs/screenshot.py", run_dir, tmp_path / "page.png", "--height=500", fresh=True)
    content = (tmp_path / "page.png").read_bytes()
    assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") == 1280 * 1.5


@pytest.fixture
def served(tmp_path):
    """Serve a run; yields its directory and the address."""
    run_dir = write_usual(tmp_path / "run")
    with serving(run_dir) as address:
        yield run_dir, address


def test_a_served_page_shows_new_lines(open_page, served):
    run_dir, address = served
    page = open_page(address)
    page.get_by_role("radio", name="Steps").check(force=True)
    page.locator("#starts summary").first.click()
    button = card(page, "Loss").get_by_role("button", name="training")
    button.focus()
    before = picture(page, "Loss")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "tokens": 500000, "train/loss": 1.25}\n')
    card(page, "Loss").locator("b").filter(has_text="1.25").wait_for()
    assert picture(page, "Loss") != before
    assert state(page, "axis") == "step" and page.locator("#starts details[open]").count() == 1
    assert page.evaluate("document.activeElement.dataset.label") == "training"
    assert "step 500 of 400" in page.locator(".subtitle").text_content()
