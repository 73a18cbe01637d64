"""The results of a benchmark as `results.json`, `results.csv` and `report.html`, a page that needs no
other file."""

import base64
import csv
import io
import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageOps

from customize.app.bench.plot import ARROWS, KINDS, numbers, scatter
from customize.files import atomic_file, write_text
from customize.metrics.scores import confidence_interval

COLOURS = (
    "#2f6fb3",
    "#c8591d",
    "#2a8a62",
    "#98479a",
    "#a8811a",
    "#c03f58",
    "#3a8fa3",
    "#6f62c4",
    "#7d6348",
    "#6c8a2b",
)
GREYS = {"base": "#80858d", "real": "#565c65"}
MISSING = "–"
SIDE = 256  # pixels of an embedded photograph's longer side
STRIP_PROMPTS = 2

READ = """Arrows say which way is better, the best method of a column is bold, and shaded rows are marks to compare with."""
MEANS = """Each number is the mean over the subjects and under it the 95 % interval of that mean (bootstrap over subjects)."""
CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #22262b; --soft: #666d76; --line: #e2e4e7;
  --shade: #f2f3f5 }
@media (prefers-color-scheme: dark) { .plot { filter: invert(1) hue-rotate(180deg) } .dot, .bar i { filter: brightness(1.25) }
  :root { --page: #16181b; --card: #1d2024; --ink: #e4e6e9; --soft: #9aa1aa; --line: #33373d; --shade: #25292e } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 1500px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2 } h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem } p { max-width: 75ch; margin: .5rem 0 .8rem }
nav a { margin-right: 1rem; color: light-dark(#2f6fb3, #86b4e6); text-decoration: none; white-space: nowrap }
small, .note, figcaption, .pair > span, .strip th, q { color: var(--soft); font-size: .82rem; font-weight: 400 }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; overflow-wrap: normal; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .5rem; text-align: right; vertical-align: top; border-top: 1px solid var(--line) }
thead th { border-top: 0; color: var(--soft); font-size: .8rem; line-height: 1.3; vertical-align: bottom }
th:first-child, .strip td:first-child { position: sticky; left: 0; z-index: 1; background: var(--card) }
th:first-child { min-width: 10.5rem; text-align: left } abbr { text-decoration: none }
td { white-space: nowrap } td small { display: block } .words { white-space: normal; text-align: left; min-width: 14rem }
tr.base > *, tr.real > * { background: var(--shade) !important; color: var(--soft) }
tr.method + tr:not(.method) > * { border-top: 2px solid var(--soft) }
.name { display: inline-flex; gap: .5em; align-items: baseline; text-align: left }
.dot { flex: none; width: .6em; height: .6em; border-radius: 50% } .dot.base, .dot.real { border-radius: 1px }
.bar { display: block; width: 3.6rem; margin: .25rem 0 .1rem auto; border-radius: 3px; background: var(--line) }
.bar i { display: block; height: 5px; border-radius: 3px }
details { margin: .75rem 0 } summary { cursor: pointer; padding: .2rem 0 }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: center } .side p { flex: 1 1 16rem }
.plot { width: 100%; max-width: 620px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: .9rem }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem .6rem } figcaption { margin-top: .5rem }
figcaption q { display: block; color: var(--ink) } .some { display: grid; grid-template-columns: 1fr 1fr; gap: 3px }
.tile { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px }
.gone { display: grid; place-items: center; padding: .25rem; border: 1px dashed var(--soft); overflow: hidden;
  white-space: normal; text-align: center; font-size: .7rem; line-height: 1.25; color: var(--soft) }
.strip { table-layout: fixed } .strip td, .strip th { min-width: 0; padding: .3rem; border: 0; text-align: left }
.strip thead th { padding-top: .6rem } .strip .said td { padding-bottom: 0 } .said q { position: sticky; left: .3rem }
dl { display: grid; grid-template-columns: minmax(7rem, 14rem) 1fr; gap: .45rem 1.25rem; margin: 0; max-width: 85ch }
dt { font-weight: 600 } dd { margin: 0 }
@media (max-width: 560px) { body { padding: 1.5rem 1rem 3rem } th, td { padding: .45rem .6rem }
  th:first-child { min-width: 7.5rem } dl { display: block } dd { margin: 0 0 .6rem } }
"""


def write_report(results: dict, folder: Path) -> Path:
    """Writes the numbers (JSON and CSV) and the page into `folder`, to which the images' paths are
    relative; returns the page."""
    results = json.loads(
        json.dumps(results), parse_constant=lambda _: None
    )  # NaN is no JSON, and means missing
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    with (
        atomic_file(folder / "results.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows([("method", "subject", "group", "metric", "value"), *_rows(results)])
    page = folder / "report.html"
    write_text(page, render(results, folder))
    return page


def render(results: dict, folder: Path) -> str:
    """The HTML of the page, with all images embedded."""
    ordered = sorted(results["methods"], key=lambda method: list(KINDS).index(method["kind"]))
    colours = [GREYS.get(method["kind"], COLOURS[i % len(COLOURS)]) for i, method in enumerate(ordered)]
    results = results | {
        "methods": [m | {"colour": colour} for m, colour in zip(ordered, colours, strict=True)]
    }
    sections = {
        "Scores": score_tables(results),
        "Subject fidelity against prompt fidelity": plot_section(results),
        "Prompt fidelity by factor": means_table(results["methods"], "factors", "percent"),
        "Cost": means_table(results["methods"], "cost", "amount"),
        "Best, median and worst images": extremes(results, folder),
        "Subject by subject": strips(results, folder),
        "Published numbers (other protocols: do not compare closely)": published_table(results),
        "What the metrics mean": definitions(
            {m["title"] + ARROWS[m["better"]]: m["about"] for m in results["metrics"].values()}
        ),
        "Protocol": definitions(results["protocol"]),
    }
    present = [(f"s{i}", title, body) for i, (title, body) in enumerate(sections.items()) if body]
    links = "".join(f'<a href="#{key}">{escape(title.split(" (")[0])}</a>' for key, title, _ in present)
    bodies = "\n".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>\n{body}</section>' for key, title, body in present
    )
    title = escape(results["title"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{CSS}</style></head>
<body><h1>{title}</h1><p>{MEANS if several(results) else ""} {READ}</p><nav>{links}</nav>
{bodies}
</body></html>
"""


def several(results: dict) -> bool:
    """Whether there is more than one subject, so that means and intervals make sense."""
    return any(len(method["subjects"]) > 1 for method in results["methods"])


def score_tables(results: dict) -> str:
    """Methods against metrics, over all subjects and, where there are several groups, over each group."""
    groups: dict[str, set[str]] = {}
    for subject in (s for method in results["methods"] for s in method["subjects"]):
        groups.setdefault(subject["group"], set()).add(subject["name"])
    parts = [
        f"<details><summary>{escape(group)} ({len(names)} of {len(set().union(*groups.values()))} "
        "subjects)</summary>"
        f"{score_table(results, group)}</details>"
        for group, names in groups.items()
    ]
    return score_table(results) + "\n".join(parts if len(parts) > 1 else [])


def score_table(results: dict, group: str | None = None) -> str:
    """Mean and interval of every method and metric over the subjects (of one group); the best method is
    bold."""
    metrics, methods = results["metrics"], results["methods"]
    best = {name: _best(methods, name, metric, group) for name, metric in metrics.items()}

    def cell(method: dict, name: str) -> str:
        values, style = numbers(method, "scores", name, group), metrics[name]["style"]
        text = shown(fmean(values), style) if values else MISSING
        text = f"<b>{text}</b>" if method["kind"] == "method" and text == best[name] else text
        total = sum(group in (None, subject["group"]) for subject in method["subjects"])
        partial = f"<small>{len(values)} of {total} subjects</small>" if 0 < len(values) < total else ""
        return text + _interval(values, style) + partial

    return _table(
        {n: f'<abbr title="{escape(m["about"])}">{_heading(m)}</abbr>' for n, m in metrics.items()},
        methods,
        cell,
    )


def shown(value: float | None, style: str = "number") -> str:
    """A number as the page prints it: "percent", "number" (three decimals) or "amount" (three digits)."""
    if value is None:
        return MISSING
    amount = f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    text = {"percent": f"{100 * value:z.0f} %", "number": f"{value:z.3f}", "amount": amount}[style]
    return text.replace("-", "−")


def means_table(methods: list[dict], part: str, style: str) -> str:
    """Means of the factors or of the costs; a percentage has a bar, so that a factor compares down its
    column."""

    def cell(method: dict, name: str) -> str:
        if not (values := numbers(method, part, name)):
            return MISSING
        width = 100 * min(max(fmean(values), 0), 1)
        bar = f'<span class="bar"><i style="width:{width:.0f}%;background:{method["colour"]}"></i></span>'
        return shown(fmean(values), style) + (bar if style == "percent" else "")

    names = dict.fromkeys(
        n for method in methods for subject in method["subjects"] for n in subject.get(part, {})
    )
    return _table({name: escape(name) for name in names}, methods, cell)


def published_table(results: dict) -> str:
    """Published numbers, in a table of their own."""
    rows, metrics = results.get("published", []), results["metrics"]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    heads = {name: _heading(metrics[name]) if name in metrics else escape(name) for name in names}

    def cell(row: dict, name: str) -> str:
        if name == "":
            return f'<div class="words">{escape(row.get("protocol", ""))}</div>'
        return shown(row["scores"].get(name), metrics.get(name, {"style": "number"})["style"])

    return _table(heads | {"": '<div class="words">protocol</div>'}, rows, cell) if rows else ""


def plot_section(results: dict) -> str:
    """The scatter plot and the words to read it."""
    x, y = (results["metrics"][name] for name in results["axes"])
    if (drawing := scatter(results)) is None:
        return ""
    across = (
        f"Across: <b>{_heading(x)}</b>, {escape(x['about'])}. Up: <b>{_heading(y)}</b>, {escape(y['about'])}."
    )
    return f"""<div class="side"><img class="plot" src="{_uri(drawing, "image/svg+xml")}" alt="scatter plot of the methods">
<p class="note">{across}{" Bars are 95 % intervals over subjects." if several(results) else ""}</p></div>"""


def extremes(results: dict, folder: Path) -> str:
    """For each method its best, median and worst image, each beside the subject's references."""
    parts = []
    for method in results["methods"]:
        if method["kind"] == "method" and (chosen := picks(method, results["axes"])):
            cards = "\n".join(_card(results, folder, *choice) for choice in chosen)
            parts.append(f'<h3>{_name(method)}</h3><div class="cards">{cards}</div>')
    x, y = (escape(results["metrics"][name]["title"]) for name in results["axes"])
    note = f'<p class="note">Of all images of a method, ranked by {x} × {y}; references on the left.</p>'
    return note + "\n".join(parts) if parts else ""


def picks(method: dict, axes: list[str]) -> list[tuple[str, dict, dict]]:
    """Best, median and worst image with its subject, by the product of the two axes' scores."""
    images = [(subject, image) for subject in method["subjects"] for image in subject["images"]]
    ranked = [pair for pair in images if all(pair[1]["scores"].get(name) is not None for name in axes)]
    ranked.sort(key=lambda pair: math.prod(pair[1]["scores"][name] for name in axes), reverse=True)
    last = len(ranked) - 1
    places = {(last + 1) // 2: "median", last: "worst", 0: "best"} if ranked else {}
    return [(name, *ranked[place]) for place, name in sorted(places.items())]


def _card(results: dict, folder: Path, name: str, subject: dict, image: dict) -> str:
    metrics = results["metrics"]
    scores = [
        f"{escape(metrics[n]['title'])} {shown(v, metrics[n]['style'])}"
        for n, v in image["scores"].items()
        if n in metrics
    ]
    references = [
        _image(folder, file, f"reference of {subject['label']}") for file in subject["references"][:4]
    ]
    left = f'<div class="some">{"".join(references)}</div>' if len(references) > 1 else "".join(references)
    return f"""<figure><div class="pair"><span>{escape(subject["label"])}</span><span>{name}</span>
<div>{left}</div><div>{_image(folder, image["file"], image["prompt"])}</div></div>
<figcaption><q>{escape(image["prompt"])}</q>{" · ".join(scores)}</figcaption></figure>"""


def strips(results: dict, folder: Path) -> str:
    """For each subject what every method drew for the same prompts, references at the left."""
    drawn: dict[str, list[tuple[dict, dict]]] = {}
    for method in results["methods"]:
        for subject in method["subjects"]:
            drawn.setdefault(subject["name"], []).append((method, subject))
    return "\n".join(
        _strip(pairs, folder) for pairs in drawn.values() if any(subject["images"] for _, subject in pairs)
    )


def _strip(pairs: list[tuple[dict, dict]], folder: Path) -> str:
    # methods name the subject by words of their own, so prompts pair by their order and not by their text
    firsts = [
        list({p["prompt"]: p for p in reversed(s["images"])}.values())[::-1][:STRIP_PROMPTS] for _, s in pairs
    ]
    references = next((subject["references"] for _, subject in pairs if subject["references"]), [""])
    rows = []
    for k in range(max(map(len, firsts))):
        cells = [first[k] if k < len(first) else {"file": "", "prompt": ""} for first in firsts]
        cells.insert(0, {"file": references[k % len(references)], "prompt": ""})
        said = next(cell["prompt"] for cell in cells if cell["prompt"])
        tiles = "".join(f"<td>{_image(folder, cell['file'], cell['prompt'])}</td>" for cell in cells)
        rows.append(
            f'<tr class="said"><td colspan="{len(cells)}"><q>{escape(said)}</q></td></tr><tr>{tiles}</tr>'
        )
    heads = "".join(f'<th scope="col">{_name(method)}</th>' for method, _ in pairs)
    title = f"{escape(pairs[0][1]['label'])} <small>{escape(pairs[0][1]['group'])}</small>"
    return f"""<h3>{title}</h3><div class="scroll"><table class="strip" style="min-width:{6.5 * len(pairs) + 6.5}rem">
<thead><tr><th>reference</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>"""


def definitions(texts: dict[str, str]) -> str:
    """Names and what they mean."""
    return (
        f"<dl>{''.join(f'<dt>{escape(n)}</dt><dd>{escape(str(t))}</dd>' for n, t in texts.items())}</dl>"
        if texts
        else ""
    )


def _rows(results: dict) -> list[tuple]:
    return [
        (method["name"], subject["name"], subject["group"], name, subject["scores"].get(name))
        for method in results["methods"]
        for subject in method["subjects"]
        for name in results["metrics"]
    ]


def _table(heads: dict[str, str], rows: list[dict], cell: Callable[[dict, str], str]) -> str:
    """A row a method, in a container that scrolls by itself; heads and cells are HTML."""
    if not heads:
        return ""
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads.values())
    lines = []
    for row in rows:
        cells = "".join(f"<td>{cell(row, name)}</td>" for name in heads)
        lines.append(f'<tr class="{row.get("kind", "")}"><th scope="row">{_name(row)}</th>{cells}</tr>')
    return f"""<div class="scroll"><table><thead><tr><th></th>{columns}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>"""


def _best(methods: list[dict], name: str, metric: dict, group: str | None) -> str | None:
    """The best mean as it is printed; methods that print alike are all bold, and a single method is not."""
    values = [numbers(method, "scores", name, group) for method in methods if method["kind"] == "method"]
    means = [fmean(some) for some in values if some]
    if len(means) < 2 or not metric["better"]:
        return None
    return shown(max(means) if metric["better"] == "higher" else min(means), metric["style"])


def _interval(values: list[float], style: str) -> str:
    if len(values) < 2:
        return ""
    low, high = confidence_interval(values)
    return f"<small>{shown(low, style).removesuffix(' %')} to {shown(high, style).removesuffix(' %')}</small>"


def _heading(metric: dict) -> str:
    return escape(metric["title"]) + ARROWS[metric["better"]]


def _name(row: dict) -> str:
    dot = f'<i class="dot {row["kind"]}" style="background:{row["colour"]}"></i>' if "colour" in row else ""
    return f'<span class="name">{dot}<span>{escape(row["label"])}</span></span>'


def _image(folder: Path, file: str, words: str) -> str:
    """The image inside the page, or a box that says that there is none."""
    if not file:
        return f'<span class="gone tile">{MISSING}</span>'
    try:
        return f'<img class="tile" src="{_embedded(folder / file)}" alt="{escape(words)}" title="{escape(words)}">'
    except OSError:
        return f'<span class="gone tile">image missing: {escape(file)}</span>'


def _embedded(path: Path) -> str:
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    small, data = max(image.size) <= SIDE // 2, io.BytesIO()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(data, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
    return _uri(data.getvalue(), "image/png" if small else "image/jpeg")


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
