"""The built documentation site in a browser: headless Chromium, where it is installed and ``make docs`` has run."""

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1280,1600"),
]
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")) if SITE.is_dir() else []
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.skipif(not (SITE / "methods" / "index.html").exists(), reason="needs the site: make docs"),
]

VISIT = """<!doctype html><meta charset="utf-8"><iframe id="f" style="width:1280px;height:1600px"></iframe><script>
const frame = document.getElementById("f");
const load = (page) => new Promise((done) => { frame.onload = done; frame.src = "/" + page; });
function seen() {
  const page = frame.contentDocument, rect = (e) => e.getBoundingClientRect();
  const article = page.querySelector("article") || page.body;
  const text = article.cloneNode(true);
  text.querySelectorAll("pre, code, script, style, annotation").forEach((e) => e.remove());
  const ids = [...page.querySelectorAll("[id]")].map((e) => e.id);
  return {
    text: text.textContent,
    ids,
    names: [...page.querySelectorAll("a[name]")].map((e) => e.name),
    links: [...page.querySelectorAll("a[href]")].map((e) => e.getAttribute("href")),
    images: [...page.images].map((e) => [e.getAttribute("src"), e.naturalWidth]),
    curves: [...page.querySelectorAll("figure.curve svg")].map((e) => [rect(e).width, rect(e).height,
      [...e.querySelectorAll("path")].filter((p) => p.getBBox().width > 20).length,
      [...e.querySelectorAll("text")].filter((t) => rect(t).left < rect(e).left - 1 || rect(t).right > rect(e).right + 1
        || rect(t).bottom > rect(e).bottom + 1 || rect(t).top < rect(e).top - 1).map((t) => t.textContent)]),
    math: [...page.querySelectorAll("article math")].map((e) => rect(e).width),
    hidden: [...page.querySelectorAll("article th")].filter((e) => e.textContent.trim() && !e.getClientRects().length)
      .map((e) => e.textContent),
    wide: page.documentElement.scrollWidth - frame.clientWidth,
  };
}
async function visit(pages) {
  const found = {};
  for (const page of pages) { await load(page); found[page] = seen(); }
  return found;
}
async function filters() {
  await load("methods/index.html");
  const page = frame.contentDocument, found = {};
  const place = page.getElementById("catalogue-filters");
  const rows = () => [...page.querySelectorAll("#catalogue-table tbody tr")].filter((e) => e.getClientRects().length);
  const set = (name, value) => {
    const control = place.querySelector(`[name=${name}]`);
    control.value = value;
    if (control.value !== value) throw new Error(`${name} has no ${value}`);
    control.dispatchEvent(new frame.contentWindow.Event("input", { bubbles: true }));
  };
  const look = (name) => { found[name] = rows().map((e) => ({ ...e.dataset, text: e.textContent })); };
  look("all");
  for (const [name, value] of [["kind", "objective"], ["acts", "task"], ["needs", "log_pt"], ["update", "epoch"],
                               ["year", "2024"], ["words", "focal GAMMA"], ["words", "asymmetric"]]) {
    set(name, value);
    look(`${name}=${value}`);
    found[`${name}=${value} says`] = place.querySelector("output").textContent;
    place.querySelector("button").click();
  }
  set("kind", "weighting"); set("acts", "task"); look("both");
  place.querySelector("button").click();
  look("cleared");
  found.controls = [...place.querySelectorAll("input, select, button")].map((e) =>
    [e.name || e.textContent, e.tabIndex, e.tagName === "BUTTON" || e.labels.length > 0]);
  return found;
}
async function search() {
  await load("index.html?q=focal");
  const links = () => [...frame.contentDocument.querySelectorAll("a.md-search-result__link")];
  while (!links().length) await new Promise((later) => setTimeout(later, 50));
  return links().map((e) => [e.getAttribute("href"), e.textContent]);
}
TASK.then((found) => fetch("/found", { method: "POST", body: JSON.stringify(found) }))
  .catch((error) => fetch("/found", { method: "POST", body: JSON.stringify({ error: String(error) }) }));
</script>"""


class Server(SimpleHTTPRequestHandler):
    """The site, a page that visits its pages, and the place that what it saw is sent to."""

    script, found, done = "", b"", threading.Event()

    def do_GET(self):
        if self.path != "/visit":
            return super().do_GET()
        body = type(self).script.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)
        return None

    def do_POST(self):
        type(self).found = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        type(self).done.set()

    def log_message(self, *args):
        pass


