import json
import re

import pytest
from PIL import Image

from pipeline.gallery.page import report_page
from tests.gallery.browser import ask, browse
from tests.makers import make_jpeg, make_tar_shard
from tests.outputs import MODEL, box, failed_image, image, write_part

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)> ünï 猫 {{data}}"


def photograph(name, shard, index, num_boxes, size):
    row = image(f"in.tar/{name}", num_boxes, uri=f"tar://{name}::{shard}", shard="in.tar", shard_index=index)
    return row | {"shard_size": size, "width": 64, "height": 48}


def place(name, class_name, score, **changes):
    box_ = {"xmin": 16, "ymin": 12, "xmax": 48, "ymax": 36, "image_width": 64, "image_height": 48}
    return box(f"in.tar/{name}", class_name, score, **box_) | changes


def write_run(folder, boxes_by_image, *, failed=(), model=None):
    """Photographs in a tar and the output of a run on them."""
    shard = make_tar_shard(
        folder / "in.tar", {name: make_jpeg(seed=i) for i, name in enumerate(boxes_by_image)}
    )
    rows = [
        photograph(name, shard, i, len(boxes), len(boxes_by_image))
        for i, (name, boxes) in enumerate(boxes_by_image.items())
    ]
    write_part(
        folder / "out", "p", [*rows, *failed], [b for bs in boxes_by_image.values() for b in bs], model=model
    )
    return str(folder / "out")


@pytest.fixture
def run(tmp_path):
    """Two dogs in a.jpg, one person in b.jpg, nothing in c.jpg, and a file that failed."""
    boxes = {
        "a.jpg": [place("a.jpg", "dog", 0.9), place("a.jpg", "dog", 0.4, detection_id=1)],
        "b.jpg": [place("b.jpg", "person", 0.8)],
        "c.jpg": [],
    }
    return write_run(tmp_path, boxes, failed=[failed_image("in.tar/d.jpg")])


def write_page(folder, page):
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def as_script(text):
    """A string for a script inside HTML."""
    return json.dumps(text).replace("<", "\\u003c")


COUNTS = "say(one('#count').textContent);"


def test_the_page_shows_counts_classes_and_failures(run):
    page = report_page(run)
    text = re.sub(r"<[^>]+>", " ", page.split("<script", 1)[0])
    for part in ("4 images", "3 detections", "2 classes found", "1 failed", "UnidentifiedImageError"):
        assert part in " ".join(text.split())
    assert "in.tar/d.jpg" in text
    assert "http" not in page.replace("http-equiv", "")  # nothing comes from the network


def test_the_same_run_gives_the_same_page(run):
    assert report_page(run) == report_page(run)


def test_the_gallery_is_filtered_by_class_and_score(run, tmp_path):
    page = write_page(tmp_path, report_page(run))
    said = ask(
        page,
        COUNTS
        + "one('#class').value = [...one('#class').options].find((o) => o.text === 'dog').value;"
        + "one('#class').dispatchEvent(new page.Event('change'));"
        + COUNTS
        + "one('#score').value = 0.5; one('#score').dispatchEvent(new page.Event('input'));"
        + COUNTS
        + "say(all('#gallery .tag').map((tag) => tag.textContent).join()); say(page.location.hash);",
        folder=tmp_path,
    )
    assert said == [
        "2 of 2 images, 3 boxes",
        "1 of 2 images, 2 boxes",
        "1 of 2 images, 1 boxes",
        "dog 0.90",
        "#class=dog&amp;score=0.5",
    ]


def test_a_box_lies_where_it_is_in_the_photograph(run, tmp_path):
    said = ask(
        write_page(tmp_path, report_page(run)),
        "const p = one('.photo').getBoundingClientRect(), b = one('.box').getBoundingClientRect();"
        "say([(b.left - p.left) / p.width, (b.top - p.top) / p.height]"
        ".concat([b.width / p.width, b.height / p.height]).map((x) => x.toFixed(2)).join());"
        "say(one('.photo img').naturalWidth);",
        folder=tmp_path,
    )
    assert said == ["0.25,0.25,0.50,0.50", "64"]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out_on_a_phone_or_a_desk(run, tmp_path, width):
    said = ask(
        write_page(tmp_path, report_page(run)),
        "const root = page.document.documentElement; say(root.scrollWidth <= root.clientWidth);"
        "say(all('figure.card').length);",
        width=width,
        folder=tmp_path,
    )
    assert said == ["true", "2"]


