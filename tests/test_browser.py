"""Every page in a real browser, on a phone and on a desk, light and dark."""

import gzip

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import EXAMPLES, PAGES, TUTORIALS

WIDTHS = (360, 1280)
BUDGET = 150_000  # bytes of a tutorial page beyond its figures, compressed
# Collected from the moment a page loads: how far its parts jump.
WATCH_SHIFTS = """
window.shift = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shift += entry.value;
}).observe({type: "layout-shift", buffered: true});
"""
# Words of code with the same look need one check: keep the first of each kind.
THIN_OUT = """
const seen = new Set();
for (const word of document.querySelectorAll("pre span")) {
  const look = [word, word.closest("pre")].map((e) => {
    const style = getComputedStyle(e);
    return [style.color, style.backgroundColor, style.fontSize, style.fontWeight];
  });
  const kind = JSON.stringify([word.className, look]);
  if (seen.has(kind)) word.style.visibility = "hidden";
  else seen.add(kind);
}
"""


@pytest.fixture
def visit(chromium, site):
    """Return a function that opens a page and notes all requests and complaints."""
    contexts = []

    def visit(page, width=1280, **options):
        viewport = {"width": width, "height": 800}
        context = chromium.new_context(viewport=viewport, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.requests, tab.complaints = [], []
        tab.on("request", lambda request: tab.requests.append(request))
        tab.on("console", lambda message: tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.add_init_script(WATCH_SHIFTS)
        tab.goto(site + page, wait_until="networkidle")
        return tab

    yield visit
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_page_is_accessible_and_stays_put(page, width, scheme, visit, site):
    tab = visit(page, width, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("window.shift") < 0.001
    tab.evaluate(THIN_OUT)
    violations = Axe().run(tab).response["violations"]
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in violations] == []
    assert tab.complaints == []
    assert all(request.url.startswith(site) for request in tab.requests)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_keyboard_reaches_everything(page, width, visit):
    tab = visit(page, width)
    if width == 360:
        tab.locator(".wy-nav-top button").press("Enter")
        assert tab.evaluate("document.activeElement.closest('.wy-nav-side') !== null")
        tab.keyboard.press("Escape")
        assert tab.evaluate("document.activeElement.ariaExpanded") == "false"
        tab.reload(wait_until="networkidle")
    # Everything that is shown and reacts, or scrolls, minus what has the focus in turn.
    tab.evaluate("""
      const shown = (e) => e.checkVisibility({visibilityProperty: true});
      const scrolls = (e) => e.scrollWidth > e.clientWidth + 1 &&
        ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
      window.unseen = [];
      window.waiting = new Set([...document.querySelectorAll("*")].filter((e) =>
        shown(e) && (e.matches("a[href], button, input:not([type=hidden])") ||
                     (scrolls(e) && e.matches(".document *")))));
      document.addEventListener("focusin", ({target}) => {
        window.waiting.delete(target);
        const box = target.getBoundingClientRect();
        const shown = getComputedStyle(target).outlineStyle !== "none" && box.right > 0;
        if (!shown) window.unseen.push(target.outerHTML);
      });
      document.addEventListener("focusout", ({relatedTarget}) => {
        window.left = window.left || relatedTarget === null;
      });
    """)
    for _ in range(100):
        for _ in range(25):
            tab.keyboard.press("Tab")
        if tab.evaluate("window.left"):
            break
    assert tab.evaluate("[...window.waiting].map((e) => e.outerHTML)") == []
    assert tab.evaluate("window.unseen") == []


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_tutorial_page_is_small(tutorial, visit):
    tab = visit(f"auto_examples/{tutorial}.html")
    sizes = {}
    for request in tab.requests:
        if "/_images/" not in request.url:
            body = request.response().body()
            sizes[request.url] = min(len(body), len(gzip.compress(body)))
    assert sum(sizes.values()) < BUDGET, sizes


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_math_shows_without_javascript(tutorial, visit):
    tab = visit(f"auto_examples/{tutorial}.html", java_script_enabled=False)
    formulas = tab.locator("math")
    source = (EXAMPLES / f"{tutorial}.py").read_text()
    assert formulas.count() == source.count(":math:") + source.count(".. math::")
    assert "\\" not in "".join(formulas.all_text_contents())
    for formula in formulas.all():
        box = formula.bounding_box()
        assert box["width"] > 5 and box["height"] > 5


@pytest.mark.parametrize("word", ["SqrtGGNExact", "grad_batch"])
def test_search_finds(word, visit):
    tab = visit("index.html")
    tab.get_by_role("textbox", name="Search docs").fill(word)
    tab.keyboard.press("Enter")
    results = tab.locator("#search-results li a")
    results.first.wait_for()
    links = [link.get_attribute("href") for link in results.all()]
    assert any("auto_examples/batched_jacobians.html" in link for link in links)
    found = {link.partition("#")[0].partition("?")[0] for link in links}
    assert found <= set(PAGES) - {"404.html", "search.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_search_results_and_marked_words_are_accessible(scheme, visit):
    tab = visit("search.html?q=SqrtGGNExact", color_scheme=scheme)
    tab.locator("#search-results .context").first.wait_for()
    assert Axe().run(tab).response["violations"] == []
    tab.locator("#search-results li a").first.click()
    tab.locator(".highlighted").first.wait_for()
    assert Axe().run(tab).response["violations"] == []


def test_copy_button_copies_the_code_and_outputs_have_none(visit):
    tab = visit(
        "auto_examples/batched_jacobians.html",
        permissions=["clipboard-read", "clipboard-write"],
    )
    block = tab.locator(".highlight-Python").nth(1)
    block.locator("button.copybtn").press("Enter")
    tab.wait_for_function("document.querySelector('button.copybtn.success') !== null")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == block.locator("pre").inner_text().strip()
    assert tab.locator(".sphx-glr-script-out button").count() == 0
