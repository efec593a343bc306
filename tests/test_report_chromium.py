"""The page in a real browser, headless: with a mouse, a keyboard and a finger, on a phone, in the dark, on paper, and
without scripts; of one run, two and twelve, with parts that are missing, and with names that would do harm.

The browser is the system's Chromium (Debian: `apt-get install chromium`); playwright only drives it.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_folders import (
    examples_record,
    flatness_record,
    hostile_runs,
    page,
    synthetic_run,
    two_groups,
    with_plane,
    write,
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
PHONE, DESK = 360, 1100
NASTY = {
    "script": "</script><script>alert(1)</script>",
    "style": "</style><script>alert(1)</script>",
    "cdata": "]]><img src=x onerror=alert(1)>",
    "quotes": '"\'`onmouseover=alert(1) x="',
    "turned": "at \u202etfel ot thgir\u202c \u2067awp",
    "template": "{{ 7 * 7 }} {% raw %} ${alert(1)} &lt;b&gt;",
    "long": "at-" + 1000 * "awp-mart-x",
    "unbroken": "\u00a0" * 300 + "\u0000\u0007\ufeff",
}


def one(folder: Path) -> list[Path]:
    return [with_plane(folder / "run")]


def two(folder: Path) -> list[Path]:
    return [with_plane(folder / recipe, recipe=recipe, gaps=[(1, 2)]) for recipe in ("at", "at-awp")]


def twelve(folder: Path) -> list[Path]:
    folders = two_groups(folder / "a", [20, 21, 23], [10, 12, 11]) + two_groups(folder / "b", [18, 17, 15], [9, 9, 9])
    for path in folders[6:]:
        fields = (path / "config.yaml").read_text().replace("beta: 6.0", "beta: 3.0")
        (path / "config.yaml").write_text(fields)
    for index, path in enumerate(folders):
        write(path / "flatness" / "last.json", flatness_record(1.0 + index))
    return folders


def missing(folder: Path) -> list[Path]:
    """Nothing but a config; then runs of which each lacks one part; then one of which every part is damaged."""
    bare = folder / "bare"
    bare.mkdir(parents=True)
    (bare / "config.yaml").write_text("recipe: bare\nseed: 0\n")
    folders = [bare]
    for part in ("metrics.jsonl", "outcomes", "landscapes", "examples", "environment.json", "evaluation.json"):
        folders.append(with_plane(folder / part, recipe=f"no {part}"))
        gone = folders[-1] / part
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    damaged = with_plane(folder / "damaged", recipe="damaged")
    for path in sorted(path for path in damaged.rglob("*") if path.suffix in (".json", ".jsonl")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [*folders, damaged]


def hostile(folder: Path) -> list[Path]:
    folders = hostile_runs(folder / "every")
    for key, name in NASTY.items():
        fields = {"data": {"name": name, "path": name}, name: {name: [name]}, "optimizer": {"epochs": name}}
        folders.append(with_plane(folder / key, recipe=name, config=fields))
        attack = {"name": name, "description": name, "accuracy": 0.5, "interval": [0.4, 0.6]}
        place = {"checkpoint": name, "split": name, "n": 9, "attacks": [attack], "settings": {name: name}}
        write(folders[-1] / "outcomes" / "other.json", place)
    return folders


KINDS = {found.__name__: found for found in (one, two, twelve, missing, hostile)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    made = {}
    for name, folders in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        page(folders(folder))
        (made[name],) = folder.rglob("report.html")
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, path: Path, *, width: int = DESK, scripts: bool = True, **options: Any) -> Iterator[Any]:
    """The page, which has complained of nothing and asked for nothing when the block is left."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, java_script_enabled=scripts, reduced_motion="reduce", **options
    )
    context.set_default_timeout(120_000)
    view = context.new_page()
    said, asked = [], []
    view.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    view.on("pageerror", lambda error: said.append(f"error: {error}"))
    view.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(path.as_uri())
    settle(view)
    yield view
    context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}


SCRIPTLESS: list[Any] = []  # pages in contexts without scripts


def settle(view: Any) -> None:
    """Two frames, after which whatever was to be drawn is; where scripts are off, nobody is told of frames."""
    if view in SCRIPTLESS:
        view.wait_for_timeout(200)
        return
    view.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