def test_a_photograph_opens_large_and_closes(run, tmp_path):
    said = ask(
        write_page(tmp_path, report_page(run)),
        "one('figure.card').click(); say(one('dialog').open); say(all('dialog .box').length);"
        "one('dialog').click(); say(one('dialog').open);",
        folder=tmp_path,
    )
    assert said == ["true", "2", "false"]


def test_hostile_names_of_files_classes_and_folders_stay_text(tmp_path):
    boxes = {"a.jpg": [place("a.jpg", HOSTILE, 0.9) | {"image_id": f"in.tar/{HOSTILE}"}]}
    row = image(f"in.tar/{HOSTILE}", 1, width=64, height=48, shard="in.tar", shard_size=1)
    shard = make_tar_shard(tmp_path / "in.tar", {"a.jpg": make_jpeg()})
    failed = failed_image(HOSTILE, error_type=HOSTILE, error_message=HOSTILE)
    model = MODEL | {"architecture": HOSTILE, "class_names": [HOSTILE]}
    write_part(tmp_path / HOSTILE.replace("/", "_"), "p", [row | {"uri": f"tar://a.jpg::{shard}"}, failed],
               boxes["a.jpg"], model=model)  # fmt: skip
    page = write_page(tmp_path, report_page(str(tmp_path / HOSTILE.replace("/", "_"))))
    said = ask(
        page,
        "say(page.document.title.includes('ünï 猫')); say(page.document.scripts.length);"
        "say(all('img').length); say(one('.tag').textContent === " + as_script(HOSTILE + " 0.90") + ");"
        "say(one('figcaption').textContent.endsWith('{{data}}')); say(one('#count').textContent);",
        folder=tmp_path,
    )
    assert said == ["true", "2", "1", "true", "true", "1 of 1 images, 1 boxes"]


def test_what_changed_against_another_run_is_shown(run, tmp_path):
    old = write_run(
        tmp_path / "old",
        {"a.jpg": [place("a.jpg", "dog", 0.9)], "b.jpg": [], "c.jpg": [place("c.jpg", "cat", 0.7)]},
    )
    said = ask(
        write_page(tmp_path, report_page(run, baseline=old)),
        "say(all('#changes .tag').map((tag) => tag.textContent).sort().join());"
        "say(all('#changes .box.lost').length);",
        folder=tmp_path,
    )
    assert said == ["+ person 0.80,− cat 0.70", "1"]


@pytest.mark.parametrize("case", ["no images", "no boxes", "one class", "a thousand classes", "gone input"])
def test_extreme_runs_still_make_a_page(tmp_path, case):
    names = {"one class": ["dog"], "a thousand classes": [f"class {k} 猫" for k in range(1000)]}.get(case, [])
    boxes = {"a.jpg": [place("a.jpg", name, 0.9, detection_id=k) for k, name in enumerate(names)]}
    output = write_run(tmp_path, {} if case == "no images" else boxes, model={})
    if case == "gone input":
        (tmp_path / "in.tar").unlink()
    page = report_page(output)
    assert ("could not be read again" in page) == (case == "gone input")
    expected = {"no images": "0 of 0 images, 0 boxes", "gone input": "0 of 0 images, 0 boxes",
                "no boxes": "1 of 1 images, 0 boxes", "one class": "1 of 1 images, 1 boxes"}  # fmt: skip
    said = ask(write_page(tmp_path, page), COUNTS + "say(all('#class option').length);", folder=tmp_path)
    assert said[0] == expected.get(case, "1 of 1 images, 100 boxes")


def test_the_page_is_drawn(run, tmp_path):
    page = write_page(tmp_path, report_page(run))
    browse(page, f"--screenshot={tmp_path}/shot.png", "--window-size=800,900", profile=tmp_path / "profile")
    with Image.open(tmp_path / "shot.png") as picture:
        colors = picture.convert("RGB").getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 500
