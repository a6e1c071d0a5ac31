"""The report's page in a real browser: headless Chromium, where one is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmlx.bench import report
from tests.bench_results import many
from tests.test_bench_report import evil

pytest.importorskip("selenium", reason="needs selenium: pip install 'kvmlx[test]'")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Chromium: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # scripts/with-openblas preloads a library that Chromium's processes do not survive.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER), env=env))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report.report_html(many(), tmp_path_factory.mktemp("page") / "page.html").as_uri()


@pytest.fixture
def opened(browser: webdriver.Chrome, address: str) -> Iterator[webdriver.Chrome]:
    """The page, fresh, on a desktop in light mode; no test may leave an error in the console."""
    show(browser, address)
    yield browser
    assert browser.get_log("browser") == []


def show(browser: webdriver.Chrome, address: str, *, width: int = 1280, scheme: str = "light") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)


def column(browser: webdriver.Chrome, table: str, title: str) -> list[str | None]:
    """Return the cells of a column, top to bottom, without hidden ones; None for one without a value."""
    return browser.execute_script(
        """const table = document.getElementById(arguments[0]);
        const heads = [...table.tHead.rows[0].cells].map((c) => c.textContent);
        const at = heads.indexOf(arguments[1]);
        return [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[at])
            .map((c) => c.textContent === "–" ? null : c.textContent);""",
        table,
        title,
    )


def header(browser: webdriver.Chrome, table: str, title: str) -> Any:
    return browser.find_element(By.XPATH, f"//table[@id='{table}']//th[button[text()='{title}']]")


def press(browser: webdriver.Chrome, element: Any) -> None:
    """Click as a person does: in view, with the pointer."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
    ActionChains(browser).move_to_element(element).click().perform()


def choose(browser: webdriver.Chrome, kind: str, choice: str) -> None:
    press(browser, browser.find_element(By.CSS_SELECTOR, f"[data-kind='{kind}'][data-choice='{choice}']"))


def test_nothing_is_loaded(opened: webdriver.Chrome) -> None:
    assert opened.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []


def test_sort_by_clicking(opened: webdriver.Chrome) -> None:
    head = header(opened, "table-quality", "Score")
    press(opened, head)
    scores = [float(str(v).split()[0]) for v in column(opened, "table-quality", "Score")]
    assert scores == sorted(scores, reverse=True) and len(scores) == 144 and scores[0] > scores[-1]
    assert head.get_attribute("aria-sort") == "descending"
    assert opened.find_element(By.ID, "said").text == "sorted by Score, descending"
    press(opened, head)
    assert [float(str(v).split()[0]) for v in column(opened, "table-quality", "Score")] == sorted(scores)
    assert head.get_attribute("aria-sort") == "ascending"
    others = opened.find_elements(By.CSS_SELECTOR, "#table-quality th[aria-sort]:not([aria-sort='none'])")
    assert len(others) == 1


def test_sort_with_the_keyboard_and_missing_last(opened: webdriver.Chrome) -> None:
    for order in ("descending", "ascending"):
        button = header(opened, "table-overview-agnostic", "16x").find_element(By.TAG_NAME, "button")
        button.send_keys(Keys.ENTER)
        values = column(opened, "table-overview-agnostic", "16x")
        assert values[-1] is None and None not in values[:-1], order
    press(opened, header(opened, "table-quality", "Method"))
    names = [str(v) for v in column(opened, "table-quality", "Method")]
    assert names[0] == "expected_attention | adakv" and names[-1] == "turboquant"


def test_filter_by_words(opened: webdriver.Chrome) -> None:
    before = opened.find_element(By.ID, "count").text
    opened.find_element(By.ID, "search").send_keys("snapkv turbo")
    shown = set(column(opened, "table-quality", "Method"))
    assert shown == {"snapkv | turboquant(k=5, v=4, center=64)"}
    assert opened.find_element(By.ID, "count").text != before
    faded = opened.execute_script(
        "return [...document.querySelectorAll('#quality svg [data-tip]')].filter((p) => p.classList.contains('faded') "
        "=== p.dataset.tip.startsWith('snapkv | turbo')).length"
    )
    assert faded == 0


def test_filter_by_buttons(opened: webdriver.Chrome) -> None:
    for kind, choice in (("mode", "aware"), ("target", "4x"), ("length", "4096")):
        choose(opened, kind, choice)
    assert set(column(opened, "table-quality", "Mode")) == {"aware"}
    assert set(column(opened, "table-quality", "Length")) == {"4,096"}
    assert set(column(opened, "table-quality", "Target")) == {"1x", "4x"}, "the full cache stays beside each target"
    assert len(column(opened, "table-tasks", "Method")) == 10
    captions = [e.text for e in opened.find_elements(By.CSS_SELECTOR, "#quality figcaption") if e.is_displayed()]
    assert captions == ["Query-aware, 4,096 tokens"]
    assert not opened.find_element(By.ID, "table-overview-agnostic").is_displayed()
    pressed = opened.find_elements(By.CSS_SELECTOR, ".controls [aria-pressed='true']")
    assert [b.text for b in pressed] == ["query-aware", "4x", "4,096"]
    for kind in ("mode", "target", "length"):
        choose(opened, kind, "")
    assert len(column(opened, "table-quality", "Method")) == 144


