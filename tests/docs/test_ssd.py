import doctest
import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_examples_of_the_page_hold():
    failed, tried = doctest.testfile(str(DOCS / "ssd.md"), module_relative=False)

    assert tried == 3
    assert failed == 0


def test_every_file_that_the_page_names_is_there():
    links = re.findall(r"\]\(([^)#]+)", (DOCS / "ssd.md").read_text())
    files = [link for link in links if not link.startswith("http")]

    assert len(files) > 10
    for file in files:
        assert (DOCS / file).exists(), file