def browse(task, folder, timeout=240):
    """What a task of the visiting page found, and what the browser's console said."""
    handler = type("Once", (Server,), {"script": VISIT.replace("TASK", task), "found": b"", "done": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log = folder / "browser.log"
    try:
        with log.open("w") as errors:
            command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0"]
            url = f"http://127.0.0.1:{server.server_port}/visit"
            browser = subprocess.Popen([*command, url], stdout=subprocess.DEVNULL, stderr=errors)
            try:
                assert handler.done.wait(timeout), "the browser sent nothing"
            finally:
                browser.terminate()
                browser.wait(timeout=20)
    finally:
        server.shutdown()
        server.server_close()
    found = json.loads(handler.found)
    assert "error" not in found, found
    return found, [line for line in log.read_text(errors="replace").splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    found, said = browse(f"visit({json.dumps(PAGES)})", tmp_path_factory.mktemp("visit"))
    assert set(found) == set(PAGES)
    return found, said


def test_no_page_says_anything_on_the_console(visited):
    assert visited[1] == []


def test_no_raw_markup_is_read(visited):
    for page, seen in visited[0].items():
        for raw in (
            ":math:",
            ".. math",
            "texformula",
            ":class:",
            ":meth:",
            ":func:",
            "\\frac",
            "\\sum",
            "\\mathrm",
            "$$",
        ):
            assert raw not in seen["text"], f"{page} shows {raw}"


def test_figures_and_formulas_are_rendered(visited):
    drawn = set()
    for page, seen in visited[0].items():
        for source, width in seen["images"]:
            assert width > 0, f"{page}: {source}"
        for width, height, lines, cut in seen["curves"]:
            assert width > 200, page
            assert height > 100, page
            assert lines >= 1, f"{page}: no line is drawn"
            assert cut == [], f"{page}: words reach beyond the figure"
        assert all(width > 0 for width in seen["math"]), page
        if seen["curves"]:
            drawn.add(page)
    methods = {page for page in PAGES if page.startswith(("methods/weighting/", "methods/objective/"))}
    assert methods == drawn
    assert len(drawn) > 100
    assert sum(len(seen["math"]) for seen in visited[0].values()) > 800


def test_heads_of_tables_are_shown(visited):
    assert {page: seen["hidden"] for page, seen in visited[0].items() if seen["hidden"]} == {}


def test_no_page_scrolls_sideways(visited):
    assert [page for page, seen in visited[0].items() if seen["wide"] > 0] == []


def test_links_inside_the_site_lead_somewhere(visited):
    ids = {page: {*seen["ids"], *seen["names"]} for page, seen in visited[0].items()}
    broken, number = [], 0
    for page, seen in visited[0].items():
        if page == "404.html":
            continue  # its links are made for a site at the root of a host
        for link in seen["links"]:
            if link.startswith(("http:", "https:", "mailto:", "javascript:")):
                continue
            number += 1
            target, anchor = urldefrag(urljoin(f"/{page}", link))
            target = unquote(target).lstrip("/") or "index.html"
            target = f"{target}index.html" if target.endswith("/") else target
            if not (SITE / target).is_file() or (anchor and target in ids and unquote(anchor) not in ids[target]):
                broken.append((page, link))
    assert number > 5000
    assert broken == []


def test_nothing_is_loaded_from_elsewhere():
    for page in PAGES:
        text = (SITE / page).read_text(encoding="utf-8")
        for mark in ('src="http', "src='http", 'src="//', "url(http", '@import "http'):
            assert mark not in text, f"{page}: {mark}"
        for line in text.split("<link ")[1:]:
            tag = line.partition(">")[0]
            assert "stylesheet" not in tag or 'href="http' not in tag, page


def test_the_search_index_knows_the_methods():
    index = json.loads((SITE / "search" / "search_index.json").read_text(encoding="utf-8"))
    focal = [entry["location"] for entry in index["docs"] if "focal" in (entry["title"] + entry["text"]).lower()]
    assert any(place.startswith("methods/weighting/focal.html") for place in focal)
    assert not any("probability of the target</text>" in entry["text"] for entry in index["docs"])


def test_the_search_box_finds_focal(tmp_path):
    found, said = browse("search()", tmp_path, timeout=60)
    assert said == []
    assert any("methods/weighting/focal.html" in link for link, _ in found)
    assert "focal" in found[0][1].lower()


def test_filters_of_the_catalogue(tmp_path):
    found, said = browse("filters()", tmp_path, timeout=60)
    assert said == []
    total = len(found["all"])
    assert total == len([page for page in PAGES if page.count("/") == 2 and page.startswith("methods/")])
    assert len(found["cleared"]) == total
    for name, value in (("kind", "objective"), ("acts", "task"), ("needs", "log_pt"), ("update", "epoch")):
        shown = found[f"{name}={value}"]
        assert 0 < len(shown) < total
        assert all(value in row[name].split() for row in shown)
        assert len(shown) == sum(value in row[name].split() for row in found["all"])
        assert found[f"{name}={value} says"] == f"{len(shown)} of {total}"
    recent = found["year=2024"]
    assert 0 < len(recent) < total
    assert all(int(row["year"]) >= 2024 for row in recent)
    asymmetric = found["words=asymmetric"]
    assert asymmetric
    assert all("asymmetric" in row["text"].lower() for row in asymmetric)
    assert all(row["kind"] == "weighting" and row["acts"] == "task" for row in found["both"])
    assert len(found["both"]) == len(found["acts=task"])
    assert [name for name, *_ in found["controls"]] == ["words", "kind", "acts", "needs", "update", "year", "Show all"]
    assert all(tab == 0 and labelled for _, tab, labelled in found["controls"])


def from_disk(page, tmp_path, *more):
    """The text of a page as it stands after its scripts have run."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", *more, page]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_catalogue_works_from_disk(tmp_path):
    total = len([page for page in PAGES if page.count("/") == 2 and page.startswith("methods/")])
    assert f"{total} of {total}" in from_disk((SITE / "methods" / "index.html").as_uri(), tmp_path)


def test_the_search_box_works_from_disk(tmp_path):
    page = (SITE / "guides" / "choosing.html").as_uri()
    text = from_disk(f"{page}?q=focal", tmp_path, "--virtual-time-budget=20000")
    assert "methods/weighting/focal.html" in text.partition("md-search-result__list")[2]
