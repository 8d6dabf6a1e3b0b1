"""The report in a browser: headless Chromium, where it is installed."""

import json
import re
import shutil
import subprocess

import pytest
from matplotlib.image import imread
from rich.console import Console

from reweigh.benchmarks.progress import Progress
from reweigh.benchmarks.report import report
from reweigh.benchmarks.runner import run
from reweigh.benchmarks.suites import SUITES

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
]
LOOK = """<script>
window.onload = () => {
  const images = [...document.images].map(i => [i.alt.slice(0, 30), i.complete && i.naturalWidth, i.clientWidth]);
  const links = [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.querySelector(a.hash));
  const seen = {images, broken: links.length, wide: document.documentElement.scrollWidth, inner: innerWidth};
  document.body.insertAdjacentHTML("beforeend", `<pre id="seen">${JSON.stringify(seen)}</pre>`);
};
</script>"""
SMALL = {
    "digits_lt50": {"steps": 20},
    "unicode_category": {"steps": 4},
    "pydoc_lm": {"steps": 2},
    "digits_spurious": {"steps": 4},
    "digits_two_tasks": {"steps": 20},
}

MORE = {"digits_lt50": ["inverse"], "unicode_category": ["inverse"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with every kind of figure."""
    out = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        grid = []
        for name, change in SMALL.items():
            kind = SUITES[name]
            if kind().unavailable() is None:
                patch.setattr(kind, "training", {**kind.training, **change})
                grid.append((kind(), 2, [*kind.quick, *MORE.get(name, ())]))
        run(grid, out, workers=1, command="test", progress=Progress(Console(quiet=True)))
        report(out, Console(quiet=True))
    return out


def test_every_kind_of_figure_is_drawn(folder):
    text = (folder / "report.html").read_text()
    for figure in ("differences", "by_class", "reliability", "weights"):
        assert f'<figure id="digits_lt50-{figure}">' in text
    assert '<figure id="digits_spurious-by_group">' in text
    assert '<figure id="digits_two_tasks-tasks">' in text
    assert ('<figure id="pydoc_lm-by_frequency">' in text) == (SUITES["pydoc_lm"]().unavailable() is None)
    assert text.index('id="overview"') < text.index('id="digits_lt50"')
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)  # nothing from elsewhere


def browse(page, width, folder, *options):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},3000", *options]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_reads_well_in_a_browser(width, folder, tmp_path):
    """Figures rendered, no console message, no link into nothing, no sideways scrolling; a screenshot with ink."""
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", f"{LOOK}</body>"))
    done = browse(page, width, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    (found,) = re.findall(r'<pre id="seen">({.*?})</pre>', done.stdout)
    seen = json.loads(found.replace("&gt;", ">").replace("&lt;", "<"))
    assert len(seen["images"]) >= 12
    assert all(natural and 200 < shown <= width for _, natural, shown in seen["images"])
    assert seen["broken"] == 0
    assert seen["wide"] <= seen["inner"]
    shot = tmp_path / "shot.png"
    browse(folder / "report.html", width, tmp_path, f"--screenshot={shot}")
    pixels = imread(shot)
    for third in range(3):
        part = pixels[third * len(pixels) // 3 : (third + 1) * len(pixels) // 3]
        assert (part[..., :3].min(-1) < 0.5).mean() > 0.003  # text or drawing, not an empty page
