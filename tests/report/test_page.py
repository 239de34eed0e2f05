import base64
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_recipe.core.exhibit import Curve, Line, Picture, Table
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import GATES, Gate, Report, Stored
from hf_recipe.report.markup import text
from hf_recipe.report.page import render_page, verdict
from hf_recipe.tune.analysis import analyse
from hf_recipe.tune.space import quasi_random
from tests.report.samples import findings, png, rich_report

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Collects tags and visible text, and checks that every element is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.seen, self.open, self.attributes = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.seen.append(data)


def test_the_page_shows_everything():
    page = render_page(rich_report())
    reader = Reader(page)
    assert reader.open == []
    seen = " ".join(reader.seen)
    for expected in (
        "Not sound: loss-not-finite", "1 error, 2 warnings, 2 notes", "gradient-not-finite",
        "nan at steps 4 and 7", "a finite loss at every step", "Rows 17, 204, 391",
        "no human baseline was given", "Are local features enough?", "no eval_dataset",
        "row 'secret' is odd", "token-out-of-range", "argument", "world_size",
        "input-blind baseline", "rotary positions", "Explains 1 more finding", "done, with doubts",
        "not reached", "Mend loss-not-finite first", *GATES.values(),
    ):  # fmt: skip
        assert expected in seen, expected
    assert reader.tags.count("img") == 5


def test_what_comes_from_the_data_is_text_and_no_markup():
    hostile = "<img src=x onerror=alert(1)> \"'></script><script>alert(2)</script>"
    report = Report(title=hostile, skipped={hostile: hostile}, crashed={hostile: hostile})
    report.ran = {hostile: ["run"]}
    report.environment = report.settings = {hostile: {hostile: [hostile]}}
    report.add(
        Finding(check=hostile, stage="data", severity="error", message=hostile, subject=hostile,
                evidence={"seen": hostile, hostile: hostile}, why=hostile, fix=hostile,
                quotes=(hostile,), split=hostile)
    )  # fmt: skip
    line = Line(hostile, (1.0, 2.0), (1.0, 2.0))
    for exhibit in rich_report().exhibits:
        report.exhibit(replace(exhibit, title=hostile, caption=hostile))
    report.exhibit(Curve(hostile, "tune", hostile, hostile, (line,), ()))
    report.exhibit(Table("t", "data", (hostile,), ((hostile,),)))
    report.exhibit(Picture("p", "data", ("x\" onload='alert(3)", png()), (hostile,)))
    report.gate(Gate("data", "fail", (hostile,)))
    reader = Reader(render_page(report))
    assert reader.tags.count("script") == 2  # ours and the embedded JSON
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert not any(name == "style" for name, _ in reader.attributes)
    assert reader.tags.count("img") == 5 + 1  # a picture that is no PNG is not shown
    assert hostile in "".join(reader.seen)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x00\x1b[31m", "\\x00\\x1b[31m"),
        ("a\u202eb", "a\\u202eb"),
        ("\ud83d", "\\ud83d"),
        ("a\tb\nc", "a\tb\nc"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("x" * 3000, "x" * 2048 + " … (952 more characters)"),
    ],
)
def test_controls_are_shown_and_long_texts_cut(raw, shown):
    assert text(raw) == shown


def test_the_embedded_json_is_the_report():
    report = rich_report()
    page = render_page(report)
    (content,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page)
    again = Report.from_dict(json.loads(content))
    assert again.flat[0].message == findings()[0].message
    assert len(again.exhibits) == len(report.exhibits)
    assert "<" not in content


def test_nothing_is_fetched_and_the_policy_forbids_it():
    page = render_page(rich_report())
    assert "default-src 'none'" in page
    assert "unsafe-inline" not in page
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"//[^\n]*\n", "", page, count=1))
    assert not re.findall(r"<(?:link|iframe|object|embed|base|form)\b", page)


def test_an_empty_report_has_a_page():
    assert "Nothing was checked" in render_page(Report())


