"""A real browser without a window, to open the report in."""

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browse(page: Path, *flags: str, profile: Path) -> subprocess.CompletedProcess[str]:
    """Open a local page with `flags`, such as --dump-dom; skips the test where there is no Chromium."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs Chromium")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={profile}", "--virtual-time-budget=4000",
        *flags, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def ask(page: Path, script: str, *, width: int = 1280, folder: Path) -> list[str]:
    """Run `script` beside the page, which it sees as `page` (a window), and return what it `say`s.

    The page is `width` pixels wide.
    """
    outside = folder / "outside.html"
    outside.write_text(
        f"""<!doctype html><meta charset="utf-8"><ol></ol>
        <iframe src="{page.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe><script>
        const say = (text) => {{
          const item = document.createElement("li");
          item.textContent = text;
          document.querySelector("ol").append(item);
        }};
        document.querySelector("iframe").onload = () => {{
          const page = document.querySelector("iframe").contentWindow;
          const one = (css) => page.document.querySelector(css);
          const all = (css) => [...page.document.querySelectorAll(css)];
          try {{ {script} }} catch (error) {{ say("error: " + error); }}
        }};
        </script>""",
        encoding="utf-8",
    )
    done = browse(outside, "--dump-dom", profile=folder / "profile")
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("<ol>", 1)[1].split("</ol>", 1)[0]
    return [item.removesuffix("</li>") for item in answers.split("<li>")[1:]]