PICTURES = """() => [...document.querySelectorAll("main svg[id], main canvas, main img")].map((picture) => {
  const { width, height } = picture.getBoundingClientRect();
  const closed = picture.closest("details:not([open])") !== null;
  let drawn = true;
  if (picture.tagName === "IMG") drawn = picture.complete && picture.naturalWidth > 0;
  if (picture.tagName === "CANVAS") {
    const { data } = picture.getContext("2d").getImageData(0, 0, picture.width, picture.height);
    drawn = data.some((value) => value > 0);
  }
  return { kind: picture.tagName.toLowerCase(), drawn: closed || (drawn && width > 20 && height > 20) };
})"""


def pictures(view: Any) -> dict[str, int]:
    """How many there are of each kind, all of which are drawn."""
    found = view.evaluate(PICTURES)
    assert [picture for picture in found if not picture["drawn"]] == []
    kinds = [picture["kind"] for picture in found]
    return {kind: kinds.count(kind) for kind in ("svg", "canvas", "img")}


def overflow(view: Any) -> int:
    """By how many pixels the page can be scrolled sideways."""
    return int(view.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


# Accuracies at two checkpoints, learning curves, four quantities along lines; contours. Three pictures an example.
EXPECTED = {
    "one": {"svg": 2 + 1 + 4 + 1, "canvas": 1, "img": 6},
    "two": {"svg": 2 + 2 + 4 + 2, "canvas": 2, "img": 12},
    "twelve": {"svg": 2 + 4 + 4, "canvas": 0, "img": 4 * 6},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light")])
def test_every_figure_is_drawn_and_no_page_is_too_wide(browser, pages, kind, width, scheme) -> None:
    with opened(browser, pages[kind], width=width, color_scheme=scheme) as view:
        found = pictures(view)
        assert found["svg"] > 0
        assert found == EXPECTED.get(kind, found)
        assert overflow(view) == 0
        dark, ink = view.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
            ".map((colour) => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3)"
        )
        assert (dark < 60 and ink > 200) if scheme == "dark" else (dark > 200 and ink < 60)


def test_names_are_text_wherever_they_stand(browser, pages) -> None:
    with opened(browser, pages["hostile"]) as view:
        words = view.evaluate("document.body.innerText")
        for name in (NASTY["script"], NASTY["style"], NASTY["cdata"], NASTY["quotes"], NASTY["template"]):
            assert name in words
        assert "\u202e" not in view.evaluate("document.documentElement.outerHTML")
        assert view.evaluate("document.querySelectorAll('main img:not([src^=\"data:image/png\"]), iframe').length") == 0
        assert view.evaluate("document.querySelectorAll('script:not([type])').length") == 2


def test_what_is_missing_is_said_and_the_rest_is_shown(browser, pages) -> None:
    with opened(browser, pages["missing"]) as view:
        words = view.evaluate("document.querySelector('#notes').innerText")
        for said in (
            "No metrics.jsonl: no per-epoch measurements",
            "No environment.json",
            "No evaluation.json",
            "No final evaluation",
            "No weight loss landscape",
            "No adversarial example is on record",
            "A damaged file was skipped: examples/last.json",
            "A damaged file was skipped: landscapes/plane.json",
        ):
            assert said in words


SHOWN = """(tip) => {
  const { left, right, top, bottom, width } = tip.getBoundingClientRect();
  return { text: tip.innerText.trim(), shown: width > 0 && getComputedStyle(tip).display !== "none",
    inside: left >= 0 && top >= 0 && right <= innerWidth && bottom <= innerHeight };
}"""


def check_tip(view: Any, selector: str, index: int = 0) -> str:
    """The text of a tip that is shown, within the window."""
    settle(view)  # a tip is placed beside its number when the next frame is drawn
    found = view.locator(selector).nth(index).evaluate(SHOWN)
    assert found["shown"]
    assert found["inside"]
    assert len(found["text"]) > 20
    return str(found["text"])


REACHABLE = """() => [...document.querySelectorAll('a[href], button, summary, [tabindex="0"]')]
  .filter((one) => one.checkVisibility() && one.getAttribute("tabindex") !== "-1").length"""
FOCUSED = """() => {
  const one = document.activeElement, tip = one.matches(".term") ? one.nextElementSibling : null;
  if (one === document.body) return null;
  one.dataset.met = Number(one.dataset.met || 0) + 1;
  const box = tip && tip.getBoundingClientRect();
  return {
    met: Number(one.dataset.met), term: one.matches(".term"), tip: tip && tip.innerText.trim().length,
    outlined: getComputedStyle(one).outlineStyle !== "none",
    inside: !tip || (box.width > 0 && box.left >= 0 && box.top >= 0 && box.right <= innerWidth
      && box.bottom <= innerHeight),
  };
}"""


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_tab_key_reaches_all_that_can_be_used_and_shows_what_it_means(browser, pages, width) -> None:
    with opened(browser, pages["two"], width=width) as view:
        expected, reached = view.evaluate(REACHABLE), []
        for _ in range(expected + 1):
            view.keyboard.press("Tab")
            settle(view)
            found = view.evaluate(FOCUSED)
            if found is None or found["met"] > 1:
                break
            reached.append(found)
        assert len(reached) == expected
        assert [found for found in reached if not (found["outlined"] and found["inside"])] == []
        terms = [found for found in reached if found["term"]]
        assert len(terms) > 20
        assert all(found["tip"] > 20 for found in terms)


def test_every_number_of_a_table_says_what_it_means(browser, pages) -> None:
    with opened(browser, pages["twelve"]) as view:
        view.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        numbers = view.locator(".table .number")
        silent = numbers.evaluate_all(
            "(cells) => cells.filter((cell) => !(cell.querySelector('.tip')?.textContent.trim().length > 20))"
            ".map((cell) => cell.outerHTML)"
        )
        assert numbers.count() > 200
        assert silent == []
        cells = "#accuracy .number"
        view.locator(cells).nth(5).hover()
        said = check_tip(view, f"{cells} > .tip", 5)
        assert "Robust accuracy on the training subset minus" in said
        assert "seed 2: " in said
        view.mouse.move(2, 2)
        view.locator("#differences .scroll").first.focus()
        view.keyboard.press("ArrowRight")
        view.keyboard.press("ArrowRight")
        view.keyboard.press("ArrowDown")
        assert view.evaluate("document.activeElement.matches('#differences .number')")
        said = view.evaluate("document.activeElement.querySelector('.tip').innerText")
        assert "n = 3; seed 0: " in said
        view.keyboard.press("Escape")
        assert view.evaluate("document.activeElement === document.body")


def test_numbers_of_the_headline_say_what_they_mean(browser, pages) -> None:
    with opened(browser, pages["two"]) as view:
        view.locator("#results .claim .term").first.hover()
        assert "Robust accuracy on the training subset" in check_tip(view, "#results .claim .tip")


def test_a_finger_opens_a_definition_on_a_phone(browser, pages) -> None:
    with opened(browser, pages["two"], width=PHONE, has_touch=True, is_mobile=True) as view:
        view.locator("#accuracy .term").first.tap()
        check_tip(view, "#accuracy .explained > .tip")
        view.locator("#accuracy .number").nth(1).tap()
        check_tip(view, "#accuracy .number > .tip", 1)
        assert overflow(view) == 0


def test_the_arrow_keys_read_a_landscape_and_so_does_the_mouse(browser, pages) -> None:
    record = json.loads((pages["one"].parent / "run" / "landscapes" / "last.json").read_text())
    raw = [sum(curve["robust_loss"][i] for curve in record["curves"]) / len(record["curves"]) for i in range(11)]
    with opened(browser, pages["one"]) as view:
        probe = view.locator("#landscape .probe").nth(1)  # as measured
        readout = view.locator("#landscape .panel .readout").nth(1)
        assert "α = 0" in readout.inner_text()
        probe.focus()
        for _ in range(2):
            view.keyboard.press("ArrowRight")
        assert "α = 0.4" in probe.get_attribute("aria-valuetext")
        assert f"{raw[7]:.3f}" in readout.inner_text()
        view.keyboard.press("Home")
        assert "α = −1" in readout.inner_text()
        assert f"{raw[0]:.3f}" in readout.inner_text()
        at = probe.evaluate(
            "(probe) => { const box = probe.getBoundingClientRect(), dot = probe.querySelector('.dot')"
            ".getBoundingClientRect(); return [dot.x + dot.width / 2 - box.x, dot.y + dot.height / 2 - box.y]"
            ".map((value, axis) => value / [box.width, box.height][axis]); }"
        )
        assert 0 < at[0] < 0.2
        assert 0 < at[1] < 0.5  # the loss is largest at the ends, and so is the dot's place
        view.evaluate("document.activeElement.blur()")
        probe.scroll_into_view_if_needed()
        box = probe.bounding_box()
        view.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
        assert "α = 1" in readout.inner_text()
        curves = view.locator("#curves .probe").first
        curves.focus()
        view.keyboard.press("ArrowLeft")
        assert "epoch 5" in curves.get_attribute("aria-valuetext")


def test_the_arrow_keys_turn_a_surface(browser, pages) -> None:
    with opened(browser, pages["two"]) as view:
        canvas = view.locator("canvas").first
        drawn = "(canvas) => canvas.toDataURL()"
        canvas.focus()
        first = canvas.evaluate(drawn)
        view.keyboard.press("ArrowRight")
        settle(view)
        turned = canvas.evaluate(drawn)
        assert turned != first
        view.keyboard.press("Shift+ArrowRight")
        settle(view)
        assert "α = 0.33" in view.locator(".surfaces .readout").first.inner_text()
        view.keyboard.press("Home")
        settle(view)
        assert canvas.evaluate(drawn) == first
        view.get_by_role("button", name="robust accuracy, %").click()
        settle(view)
        assert canvas.evaluate(drawn) != first


@pytest.mark.parametrize("kind", ["one", "twelve", "hostile"])
def test_without_scripts_all_is_there(browser, pages, kind) -> None:
    """Contours stand for surfaces, and what figures show is in their words; definitions need styles alone."""
    sections = "[...document.querySelectorAll('main h2')].map((heading) => heading.innerText)"
    with opened(browser, pages[kind]) as view:
        expected, headings = pictures(view), view.evaluate(sections)
    context = browser.new_context(java_script_enabled=False)
    view = context.new_page()
    SCRIPTLESS.append(view)
    view.goto(pages[kind].as_uri())
    assert pictures(view) == expected | {"canvas": 0}
    assert view.evaluate(sections) == headings
    assert overflow(view) == 0
    assert not view.locator(".surfaces").first.is_visible()
    point(view, view.locator("#accuracy .term").first)
    check_tip(view, "#accuracy .explained > .tip")
    point(view, view.locator("#accuracy .number").nth(2))
    check_tip(view, "#accuracy .number > .tip", 2)
    context.close()


def point(view: Any, at: Any) -> None:
    """The mouse on the middle of something, without waiting for frames as `hover` does."""
    view.mouse.move(1, 1)  # away from a tip that may lie over it
    at.scroll_into_view_if_needed()
    view.wait_for_timeout(200)
    box = at.bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_on_paper_there_is_nothing_to_click_and_nothing_cut(browser, pages) -> None:
    with opened(browser, pages["two"], width=794) as view:
        view.emulate_media(media="print")
        assert view.evaluate(
            "[...document.querySelectorAll('nav, .tip, .probe, .skip')].every((one) => !one.checkVisibility())"
        )
        assert view.locator("#definitions").is_visible()
        pictures(view)
        assert overflow(view) == 0
        assert view.pdf(format="A4")[:5] == b"%PDF-"


def test_a_page_is_small_enough_to_send(pages) -> None:
    assert pages["twelve"].stat().st_size < 2_000_000


def test_a_run_of_another_kind_of_image_has_a_gallery(browser, tmp_path) -> None:
    """Bundled digits: 8 × 8 pixels, one channel, enlarged without being blurred."""
    folder = synthetic_run(tmp_path / "run")
    write(folder / "examples" / "last.json", examples_record(shape=(1, 8, 8), eps=0.15))
    page([folder])
    with opened(browser, tmp_path / "report.html") as view:
        first = view.locator("#examples img").first
        assert first.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [8, 8]
        assert first.evaluate("(image) => getComputedStyle(image).imageRendering") == "pixelated"
        assert first.bounding_box()["width"] > 40
        assert "difference × 2" in view.locator("#examples").inner_text()
