"""The page in a real browser: a headless Chromium, driven by Playwright.

Screenshots go to .test-artefacts, or to the folder that MPOE_TEST_ARTEFACTS names, to be looked at.
"""

import os
import shutil
from pathlib import Path

import pytest

from mpoe.report.page import report_page
from report_runs import LAYERS, dense, log, mixture

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

ARTEFACTS = Path(os.environ.get("MPOE_TEST_ARTEFACTS", Path(__file__).parents[2] / ".test-artefacts"))
TEXT = "The book was read by him , and he liked the unbelievably long </script><script>alert(1)</script> word".split()
VIEWS = {"desktop": (1280, 900, "light"), "dark": (1280, 900, "dark"), "phone": (390, 844, "light")}

# Every text that is shown, and how its colour stands out from what is behind it (WCAG's contrast ratio).
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = rgba(getComputedStyle(element).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255, 255];
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => v / 255)
      .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || !element.checkVisibility() || element.closest("script, .skip, title")) continue;
    const style = getComputedStyle(element);
    const a = light(rgba(element.closest("svg") ? style.fill : style.color)), b = light(behind(element));
    found.push([text.slice(0, 30), (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, as in a container
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page([mixture(words=TEXT), dense()], " ".join(TEXT)), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser, file):
    """Opens the page in a window; afterwards, whatever the console said or the page asked for is a failure."""
    contexts, said, asked = [], [], []

    def open_in(width=1280, height=900, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_in
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) == {file.as_uri()}


@pytest.mark.parametrize("view", VIEWS)
def test_it_fits_and_can_be_read(open_page, view):
    width, height, scheme = VIEWS[view]
    page = open_page(width, height, scheme)
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"report-{view}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 300
    assert [(text, round(ratio, 2)) for text, ratio in contrasts if ratio < 4.5] == []


def test_nothing_in_it_is_too_small_to_read_on_a_phone(open_page):
    page = open_page(390, 844)
    sizes = page.evaluate(
        """() => [...document.querySelectorAll("svg text")].map((text) =>
             parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width / 360)
             .filter((size) => size > 0)"""
    )
    assert min(sizes) >= 9.5


def test_the_heat_map_goes_through_training(open_page):
    page = open_page()
    slider, cell = page.get_by_role("slider", name="Time"), page.locator("table.heat td").first
    assert slider.get_attribute("aria-valuetext") == "evaluation at the end"
    assert cell.inner_text() == "13", "1/8, of the results"
    shown = set()
    for _ in range(10):
        slider.press("ArrowLeft")
        shown.add(cell.inner_text())
    assert len(shown) > 1
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "step 5"
    assert page.locator("output[for=heat-0]").inner_text() == "step 5"


def test_load_and_gate_mass_go_together(open_page):
    page = open_page()
    load, gates = (page.locator("table.heat").nth(n).locator("tbody tr").first.locator("td") for n in range(2))
    assert (load.all_inner_texts(), gates.all_inner_texts()) == (["13"] * 8, ["6"] * 8), "1/8 and 1/16"
    page.get_by_role("slider", name="Time").press("Home")
    first = next(line for line in log() if "layers" in line)["layers"][LAYERS[0]]
    for cells, name in ((load, "share"), (gates, "gate_mass")):
        assert cells.all_inner_texts() == [str(round(100 * value)) for value in first[name]]


def test_every_token_shows_its_expert_in_every_layer(open_page):
    page = open_page()
    slider, tokens = page.get_by_role("slider", name="Layer"), page.locator(".token")
    assert tokens.count() == len(TEXT)
    assert [text.split("\n")[0] for text in tokens.all_inner_texts()] == TEXT
    slider.focus()
    for n in range(len(LAYERS)):
        experts = [(i + n) % 8 for i in range(len(TEXT))]
        assert page.locator(".token b").all_inner_texts() == [str(expert) for expert in experts]
        for i in (0, len(TEXT) - 1):
            assert f"e{experts[i]}" in tokens.nth(i).get_attribute("class").split()
            assert tokens.nth(i).get_attribute("title").startswith(f"expert {experts[i]}, probability 50%")
        counts = page.locator(".experts span").all_inner_texts()
        assert counts == [str(experts.count(expert)) for expert in range(8)]
        page.keyboard.press("ArrowRight")
    assert page.locator("output[for=tokens-0-0]").inner_text() == "decoder 3"


def test_the_spectra_are_shown_one_at_a_time(open_page):
    page = open_page()
    charts = page.locator("[data-switch=spectrum-0] > div")
    assert [charts.nth(n).is_visible() for n in range(3)] == [True, False, False]
    page.get_by_role("slider", name="Matrix").press("ArrowRight")
    assert [charts.nth(n).is_visible() for n in range(3)] == [False, True, False]
    assert page.locator("output[for=spectrum-0]").inner_text() == "encoder 0, down"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_it_is_told(open_page, scheme):
    page = open_page(scheme=scheme)
    button = page.get_by_role("button", name="Dark theme")

    def is_dark():
        assert button.get_attribute("aria-pressed") in ("true", "false")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, colour[4:-1].split(","))) < 200
        assert dark == (button.get_attribute("aria-pressed") == "true")
        return dark

    assert is_dark() == (scheme == "dark")
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    page.wait_for_function(f"matchMedia('(prefers-color-scheme: dark)').matches === {str(scheme == 'light').lower()}")
    page.evaluate("new Promise(requestAnimationFrame)")  # by when the page has been told, too
    assert is_dark() == (scheme == "light")
    button.focus()
    page.keyboard.press("Enter")
    assert is_dark() == (scheme == "dark")
    page.reload()
    assert is_dark() == (scheme == "dark"), "the choice is kept"


def test_the_keyboard_reaches_everything(open_page):
    page = open_page()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    for name in ("To the content", "theme", "Tokens", "heat-0"):
        assert name in reached, name
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    for slider in page.locator("input[type=range]").all():
        assert slider.evaluate("slider => slider.labels.length") == 1


def test_it_says_all_that_matters_without_its_script(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("table.heat td").first.inner_text() == "13"
    assert page.locator(".token b").all_inner_texts()[:3] == ["0", "1", "2"]
    assert page.locator(".experts").inner_text().startswith("expert 0: 2")


def test_a_script_that_somebody_slipped_in_does_not_run(browser, file, tmp_path):
    """The page's own policy names its script by hash, so a hole in the escaping would still not be enough."""
    hole = tmp_path / "hole.html"
    hole.write_text(file.read_text().replace("</main>", "<script>document.title = 'broken'</script></main>"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(hole.as_uri())
    assert "broken" not in page.title()
    page.get_by_role("slider", name="Layer").press("ArrowRight")
    assert page.locator("output[for=tokens-0-0]").inner_text() == "encoder 1", "its own script does"
    context.close()
