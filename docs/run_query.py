"""Run the lines of query.md on the demo's output and write the answers below them.

make demo && python docs/run_query.py
"""

import ast
import contextlib
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

PAGE = Path(__file__).with_name("query.md")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def run_blocks(text: str, variables: dict[str, Any]) -> list[tuple[str, str]]:
    """Each Python block of the page, and what it prints; as in a notebook, a last expression is printed."""
    return [(match[1], run_block(match[1], variables)) for match in BLOCK.finditer(text)]


def run_block(code: str, variables: dict[str, Any]) -> str:
    """Run one block in `variables` and return what it prints."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "query.md", "exec"), variables)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "query.md", "eval"), variables)
            if value is not None:
                print(value)
    return printed.getvalue()


def compress_shards(shards: Path, folder: Path) -> None:
    """Copy tar shards with every photograph as a JPEG of quality 5, under its old name."""
    folder.mkdir(exist_ok=True)
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(folder / path.name, "w") as new:
            for member in old:
                data = old.extractfile(member).read()  # type: ignore[union-attr]
                with contextlib.suppress(OSError):  # the damaged one stays as it is
                    buffer = io.BytesIO()
                    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "JPEG", quality=5)
                    data = buffer.getvalue()
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))


def main() -> None:
    """Make the second run, run all lines, rewrite the page."""
    demo = Path("demo-output")
    compress_shards(demo / "shards", demo / "compressed-shards")
    command = [sys.executable, "jobs/infer.py", "--input", f"{demo}/compressed-shards"]
    command += ["--output", f"{demo}/compressed", "--overwrite", "--max-failed-fraction", "0.5"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    variables: dict[str, Any] = {}

    def answered(match: re.Match[str]) -> str:
        answer = run_block(match[1], variables).rstrip()
        return f"```python\n{match[1]}```\n" + (f"\n```text\n{answer}\n```\n" if answer else "")

    PAGE.write_text(BLOCK.sub(answered, PAGE.read_text()))


if __name__ == "__main__":
    main()