@pytest.mark.parametrize(
    ("report", "tone", "line"),
    [
        (Report(ran={"a": ["run"]}), "good", "Healthy: 1 checks ran"),
        (Report(ran={"a": ["run"]}, crashed={"b": "E"}), "warning", "1 checks crashed"),
        (Report(ran={"a": ["run"]}, status="failed"), "error", "The run failed"),
        (Report(gates=[Gate("data", "fail")]), "warning", "data stage is not done"),
        (Report(flat=findings()[1:3]), "warning", "gradient-not-finite and 1 more"),
    ],
)
def test_the_verdict(report, tone, line):
    told, colour = verdict(report)
    assert colour == tone
    assert line in told


# -------------------------------------------------------------------- size


def test_many_points_measurements_and_rows_stay_under_a_megabyte():
    report = rich_report()
    xs = tuple(i + 0.123456789 for i in range(4096))
    for i in range(60):
        line = Line("l", xs, tuple(v * 1.7 for v in xs))
        report.exhibit(Curve(f"c{i}", "tune", "x", "y", (line,) * 4))
    report.exhibit(Table("t", "data", ("text",), (("w " * 3000,),) * 2000))
    report.measurements = [Stored("k", 1, "run", "", i, {"x": list(xs)}) for i in range(100)]
    report.flat += [replace(f, subject=f"s{i}") for i in range(3000) for f in findings()[:1]]
    page = render_page(report)
    assert len(page.encode()) <= 1_000_000
    assert "in the JSON report" in page
    assert "loss-not-finite" in page


def test_pictures_beyond_the_budget_are_dropped_and_said_so():
    noise = base64.b64encode(b"\x89PNG\r\n\x1a\n" + os.urandom(900_000)).decode()
    report = rich_report()
    for i in range(12):
        report.exhibit(Picture(f"big {i}", "data", (noise,), ("noise",)))
    page = render_page(report)
    assert len(page.encode()) <= 5_000_000
    assert "9 of 19 exhibits hold more pictures" in page
    assert page.count("<img") == 5 + 3


# -------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("chromium or chromedriver is not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def opened(browser, path, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get(path.as_uri())
    return browser.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth, innerWidth]"
    )


