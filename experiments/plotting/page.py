"""One HTML page of a finished run or sweep, to mail: without a script or another file."""

from __future__ import annotations

import html
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from experiments.common.changes import Change, Example, interval, printable
from experiments.common.wording import counted, p_value, percent, points
from experiments.plotting.inline import svg, variables
from tinylora_jax import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ANSWERS = 20  # largest number of questions with their answers
_BROKEN = 6  # of them, the number that is kept for questions that were broken
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
_STYLE = f"""
:root {{ color-scheme: light dark; --page: #fff; --text: #1b1d21; --soft: #5c6370; --line: #d9dce1; --card: #f5f6f8;
  --good: #17683a; --bad: #9c2b21; {variables(dark=False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #16181c; --text: #e6e8ec; --soft: #a2a9b5; --line: #353a43;
  --card: #1f2228; --good: #6fd39b; --bad: #f0938a; {variables(dark=True)} }} }}
"""
_STYLE += """* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p.soft, figcaption, .soft { color: var(--soft); }
.headline { font-size: 2rem; line-height: 1.2; margin: 1rem 0 .25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; fill: var(--ink); }
.wide svg { min-width: 34rem; }
article { background: var(--card); border-radius: 6px; padding: .75rem 1rem; margin: .75rem 0; }
article h3 { font-size: 1rem; margin: 0 0 .5rem; font-weight: 600; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair h4 { margin: 0; font-size: .85rem; color: var(--soft); font-weight: 600; }
pre { margin: .25rem 0 0; white-space: pre-wrap; font: 14px/1.45 ui-monospace, monospace; }
.fixed { color: var(--good); } .broken { color: var(--bad); }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } .headline { font-size: 1.6rem; }
  table { font-size: .8rem; } th, td { padding: .3rem .2rem; } th { white-space: normal; }
  th:first-child, td:first-child { min-width: 0; } }
"""


@dataclass(frozen=True)
class Content:
    """What a page shows.

    Attributes:
      title: model and what was trained.
      about: further facts of the run, such as steps and minutes.
      change: difference between the untrained and the trained model; None if it cannot be computed.
      pictures: titles and pictures of the training.
      members: head and rows of the table of a sweep's members; empty for a run.
      config: fields of the config, by name.
      changed: fields that differ from the defaults, by name.
    """

    title: str
    about: str
    change: Change | None
    pictures: Sequence[tuple[str, Figure]] = ()
    members: Sequence[Sequence[str]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=dict)


def page(content: Content) -> str:
    """Writes the page."""
    title = _text(content.title)
    parts = [f"<h1>{title}</h1>", f'<p class="soft">{_text(content.about)}</p>']
    parts += _headline(content.change) if content.change else []
    parts += _pictures(content.pictures) if content.pictures else []
    if content.members:
        parts += ["<h2>Members, the best first</h2>", _table(content.members)]
        parts.append('<p class="soft">Gain: points over the untrained model, by a paired test of greedy answers.</p>')
    parts += _answers(content.change) if content.change else []
    parts += ["<h2>Settings that differ from the defaults</h2>", _fields(content.changed)]
    parts += [f"<details><summary>All settings</summary>{_fields(content.config)}</details>"]
    parts += ["<h2>Versions</h2>", _fields(versions()), '<p class="soft">of the program that wrote this page</p>']
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def versions() -> dict[str, str]:
    """The versions of Python, this library and the packages that affect results."""
    found = {"Python": platform.python_version(), "tinylora_jax": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def shown_examples(change: Change) -> list[tuple[str, Example]]:
    """The questions on the page with what happened to each: those that were fixed first, then those that were broken.

    >>> from experiments.common.changes import Example
    >>> one = Example("q", "1", "2", "1")
    >>> [name for name, _ in shown_examples(Change(9, {}, {}, {}, (one,) * 3, (one,)))]
    ['fixed', 'fixed', 'fixed', 'broken']
    """
    broken = change.broken[: max(_BROKEN, _ANSWERS - len(change.fixed))]
    fixed = change.fixed[: _ANSWERS - len(broken)]
    return [("fixed", each) for each in fixed] + [("broken", each) for each in broken]


def _text(value: object) -> str:
    """Escapes text for HTML; control codes become visible."""
    return html.escape(printable(str(value).encode("utf-8", "replace").decode()))


def _headline(change: Change) -> list[str]:
    strict = change.differences["strict"]
    before, after = (percent(each["strict"]) for each in (change.before, change.after))
    counts = f"{len(change.fixed)} fixed, {len(change.broken)} broken"
    rows = [["", "before", "after", "gain, points", "95 % interval", "p"]]
    for name, each in change.differences.items():
        moved = [
            points(each.value),
            interval(each.low, each.high),
            p_value(each.p).removeprefix("p = ").removeprefix("p "),
        ]
        rows.append([name, percent(change.before[name]), percent(change.after[name]), *moved])
    return [
        f'<p class="headline">{before} → {after}</p>',
        f"<p>Strict accuracy of greedy answers to {counted(change.questions, 'question')}, before and after training:"
        f" {points(strict.value)} points, {_text(p_value(strict.p))}; {counts}.</p>",
        _table(rows),
        f'<p class="soft">Strict: right, and in the requested format. Lenient: the last number is right.'
        f" Test of the same questions: {_text(strict.test)}.</p>",
    ]


def _pictures(pictures: Sequence[tuple[str, Figure]]) -> list[str]:
    """The panels of a run, as many beside each other as fit; a single picture is wide, and scrolls on a phone."""
    found = [
        f"<figure><figcaption>{_text(title)}</figcaption>{svg(figure, title, f'p{place}-')}</figure>"
        for place, (title, figure) in enumerate(pictures)
    ]
    kind = "panels" if len(found) > 1 else "wide scroll"
    return ["<h2>Training</h2>", f'<div class="{kind}">', *found, "</div>"]


def _answers(change: Change) -> list[str]:
    shown = shown_examples(change)
    if not shown:
        return ["<h2>Answers</h2>", "<p>No answer became right or wrong.</p>"]
    parts = ["<h2>Answers before and after</h2>"]
    for name, each in shown:
        pair = "".join(
            f"<div><h4>{head}</h4><pre>{_text(text.strip())}</pre></div>"
            for head, text in (("before", each.before), ("after", each.after))
        )
        head = f'<h3><span class="{name}">{name}</span> · {_text(each.question)}</h3>'
        gold = f'<p class="soft">expected: {_text(each.answer)}</p>'
        parts.append(f'<article>{head}{gold}<div class="pair">{pair}</div></article>')
    return parts


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{cells(rows[0], "th")}</tr>{body}</table></div>'


def _fields(values: Mapping[str, Any]) -> str:
    lines: Iterable[str] = (f"{name} = {value}" for name, value in values.items())
    return f"<pre>{_text(chr(10).join(lines) or 'none')}</pre>"
