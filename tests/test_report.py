"""The benchmark's report: its numbers are the results' numbers, and the page stands alone."""

import csv
import itertools
import json
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from customize.app.bench.plot import _place_labels, scatter
from customize.app.bench.report import picks, shown, write_report
from customize.app.bench.summary import summary

METRICS = {
    "identity": {
        "title": "Identity",
        "about": "share that shows <b>it</b>",
        "better": "higher",
        "style": "percent",
    },
    "control": {"title": "Control", "about": "what is obeyed", "better": "higher", "style": "percent"},
    "copy": {"title": "Copying", "about": "too near", "better": "lower", "style": "number"},
    "spread": {"title": "Spread", "about": "neither good nor bad", "better": "", "style": "number"},
}
SCORES = {  # identity, control, copy and spread of two subjects
    "a": [(0.2, 0.9, 0.5, 0.1), (0.6, 0.7, -0.25, None)],
    "b": [(0.8, 0.5, 0.0, 0.3), (0.9, 0.5, 0.75, 0.4)],
    "base": [(0.0, 1.0, None, 0.2), (0.1, 1.0, None, 0.2)],
}


def subject(folder, method: str, index: int, **changes) -> dict:
    files = [f"{method}/{index}-{i}.png" for i in range(3)] + [f"references/{index}.png"]
    for i, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (80 * i, 10, 40 * index)).save(folder / file)
    return {
        "name": f"s{index}",
        "label": f"subject <b>{index}",
        "group": f"group <b>{index}",
        "scores": dict(zip(METRICS, SCORES[method][index], strict=True)),
        "factors": {"tint <b>": 0.25 + 0.5 * index},
        "cost": {"seconds <b>": 1000.0 + 500 * index},
        "references": files[3:],
        "images": [
            {
                "file": file,
                "prompt": f"a <b> prompt {i}",
                "scores": {"identity": 0.1 * (i + 1), "control": (1.0, 0.9, 0.1)[i]},
            }
            for i, file in enumerate(files[:3])
        ],
    } | changes


def results_of(folder, subjects: int = 2, methods=("a", "b", "base"), **changes) -> dict:
    return {
        "title": "Bench <b>",
        "protocol": {"subjects <b>": "two <b>"},
        "axes": ["control", "identity"],
        "metrics": METRICS,
        "methods": [
            {
                "name": name,
                "label": f"label <b>{name}",
                "kind": "base" if name == "base" else "method",
                "subjects": [subject(folder, name, i, **changes) for i in range(subjects)],
            }
            for name in methods
        ],
    }


def page_of(results: dict, folder) -> str:
    return write_report(results, folder).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    return re.search(rf"<h2>{re.escape(title)}.*?</section>", page, re.DOTALL)[0]


def rows(html: str) -> dict[str, list[str]]:
    """The cells of a section's first table by the row's label."""
    table = re.search(r"<tbody>(.*?)</tbody>", html, re.DOTALL)[1]
    labels = re.findall(r'<th scope="row">.*?<span>([^<]*)</span></span></th>(.*?)</tr>', table, re.DOTALL)
    return {
        label.rpartition("&gt;")[2]: re.findall(r"<td>(.*?)</td>", cells, re.DOTALL)
        for label, cells in labels
    }


def test_the_summary_is_the_table_with_intervals_and_published_rows():
    def method(label, *values):
        return {
            "label": label,
            "subjects": [{"group": "", "scores": {"dino": value, "hit": 0.5}} for value in values],
        }

    metrics = {
        "dino": {"title": "DINO", "style": "number", "about": "how alike they are"},
        "hit": {"title": "Hits", "style": "percent", "about": "how often it is right"},
    }
    published = [{"label": "Paper", "scores": {"dino": 0.668}, "protocol": "30 subjects"}]
    text = summary(
        {
            "metrics": metrics,
            "methods": [method("One", 0.25), method("Two", 0.2, 0.6)],
            "published": published,
        }
    )
    assert text.splitlines() == [
        "| | DINO | Hits |",
        "|---|---|---|",
        "| One | 0.250 | 50 % |",
        "| Two | 0.400 (0.200 to 0.600) | 50 % (50 to 50) |",
        "| *Paper* (30 subjects) | 0.668 | – |",
        "",
        "DINO: how alike they are",
        "Hits: how often it is right",
    ]