def test_hover_shows_the_numbers(opened: webdriver.Chrome) -> None:
    tip = opened.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    point = opened.find_element(By.CSS_SELECTOR, "#quality figure [data-tip^='random, 16x']")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(opened).move_to_element(point).perform()
    assert tip.is_displayed()
    lines = tip.text.splitlines()
    assert lines[0] == "random, 16x" and lines[1] == "6.2% of the bytes" and lines[2].startswith("score 0.")
    box, screen = tip.rect, opened.execute_script("return [innerWidth, scrollY]")
    assert box["x"] >= 0 and box["x"] + box["width"] <= screen[0] and box["y"] >= screen[1]
    ActionChains(opened).move_to_element(opened.find_element(By.CSS_SELECTOR, "#quality figcaption")).perform()
    assert not tip.is_displayed()


def test_arrow_keys_go_through_a_plot(opened: webdriver.Chrome) -> None:
    stops = opened.find_elements(By.CSS_SELECTOR, "#quality figure [tabindex='0']")
    assert len(stops) == 4, "one stop of the Tab key for each plot"
    opened.execute_script("arguments[0].focus()", stops[0])
    first = opened.find_element(By.ID, "tip").text
    ActionChains(opened).send_keys(Keys.ARROW_RIGHT).perform()
    second = opened.find_element(By.ID, "tip").text
    assert first and second and first != second
    said = opened.execute_script("return document.activeElement.getAttribute('aria-label')")
    assert said == second.replace("\n", ", ")
    ActionChains(opened).send_keys(Keys.ESCAPE).perform()
    assert not opened.find_element(By.ID, "tip").is_displayed()


def test_legend_lights_up_one_family(opened: webdriver.Chrome) -> None:
    button = opened.find_element(By.XPATH, "//*[@id='quality']//button[span[text()='keydiff']]")
    press(opened, button)
    clear = opened.execute_script(
        "return [...new Set([...document.querySelectorAll('#quality svg [data-tip]:not(.faded)')]"
        ".map((p) => p.dataset.tip.split(',')[0]))]"
    )
    assert clear == ["keydiff"] and button.get_attribute("aria-pressed") == "true"
    press(opened, button)
    assert not opened.find_elements(By.CSS_SELECTOR, "#quality svg .faded")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_no_horizontal_scrolling(browser: webdriver.Chrome, address: str, width: int) -> None:
    show(browser, address, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = browser.execute_script(
        "return [...document.querySelectorAll('section *')].filter((e) => !e.closest('.box, svg') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    scrolls = "const b = document.querySelector('#quality .box'); return [b.scrollWidth, b.clientWidth]"
    inner, outer = browser.execute_script(scrolls)
    assert inner > outer or width > 1000
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('#quality svg text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert min(s for s in sizes if s) >= 8, "labels of plots stay readable"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: webdriver.Chrome, address: str, scheme: str) -> None:
    """Text has at least 4.5 : 1 against what is behind it, marks of plots 2.5 : 1."""
    show(browser, address, scheme=scheme)
    page = colour(browser, "body", "background-color")
    assert (sum(page) < 150) == (scheme == "dark")
    texts = (
        "h1",
        ".soft",
        ".note",
        "#table-quality td.worse",
        "#table-quality td",
        "tbody th",
        "a",
        "#quality svg text",
    )
    for selector in texts:
        name = "fill" if "svg" in selector else "color"
        assert contrast(colour(browser, selector, name), page) >= 4.5, selector
    heat = browser.find_element(By.CSS_SELECTOR, "td.heat[style='--v:1.00']")
    assert contrast(drawn(browser, heat, "color"), drawn(browser, heat, "background-color", page)) >= 4.5
    fills = browser.execute_script(
        "return [...new Set([...document.querySelectorAll('#quality figure [data-tip]')]"
        ".map((u) => getComputedStyle(u).fill))]"
    )
    assert len(fills) == 9
    assert min(contrast(numbers(f), page) for f in fills) >= 2.5


def colour(browser: webdriver.Chrome, selector: str, name: str) -> list[float]:
    return drawn(browser, browser.find_element(By.CSS_SELECTOR, selector), name)


def drawn(browser: webdriver.Chrome, element: Any, name: str, behind: list[float] | None = None) -> list[float]:
    """Return a colour as a browser paints it, 0 to 255, over what is behind it."""
    painted = browser.execute_script(
        """const context = document.createElement("canvas").getContext("2d");
        const fill = (c) => { context.fillStyle = c; context.fillRect(0, 0, 1, 1); };
        if (arguments[2]) fill(`rgb(${arguments[2]})`);
        fill(getComputedStyle(arguments[0])[arguments[1]]);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);""",
        element,
        name,
        behind,
    )
    return [float(c) for c in painted]


def numbers(colour: str) -> list[float]:
    return [float(c) for c in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def contrast(a: list[float], b: list[float]) -> float:
    """Return WCAG's contrast of two colours."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: list[float]) -> float:
    r, g, b = ((c / 3294.6 if c <= 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_attacks_in_results_do_nothing(browser: webdriver.Chrome, tmp_path: Path) -> None:
    show(browser, report.report_html(evil(), tmp_path / "evil.html").as_uri())
    for point in browser.find_elements(By.CSS_SELECTOR, "#quality [data-tip]"):
        ActionChains(browser).move_to_element(point).perform()
    assert "<script>window.pwned=1</script>" in browser.find_element(By.ID, "tip").text
    assert browser.execute_script("return window.pwned") is None
    assert browser.get_log("browser") == []


def test_print_shows_everything(opened: webdriver.Chrome) -> None:
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not opened.find_element(By.CSS_SELECTOR, ".controls").is_displayed()
    box = opened.execute_script("return getComputedStyle(document.querySelector('#quality .box')).maxHeight")
    assert box == "none"
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