def requested(browser):
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    return [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(browser, tmp_path, width):
    report = rich_report()
    report.add(replace(findings()[2], subject="layer." * 60, message="unbroken" * 80))
    report.exhibit(Table("wide", "data", tuple("abcdefghijklmno"), (("word" * 40,) * 15,)))
    report.to_html(tmp_path / "report.html")
    scroll, client, inner = opened(browser, tmp_path / "report.html", width)
    assert inner == width
    assert scroll <= client
    assert browser.get_log("browser") == []
    own = ("data:", "chrome:")  # the browser's own first tab
    assert {url for url in requested(browser) if not url.startswith(own)} == {
        (tmp_path / "report.html").as_uri()
    }
    shown = browser.find_element("tag name", "body").text
    assert "Cup final <script>alert('row')</script> moved" in shown
    assert browser.execute_script("return document.querySelectorAll('svg.plot').length") == 3
    red = browser.find_element("css selector", ".verdict").value_of_css_property("color")
    assert red == "rgba(179, 38, 30, 1)"  # the style sheet passes the policy


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_studys_page_in_a_browser(browser, tmp_path, width):
    """Every finite trial is a point along each parameter, every other one a cross."""
    space = {"learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}}
    space |= {"dropout": {"values": [0.0, 0.1, 0.2]}}
    trials = []
    for i, point in enumerate(quasi_random(space, 16, 0)):
        value = math.nan if i % 8 == 5 else (math.log10(point["learning_rate"]) + 3) ** 2
        curve = [value + 0.8**k for k in range(9)]
        trials.append({"params": point, "value": value, "curve": curve})
    analyse(trials, space, "eval/loss", False).to_html(tmp_path / "study.html")
    scroll, client, _ = opened(browser, tmp_path / "study.html", width)
    assert scroll <= client
    assert browser.get_log("browser") == []
    count = "return [...document.querySelectorAll('figure')].map(f => [f.querySelector('h4')"
    count += ".textContent, ...['circle.c0', 'polyline.c0', 'text.lost'].map("
    count += "kind => f.querySelectorAll(kind).length)])"
    drawn = {title: numbers for title, *numbers in browser.execute_script(count)}
    for name in space:
        assert drawn[f"eval/loss along {name}"] == [14, 0, 2]
    assert drawn["Training curves of the best trials"][1] == 1


@pytest.mark.browser
def test_the_script_sorts_a_table_and_the_policy_stops_a_foreign_one(browser, tmp_path):
    report = rich_report()
    report.to_html(tmp_path / "report.html")
    opened(browser, tmp_path / "report.html", 1280)
    head = browser.find_elements("css selector", "figure table th")[1]
    first = "return document.querySelector('figure tbody tr').cells[1].textContent"
    assert browser.execute_script(first) == "7.41"
    head.send_keys("\ue007")  # Enter: as a keyboard does it
    assert browser.execute_script(first) == "6.9"
    assert not browser.find_element("css selector", "button.copy").get_attribute("hidden")

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    forged = page.replace("<main>", "<main><script>document.title = 'forged'</script>")
    (tmp_path / "forged.html").write_text(forged, encoding="utf-8")
    opened(browser, tmp_path / "forged.html", 1280)
    assert browser.title != "forged"
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def searched(rows, length=40, pngs=()):
    cells = tuple((i, f"{i} {'<b>' * (length // 3)}", i / 7) for i in range(rows))
    return Table("Rows", "data", ("row", "text", "number"), cells, browse=True, pngs=pngs)


def test_a_table_to_search_holds_all_its_rows_and_more_of_them_than_others():
    page = render_page(Report(exhibits=[searched(900)]))
    assert page.count("<tr>") > 900
    assert '<table class="browse">' in page
    assert '<td class="long">899 &lt;b&gt;' in page
    assert "more rows in the JSON report" not in page
    plain = replace(searched(900), browse=False)
    assert "700 more rows in the JSON report" in render_page(Report(exhibits=[plain]))


def test_long_rows_are_cut_before_the_page_outgrows_its_budget():
    page = render_page(Report(exhibits=[searched(2_000, length=600)]))
    assert len(page.encode()) < 1_000_000
    assert "more rows in the JSON report" in page


def test_pictures_of_rows_stand_in_the_first_column():
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    page = render_page(Report(exhibits=[searched(3, pngs=(png, "", "no png"))]))
    assert page.count("data:image/png;base64,") == 1
    assert page.count("not a PNG") == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_rows_are_paged_filtered_and_sorted_by_keys(browser, tmp_path, width):
    Report(exhibits=[searched(120)]).to_html(tmp_path / "rows.html")
    scroll, client, _ = opened(browser, tmp_path / "rows.html", width)
    assert scroll <= client
    shown = "return [...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map("
    shown += "r => +r.cells[0].textContent)"
    assert browser.execute_script(shown) == list(range(25))
    box = browser.find_element("css selector", ".scroll")
    box.send_keys("n")
    assert browser.execute_script(shown) == list(range(25, 50))
    box.send_keys("p")
    status = browser.find_element("css selector", "[role=status]")
    assert status.text == "1 to 25 of 120"
    row, text_, number = browser.find_elements("css selector", "thead input")
    row.send_keys("7..9")
    assert browser.execute_script(shown) == [7, 8, 9]
    row.clear()
    row.send_keys(" ")
    number.send_keys(">=16")
    assert status.text == "1 to 8 of 8 that match, 120 in all"
    number.clear()
    text_.send_keys("11")
    assert browser.execute_script(shown) == [11, *range(110, 120)]
    browser.find_elements("css selector", "thead th")[0].send_keys("\ue007", "\ue007")
    assert browser.execute_script(shown)[0] == 119
    assert browser.get_log("browser") == []
