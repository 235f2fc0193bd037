"""The page of txl_dist.look in a real browser: colours, keys, heads, and nothing but the page."""

import re

import pytest

from txl_dist.pages.page import render

TEXT = "the and of the\n\tabcd <b>&amp;</b>  \u00e9\x01 the and of the abcd" + 10 * "\nof the abcd"
PIECES = len(TEXT.encode())
LENGTH = 8  # of a segment


@pytest.fixture(scope="module")
def address(run, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("look-page")
    run("txl_dist.train", *small, f"run.dir={folder}/run")
    options = [f"model.tgt_len={LENGTH}", "model.mem_len=12"]
    run("txl_dist.look", f"run={folder}/run", *options, f"to={folder}/look.html", stdin=TEXT)
    return (folder / "look.html").as_uri()


def colours(page):
    return page.eval_on_selector_all(
        "[role=option]", "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
    )


def chosen(page):
    """The tokens that are chosen: one at most."""
    return page.eval_on_selector_all(
        "[role=option]", "all => all.flatMap((token, k) => token.ariaSelected == 'true' ? [k] : [])"
    )


def keys(page, kind):
    return page.eval_on_selector_all(
        "[role=option]", f"all => all.flatMap((token, k) => token.matches('{kind}') ? [k] : [])"
    )


def test_every_token_has_a_colour_and_the_switch_changes_it(open_page, address):
    page = open_page(address)
    gain = colours(page)
    assert len(gain) == PIECES and len(set(gain)) > 10
    assert len(set(gain[:LENGTH])) == 1  # in the first segment there is nothing to remember
    assert "nats" in page.locator(".legend").first.inner_text()
    page.get_by_role("radio", name="Loss with memory").click()
    loss = colours(page)
    page.keyboard.press("ArrowRight")  # from the switch's button to the next
    assert page.get_by_role("radio", name="Loss without").get_attribute("aria-checked") == "true"
    alone = colours(page)
    assert loss[:LENGTH] == alone[:LENGTH] and len({*map(tuple, (gain, loss, alone))}) == 3


def test_arrow_keys_move_and_show_the_keys_in_the_memory(open_page, address):
    page = open_page(address)
    page.locator("[role=option]").first.focus()
    for _ in range(LENGTH + 2):
        page.keyboard.press("ArrowRight")
    assert chosen(page) == [LENGTH + 2]
    remembered = keys(page, ".key.remembered")
    own = keys(page, ".key:not(.remembered)")
    # Row 10 belongs to the segment of the inputs 8 to 15, which are the tokens 7 to 14.
    assert remembered and max(remembered) < LENGTH - 1 <= min(own) and max(own) < LENGTH + 2
    assert keys(page, ".unseen") == [*range(LENGTH + 3, PIECES)]
    shadows = page.eval_on_selector_all(".key", "all => all.map(key => getComputedStyle(key).boxShadow)")
    assert "none" not in shadows and page.locator(".arcs path.remembered").count() > 0
    assert page.evaluate("document.activeElement.tabIndex") == 0
    assert page.locator("[role=option][tabindex='0']").count() == 1
    page.keyboard.press("End")
    assert chosen(page) == [PIECES - 1] and min(keys(page, ".key")) >= PIECES - LENGTH - 12
    page.keyboard.press("PageUp")
    assert chosen(page) == [PIECES - 1 - LENGTH]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert chosen(page) == [0]
    page.keyboard.press("ArrowDown")
    assert page.locator("[role=option]").nth(chosen(page)[0]).inner_text() not in ("t", "h")
    page.keyboard.press("ArrowUp")
    assert chosen(page)[0] < TEXT.index("\n") + 1
    page.keyboard.press("Escape")
    assert chosen(page) == [] and not keys(page, ".key, .unseen")


def test_the_panel_says_what_is_known_of_a_token(open_page, address):
    page = open_page(address)
    panel = page.get_by_role("complementary")
    assert "The memory helps most at" in panel.inner_text()
    page.locator("[role=option]").nth(20).hover()
    words = panel.inner_text()
    assert re.search(r"Token 21 of \d+, line 2\. Predicted in segment 3 from 5 tokens of it and 12 remembered", words)
    assert all(label in words for label in ("probability", "with memory", "without", "gain", "Looks most at"))
    label = page.locator("[role=option]").nth(20).get_attribute("aria-label")
    assert re.search(r"probability .*%, loss .* nats with memory, .* without, gain [+\u2212]?\d", label)
    page.mouse.move(5, 5)
    assert "The memory helps most at" in panel.inner_text()
    panel.get_by_role("button").first.click()
    assert len(chosen(page)) == 1 and "Looks most at" in panel.inner_text()


def test_the_keyboard_goes_on_where_the_mouse_rests(open_page, address):
    """Also where the text scrolls below it."""
    page = open_page(address, height=300)
    page.locator("[role=option]").nth(5).click()
    page.keyboard.press("ArrowRight")
    assert chosen(page) == [6]
    for key, token in (("End", PIECES - 1), ("Home", 0), ("End", PIECES - 1)):
        page.keyboard.press(key)
        page.wait_for_timeout(200)
        assert chosen(page) == [token]
    page.locator("[role=option]").nth(PIECES - 3).hover()
    assert chosen(page) == [PIECES - 3]


def test_a_head_can_be_chosen_with_the_keyboard(open_page, address):
    page = open_page(address)
    page.locator("[role=option]").nth(20).click()
    by_all = page.locator(".keys").inner_text()
    page.get_by_role("radio", name="Mean of all heads").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert "layer 1, the mean of its heads" in page.locator(".shares").inner_text()
    page.keyboard.press("ArrowRight")
    assert "by layer 1, head 0" in page.locator(".shares").inner_text()
    assert page.locator(".keys").inner_text() != by_all and chosen(page) == [20]
    cells = page.get_by_role("radio", name=re.compile(r"layer \d, head \d: .*% on the memory"))
    assert cells.count() == 4
    share = page.locator(".cell[aria-checked=true]").get_attribute("aria-label").split(": ")[1]
    assert page.locator(".shares").inner_text().startswith(share.removesuffix(" on the memory"))


def test_white_space_controls_and_parts_of_characters_can_be_seen(open_page, address):
    page = open_page(address)
    texts = page.locator("[role=option]").all_inner_texts()
    shown = "".join(texts)
    for mark in ("\u23ce", "\u2192", "\u25cc", "\u2401", "<b>&amp;</b>", "\u00e9"):
        assert mark in shown
    assert page.locator(".token .space").count() == TEXT.count(" ")
    assert page.locator(".border").count() == PIECES // LENGTH


def test_it_fits_a_telephone_and_a_tap_shows_a_token(open_page, address):
    page = open_page(address, width=390, height=450, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    panel = page.get_by_role("complementary")
    text = page.get_by_role("listbox").bounding_box()
    assert panel.bounding_box()["y"] >= text["y"] + text["height"]
    page.locator("[role=option]").nth(12).tap()
    assert chosen(page) == [12]
    assert "probability" in panel.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.keyboard.press("End")
    last = page.locator("[role=option]").last.bounding_box()
    assert last["y"] + last["height"] <= panel.bounding_box()["y"] <= 450 - 46


def test_dark_and_light_differ_and_both_are_legible(open_page, address):
    backgrounds = []
    for scheme in ("light", "dark"):
        page = open_page(address, color_scheme=scheme)
        for name in ("Gain", "Loss with memory"):
            page.get_by_role("radio", name=name, exact=True).click()
            assert min(page.evaluate(CONTRASTS)) > 4.5
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(backgrounds)) == 2


@pytest.mark.parametrize("pieces", [["a"], ["a", "b", "</script>"]])
def test_a_model_without_attention_has_colours_and_words(open_page, tmp_path, pieces):
    losses = [float(number) for number, _ in enumerate(pieces, 1)]
    data = {"run": "x", "step": 1, "text_tokens": len(pieces), "tgt_len": 2, "mem_len": 1, "tokens": pieces}
    data |= {"loss": losses, "alone": losses, "attention": None}
    (tmp_path / "look.html").write_text(render("x", data, ["look.css"], ["look.js"]))
    page = open_page((tmp_path / "look.html").as_uri())
    assert len(set(colours(page))) == len(pieces)
    page.locator("[role=option]").last.click()
    words = page.get_by_role("complementary").inner_text()
    assert "no attention that could be shown" in words and "and from its memory." in words
    assert pieces[-1] in words and chosen(page) == [len(pieces) - 1]


# The contrast of text and background of every token (WCAG 2.2), measured from pixels of a canvas: colours are mixed.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const pixel = (...colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = value => value <= 10.31 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = getComputedStyle(document.body).backgroundColor;
  return [...document.querySelectorAll("[role=option]")].map(token => {
    const style = getComputedStyle(token);
    const [one, other] = [pixel(behind, style.backgroundColor), pixel(style.color)].map(luminance);
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  });
}"""
