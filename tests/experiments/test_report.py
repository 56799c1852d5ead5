"""The report: one page, whole without a network, and readable by all."""

import json
import re
import shutil
import time
from html.parser import HTMLParser

import pytest
import torch
from tiny_study import TINY, asked
from tiny_tasks import tiny_backbone, tiny_task
from typer.testing import CliRunner

import pcx
from pcx.cli import app
from pcx.experiments.report import read_runs, write_report


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "study"
    TINY.run(asked(folder, quick=True)).write(folder)
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "training <1>"
    loader = tiny_task().loader("train", 6)
    model = pcx.VPT(tiny_backbone(3), 4)
    pcx.fit(model, loader, epochs=2, lr=0.1, val_loader=loader, checkpoint_dir=folder / "first",
            progress=False)  # fmt: skip
    pcx.condense(model, loader, 0.5, epochs=2, checkpoint_dir=folder / "second", progress=False)
    return [folder / "first", folder / "second"]


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folders, tmp_path):
    runs, failures = read_runs(folders)
    write_report(runs, failures, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_all_of_a_study(study, tmp_path):
    page = page_of([study], tmp_path)
    content = json.loads((study / "results.json").read_text())
    for chart in content["charts"]:
        assert chart["title"] in page.text
    for table in content["tables"]:
        assert table["title"] in page.text
        assert all(str(cell) in page.text for line in table["lines"] for cell in line)
    for finding in content["findings"]:
        assert finding["says"] in page.text
    downloads = {a["download"] for a in page.of("a") if "download" in a}
    assert downloads == {f"{c['name']}.{x}" for c in content["charts"] for x in ("png", "csv")}
    assert len(content["looks"]) == 2
    assert page.text.count("prompt 1 attends to") >= 1
    config = json.loads((study / "config.json").read_text())
    assert config["backbone"] in page.text
    assert torch.__version__ in page.text


def test_nothing_comes_from_elsewhere(study, tmp_path):
    page_of([study], tmp_path)
    text = (tmp_path / "report.html").read_text()
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://", bare)
    assert "default-src 'none'" in text
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)


def test_names_cannot_become_tags(training, tmp_path):
    page = page_of(training, tmp_path)
    assert "Training in first" in page.text
    assert "Loss by epoch" in page.text
    assert "Prompts of each layer" in page.text  # of the condensation alone
    assert page.text.count("Prompts of each layer") < page.text.count("Loss by epoch")
    assert len(page.of("section")) == 2


def test_ids_are_one_of_a_kind_and_pictures_have_words(study, training, tmp_path):
    page = page_of([study, *training], tmp_path)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all("alt" in a for a in page.of("img"))
    assert all(a.get("aria-label") and a["role"] == "img" for a in page.of("svg"))
    assert page.of("html")[0]["lang"] == "en"


class TestFailures:
    def test_what_cannot_be_read_is_named_and_the_rest_is_there(self, study, tmp_path):
        broken, other, half = (tmp_path / name for name in ("broken", "other", "half"))
        for folder in (broken, other, half):
            folder.mkdir()
        (broken / "results.json").write_text('{"format": 1, "sui')
        (other / "holiday.jpg").write_text("hello")
        (half / "config.json").write_text("{}")
        runs, failures = read_runs([broken, study, other, half, tmp_path / "gone"])
        assert [run.folder for run in runs] == [study]
        said = dict(failures)
        assert "cannot be read" in said[str(broken)]
        assert said[str(other)].startswith("no folder of a run")
        assert said[str(half)].startswith("the run is not finished")
        assert said[str(tmp_path / "gone")] == "no such folder"
        assert not any("\n" in why for why in said.values())
        page = page_of([broken, study], tmp_path)
        assert "What could not be read" in page.text

    def test_the_command_ends_in_an_exit_code(self, study, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, ["report", str(study), "gone", "--out", "r.html"])
        assert done.exit_code == 1
        assert "failed: gone: no such folder" in done.stdout
        assert (tmp_path / "r.html").stat().st_size > 10_000
        with pytest.raises(ValueError, match="^RUNS: none can be read; gone: no such folder"):
            CliRunner().invoke(app, ["report", "gone"], catch_exceptions=False)

    @pytest.mark.parametrize("content", ["", "loss\n1\n", "epoch,loss\n1,x\n", "\x00\n"])
    def test_a_history_that_is_not_whole(self, tmp_path, content):
        (tmp_path / "history.csv").write_text(content)
        ((_, why),) = read_runs([tmp_path])[1]
        assert "is not whole" in why


# The contrast of all text with what lies behind it, by WCAG 2.2, and what else a page must have.
CHECKS = """
const parse = c => { const v = c.match(/[\\d.]+/g).map(Number);
  return v.length < 4 ? [...v, 1] : v; };
const light = c => { const f = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92
  : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
const behind = e => { for (; e; e = e.parentElement) {
  const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0.99) return c; }
  return [255, 255, 255, 1]; };
const found = { low: [], wide: [], unnamed: 0, texts: 0 };
document.querySelectorAll("details").forEach(d => d.open = true);
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || ["SCRIPT", "STYLE", "style"].includes(e.tagName)) continue;
  found.texts++;
  const style = getComputedStyle(e);
  const ink = e instanceof SVGElement ? style.fill : style.color;
  const [a, b] = [light(parse(ink)), light(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.low.push([e.tagName, e.textContent.slice(0, 40), ratio, ink]);
}
for (const e of document.querySelectorAll("button, a, summary"))
  if (!e.textContent.trim()) found.unnamed++;
found.scroll = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.levels = [...document.querySelectorAll("h1, h2, h3, h4")].map(e => +e.tagName[1]);
return found;
"""


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    assert selenium
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    running = webdriver.Chrome(options=options, service=service)
    running.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    running.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield running
    running.quit()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_finds_no_fault(browser, study, training, tmp_path, scheme, width):
    page_of([study, *training], tmp_path)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((tmp_path / "report.html").as_uri())
    found = browser.execute_script(CHECKS)
    assert found["texts"] > 100
    assert not found["low"], found["low"][:5]
    assert found["scroll"] <= 0
    assert not found["unnamed"]
    assert found["levels"][0] == 1
    assert all(b - a <= 1 for a, b in zip(found["levels"], found["levels"][1:], strict=False))
    assert not browser.get_log("browser")
    picture = tmp_path / f"report-{scheme}-{width}.png"
    assert browser.save_screenshot(picture)
    assert picture.stat().st_size > 5_000


@pytest.mark.slow
def test_tables_are_sorted_by_their_heads(browser, study, tmp_path):
    page_of([study], tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    column = """
      document.querySelectorAll("details").forEach(d => d.open = true);
      const table = document.querySelector("[aria-label='All results'] table");
      const place = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === "accuracy");
      const head = table.tHead.rows[0].cells[place];
      head.querySelector("button").click();
      return [head.ariaSort, [...table.tBodies[0].rows].map(r => +r.cells[place].textContent)];
    """
    for order, down in (("ascending", False), ("descending", True)):
        said, values = browser.execute_script(column)
        assert said == order
        assert values == sorted(values, reverse=down)
    time.sleep(0.1)
    assert not browser.get_log("browser")
