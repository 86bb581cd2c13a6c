"""The documents as a site: it builds without a warning, holds the whole API, and needs no other machine to be read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fpdm

ROOT = Path(__file__).parents[2]
# What the browser sees is told on the console, by a probe in copies of the pages; home also searches.
PROBE = """<script>
addEventListener("load", () => {
  const home = location.pathname.endsWith("/index.probed.html")
  const query = document.querySelector("[data-md-component=search-query]")
  if (home) setTimeout(() => {
    document.querySelector("#__search").click()
    query.value = "unknown key"
    query.dispatchEvent(new Event("input", { bubbles: true }))
    query.dispatchEvent(new Event("keyup", { bubbles: true }))
  }, 5000)
  setTimeout(() => console.log("seen:" + JSON.stringify({
    page: location.pathname.split("/").pop(),
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    background: getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number),
    found: [...document.querySelectorAll(".md-search-result__link")].map(link => link.href.split("/").pop()),
  })), home ? 15000 : 5000)
})
</script></body>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    silent = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=silent, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, f"scripts/setup.sh --docs installs what it needs\n{built.stderr}"
    return folder


def test_the_site_fetches_nothing_and_holds_every_public_name(site: Path) -> None:
    for page in site.glob("*.html"):
        fetched = r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>"
        assert not re.findall(fetched, page.read_text(encoding="utf-8")), page.name
    api = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in fpdm.__all__ if f'id="fpdm.{name}"' not in api] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_every_page_fits_a_phone_and_home_finds_an_error_message(
    site: Path, chromium: list[str], scheme: str
) -> None:
    pages = sorted(page for page in site.glob("*.html") if "probed" not in page.name and page.name != "404.html")
    for page in pages:
        copy = page.with_name(f"{page.stem}.probed.html")
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    phones = [page.stem for page in pages] if scheme == "light" else ["index"]
    frames = [(f"{name}.probed.html", 390) for name in phones] + [("index.probed.html", 1280)]
    together = site / "probed.html"
    together.write_text("".join(f'<iframe src="{name}" width={width} height=900></iframe>' for name, width in frames))
    command = [*chromium, "--enable-logging=stderr", "--virtual-time-budget=30000", "--window-size=1400,900"]
    command += ["--force-dark-mode"] * (scheme == "dark") + ["--dump-dom", together.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=200)
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    seen = [json.loads(match[1]) for line in console if (match := re.search(r'"seen:(\{.*\})", source:', line))]
    assert len(console) == len(seen), "\n".join(console)  # an error among them
    assert sorted((one["page"], one["width"]) for one in seen) == sorted(frames)
    assert [one for one in seen if one["overflow"] > 0 or one["broken"]] == []
    assert all((sum(one["background"]) < 300) == (scheme == "dark") for one in seen)
    for home in (one for one in seen if one["page"] == "index.probed.html"):
        assert any(link.startswith("errors.html") for link in home["found"])