def test_the_table_shows_means_intervals_and_the_best_method(tmp_path):
    scores = rows(section(page_of(results_of(tmp_path), tmp_path), "Scores"))
    # two subjects resampled: the lower and the upper value each make a quarter of the means, so they are the
    # interval
    assert scores["a"] == [
        "40 %<small>20 to 60</small>",
        "<b>80 %</b><small>70 to 90</small>",
        "<b>0.125</b><small>−0.250 to 0.500</small>",
        "0.100<small>1 of 2 subjects</small>",
    ]
    assert scores["b"][0] == "<b>85 %</b><small>80 to 90</small>"
    assert scores["b"][2:] == ["0.375<small>0.000 to 0.750</small>", "0.350<small>0.300 to 0.400</small>"]
    assert scores["base"][1:3] == ["100 %<small>100 to 100</small>", "–"]  # the best of all, but no method


def test_every_group_has_its_own_table(tmp_path):
    groups = section(page_of(results_of(tmp_path), tmp_path), "Scores").split("<details>")[1:]
    assert [rows(group)["a"][0] for group in groups] == ["20 %", "60 %"]
    assert "<details>" not in page_of(results_of(tmp_path, group="one"), tmp_path)


def test_factors_and_costs_are_means_over_subjects(tmp_path):
    page = page_of(results_of(tmp_path), tmp_path)
    (factor,) = rows(section(page, "Prompt fidelity by factor"))["a"]
    assert factor.startswith("50 %")
    assert "width:50%" in factor
    assert rows(section(page, "Cost"))["b"] == ["1,250"]


def test_files_hold_every_score(tmp_path):
    results = results_of(tmp_path)
    results["methods"][1]["subjects"][0]["scores"]["copy"] = float("nan")
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    with (tmp_path / "results.csv").open(newline="") as file:
        listed = list(csv.reader(file))
    assert listed[0] == ["method", "subject", "group", "metric", "value"]
    assert listed[1] == ["a", "s0", "group <b>0", "identity", "0.2"]
    assert listed[11] == ["b", "s0", "group <b>0", "copy", ""]
    assert len(listed) == 1 + 3 * 2 * 4
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text)["methods"][1]["subjects"][0]["scores"] == {
        "identity": 0.8,
        "control": 0.5,
        "copy": None,
        "spread": 0.3,
    }
    assert text.startswith('{\n  "title"')


def test_the_page_stands_alone_and_escapes_every_text(tmp_path):
    results = results_of(tmp_path)
    results["published"] = [{"label": "paper <b>", "scores": {"new <b>": 0.5}, "protocol": "theirs <b>"}]
    results["methods"][0]["subjects"][0]["images"][0]["file"] = "gone <b>.png"
    page = page_of(results, tmp_path)
    assert not re.search(r"<link|<script|@import|url\(|(src|href)=[\"'](?!data:|#)", page)
    assert page.count("data:image/png;base64,") > 20
    assert "data:image/svg+xml;base64," in page
    own = re.findall(r"<b>([^<]*)</b>", page)
    assert page.count("<b>") == len(own)  # a text's own <b> would have no end
    assert [bold for bold in own if not re.fullmatch(r"−?[\d.]+( %)?", bold)] == [
        "Control\u00a0↑",
        "Identity\u00a0↑",
    ]
    assert "image missing: gone &lt;b&gt;.png" in page


def test_best_median_and_worst_image_by_the_product_of_the_axes(tmp_path):
    results = results_of(tmp_path, subjects=1)
    (method, *_) = results["methods"]  # its products are 0.1, 0.18 and 0.03
    chosen = [(name, image["prompt"][-1]) for name, _, image in picks(method, results["axes"])]
    assert chosen == [("best", "1"), ("median", "0"), ("worst", "2")]
    images = method["subjects"][0]["images"]
    images[1]["scores"]["control"] = None
    assert [name for name, *_ in picks(method, results["axes"])] == ["best", "worst"]
    images[0]["scores"].clear()
    assert [name for name, *_ in picks(method, results["axes"])] == ["best"]


