"""The pages in a real browser: nothing fetched, nothing logged, readable at a phone's and a desk's width, accessible.

Where ``$FISTAPRUNER_AXE`` names the file ``axe.min.js`` of the npm package ``axe-core``, its rules are checked too.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import samples

from fistapruner.reporting.comparison import comparison_page
from fistapruner.reporting.page import run_page

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
PROGRAM = os.environ.get("FISTAPRUNER_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium (apt-get install chromium, or set FISTAPRUNER_CHROMIUM)"),
]

AROUND = """<!doctype html><iframe id="page" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("page"), faults = [];
frame.onload = async () => {{
  const inside = frame.contentWindow, style = () => inside.getComputedStyle(inside.document.body);
  const evaluate = (text) => inside.eval(text), found = {{faults, scheme: style().backgroundColor}};
  const size = (text) => parseFloat(inside.getComputedStyle(text).fontSize);
  const scale = (svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const types = [...inside.document.querySelectorAll("svg text")];
  found.fetched = inside.performance.getEntriesByType("resource").map((entry) => entry.name);
  found.width = inside.document.documentElement.scrollWidth;
  found.type = Math.min(...types.map((text) => size(text) * scale(text.ownerSVGElement)));
  found.accessibility = evaluate({accessibility});
  if ({axe}) {{
    evaluate({axe});
    found.axe = (await inside.axe.run()).violations.map((violation) => violation.id);
  }}
  for (const sheet of inside.document.styleSheets)
    for (const {{media}} of sheet.cssRules)
      if (media?.mediaText.includes("print")) media.mediaText = "all";
      else if (media?.mediaText.includes("screen")) media.mediaText = "not all";
  found.print = [style().backgroundColor, style().color];
  document.title = JSON.stringify(found);
}};
frame.contentWindow.addEventListener("error", (error) => faults.push(error.message));
</script>"""
"""A page around a page, which notes in its title what it sees of it."""


def seen(text: str, folder: Path, width: int, scheme: str) -> dict[str, Any]:
    """Open a page in a window of ``width`` pixels; what is seen of it."""
    axe, script = os.environ.get("FISTAPRUNER_AXE"), (Path(__file__).parent / "accessibility.js").read_text()
    scripts = {"accessibility": json.dumps(script), "axe": json.dumps(Path(axe).read_text() if axe else "")}
    (folder / "around.html").write_text(AROUND.format(page=html.escape(text), width=width, **scripts), "utf-8")
    command = [str(PROGRAM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", *(["--force-dark-mode"] if scheme == "dark" else [])]
    command += ["--dump-dom", "--virtual-time-budget=20000", (folder / "around.html").as_uri()]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", said, re.DOTALL)  # the first is that of the page around
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


PAGES = {
    "report": lambda: run_page(samples.report()),
    "recovery": lambda: run_page(samples.recovery(tasks=True)),
    "compare": lambda: comparison_page(samples.comparison()),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_page(tmp_path: Path, name: str, width: int, scheme: str) -> None:
    """Printed, it is light."""
    found = seen(PAGES[name](), tmp_path, width, scheme)
    assert (found["faults"], found["fetched"], found["accessibility"], found.get("axe", [])) == ([], [], [], [])
    assert found["width"] <= width
    assert found["type"] > 9
    assert found["print"] == ["rgb(255, 255, 255)", "rgb(22, 32, 43)"]
    assert (sum(map(int, re.findall(r"\d+", found["scheme"]))) < 200) == (scheme == "dark")
