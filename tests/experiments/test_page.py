"""The page to mail: complete in one file, safe whatever a model wrote, and readable on a phone and in the dark."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from experiments import report
from experiments.common.changes import Example, change
from experiments.plotting.page import Content, page, shown_examples
from experiments.plotting.picture import BLUE, GRAY, GREEN, ORANGE
from experiments.report import ReportError, page_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "img"}


class Elements(HTMLParser):
    """The elements of a page; every one must be closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self._open = [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def answers(score, text):
    return [
        {"id": i, "mode": "greedy", "question": f"question {i}", "answer": "<b>4</b>", "completion": f"{text} {i}"}
        | {"strict": float(score(i)), "lenient": 1.0}
        for i in range(40)
    ]


@pytest.fixture
def text(finished):
    return page(page_of(finished.workdir))


def test_a_page_is_one_file_without_a_script(text, finished):
    elements = Elements(text).found
    assert not [tag for tag, _ in elements if tag in ("script", "link", "iframe", "object", "form")]
    pictures = [attrs["aria-label"] for tag, attrs in elements if tag == "svg"]
    assert len(pictures) == 5 and "reward" in pictures[0] and "seconds" in pictures[4]
    assert not re.search(r"https?://|url\((?!#p\d-\d+\))|<img|data:", text), "nothing is loaded from elsewhere"
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert len(set(ids)) == len(ids) and used and set(used) <= set(ids), "no picture takes a part of another one"
    for word in ("tiny: 8 trained numbers", "5 steps", "adapter.u = 2", "tinylora_jax = ", "jax = ", "McNemar"):
        assert word in text, word


def test_pictures_take_every_colour_from_the_page(text):
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    fixed = set(re.findall(r"#[0-9a-f]{6}\b", drawn))
    assert fixed <= {GRAY}, "a colour that is not a variable would be the same on a light and on a dark page"
    for name in set(re.findall(r"var\((--\w+)\)", drawn)):
        light, dark = re.findall(rf"{name}: (#[0-9a-f]+);", text)
        assert light != dark, name


def brightness(color):
    return sum(share * int(color[at : at + 2], 16) / 255 for share, at in ((0.299, 1), (0.587, 3), (0.114, 5)))


def test_series_differ_without_colours():
    greys = sorted(map(brightness, (BLUE, ORANGE, GREEN)))
    assert min(np.diff([0.0, *greys, 1.0])) > 0.15


def test_what_a_model_wrote_cannot_change_the_page():
    hostile = '<script>alert("1")</script> \x1b[2J \udcff &amp; ' + "x" * 3000
    found = change(answers(lambda i: i % 2, hostile), answers(lambda i: 1, hostile))
    text = page(Content(f"a {hostile}", "", found, config={"field": hostile}))
    assert "script" not in {tag for tag, _ in Elements(text).found} and "\x1b" not in text
    assert text.encode("utf-8") and text.count("&lt;b&gt;4&lt;/b&gt;") == 20, "twenty answers"


def test_fixed_come_first_and_broken_next():
    found = change(answers(lambda i: i >= 20, "before"), answers(lambda i: i < 30, "after"))
    shown = [name for name, _ in shown_examples(found)]
    assert len(found.fixed) == 20 and len(found.broken) == 10 and shown == ["fixed"] * 14 + ["broken"] * 6
    only = change(answers(lambda i: False, "before"), answers(lambda i: i < 3, "after"))
    assert [name for name, _ in shown_examples(only)] == ["fixed"] * 3
    assert isinstance(shown_examples(only)[0][1], Example)


def test_the_command_writes_it(finished, tmp_path, monkeypatch, capsys):
    values = {
        "runs": [f"RL:{finished.workdir}"],
        "redraw": None,
        "output": None,
        "html": str(tmp_path / "new" / "a.html"),
    }
    target = tmp_path / "new" / "a.html"
    monkeypatch.setattr(report, "FLAGS", type("Flags", (), values))
    report.main([])
    assert str(target) in capsys.readouterr().out
    assert target.read_text().startswith("<!doctype html>")
    for changes, said in (({"runs": []}, "set --runs once"), ({"html": "a.txt"}, "ends in .html")):
        monkeypatch.setattr(report, "FLAGS", type("Flags", (), values | changes))
        with pytest.raises(SystemExit):
            report.main([])
        assert said in capsys.readouterr().err


def test_a_folder_without_a_result_is_named(tmp_path):
    with pytest.raises(ReportError, match="summary.json is missing"):
        page_of(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_a_browser_shows_it(text, tmp_path, width, dark):
    (tmp_path / "page.html").write_text(text)
    # A frame as wide as the device: Chromium's own windows have at least 500 pixels.
    frame = f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    settings = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={max(width, 500)},900",
    ]
    settings += ["--blink-settings=preferredColorScheme=0"] if dark else []
    picture = tmp_path / "page.png"
    words = [CHROMIUM, *settings, f"--screenshot={picture}", f"file://{tmp_path / 'frame.html'}"]
    subprocess.run(
        words, capture_output=True, timeout=120, check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    )
    pixels = matplotlib.image.imread(picture)[:, :width, :3]
    margin, inside = pixels[:, -6:], pixels[:, 16:-16]
    assert (np.median(pixels) < 0.3) == dark
    assert not dark or np.mean(pixels.min(axis=-1) > 0.9) < 0.1, "no picture shines on a dark page"
    assert np.ptp(margin, axis=(0, 1)).max() < 0.02, "nothing is cut off at the right"
    assert np.ptp(inside) > 0.5, "and there is something to read"