def test_a_strip_pairs_prompts_by_order(tmp_path):
    results = results_of(tmp_path, subjects=1)
    for image in results["methods"][2]["subjects"][0]["images"]:
        image["prompt"] = image["prompt"].replace("<b>", "plain")
    results["methods"][1]["subjects"][0]["images"] = []
    table = section(page_of(results, tmp_path), "Subject by subject")
    shown_for = [re.findall(r"<td>.*?</td>", row) for row in table.split("</q>")[1:]]
    assert [[re.sub(r'.*alt="([^"]*)".*|<.*?>', r"\1", cell) for cell in row] for row in shown_for] == [
        ["", "a &lt;b&gt; prompt 0", "–", "a plain prompt 0"],
        ["", "a &lt;b&gt; prompt 1", "–", "a plain prompt 1"],
    ]


def test_one_subject_has_no_interval_and_one_method_is_not_the_best(tmp_path):
    scores = rows(
        section(page_of(results_of(tmp_path, subjects=1, methods=("a", "base")), tmp_path), "Scores")
    )
    assert scores["a"] == ["20 %", "90 %", "0.500", "0.100"]


def test_what_is_not_there_has_no_section(tmp_path):
    results = results_of(tmp_path, factors={}, cost={}, images=[], references=[], scores={})
    page = page_of(results, tmp_path)
    assert re.findall("<h2>([^<]*)</h2>", page) == ["Scores", "What the metrics mean", "Protocol"]
    assert rows(section(page, "Scores"))["a"] == ["–"] * 4


def test_published_numbers_have_their_own_table(tmp_path):
    results = results_of(tmp_path)
    results["published"] = [
        {"label": "P", "scores": {"dino": 0.6684, "identity": 0.5}, "protocol": "30 subjects"},
        {"label": "Q", "scores": {"dino": None}, "protocol": "the same"},
    ]
    table = section(page_of(results, tmp_path), "Published numbers (other protocols: do not compare closely)")
    assert rows(table) == {
        "P": ["0.668", "50 %", '<div class="words">30 subjects</div>'],
        "Q": ["–", "–", '<div class="words">the same</div>'],
    }


def test_the_plot_marks_every_method(tmp_path):
    results = results_of(tmp_path)
    results["methods"] = [
        method | {"colour": f"#12345{i}", "label": f"label $x{i}"}
        for i, method in enumerate(results["methods"])
    ]
    drawing = scatter(results).decode()
    assert all(f"#12345{i}" in drawing for i in range(3))
    assert drawing.count("<!-- label $x") == 3
    assert scatter(results) == scatter(results)
    assert scatter(results | {"methods": []}) is None


def test_labels_of_close_points_do_not_cover_each_other():
    axes = FigureCanvasAgg(Figure(dpi=72)).figure.subplots()
    points = [({"label": f"a long label {i}", "colour": "black"}, [0.5], [0.5 + 0.001 * i]) for i in range(8)]
    for _, x, y in points:
        axes.plot(x, y, "o")
    axes.axis((0, 1, 0, 1))
    axes.figure.canvas.draw()
    _place_labels(axes, points)
    axes.figure.canvas.draw()
    boxes = [
        Text.get_window_extent(note, axes.figure.canvas.get_renderer()).padded(-1) for note in axes.texts
    ]
    assert len(boxes) == 8
    assert not [pair for pair in itertools.combinations(boxes, 2) if Bbox.intersection(*pair)]
    assert all(axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) for box in boxes)


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (-0.001, "percent", "0 %"),
        (-0.5, "number", "−0.500"),
        (0.7, "amount", "0.700"),
        (1234.5, "amount", "1,234"),
        (None, "number", "–"),
    ],
)
def test_numbers_as_printed(value, style, text):
    assert shown(value, style) == text


def test_photographs_are_scaled_down(tmp_path):
    results = results_of(tmp_path, subjects=1, methods=("a",))
    for image in results["methods"][0]["subjects"][0]["images"]:
        Image.effect_noise((1024, 512), 90).save(tmp_path / image["file"])
    page = page_of(results, tmp_path)
    assert page.count("data:image/jpeg") == 5  # three cards, and the prompts of one strip
    assert max(len(uri) for uri in re.findall('data:image/jpeg;base64,[^"]*', page)) < 40_000
