"""The main plot: subject fidelity against prompt fidelity, one point for each method."""

import io
from statistics import fmean

import numpy as np

from customize.metrics.scores import confidence_interval

KINDS = {"method": "o", "base": "s", "real": "D"}  # in the order of the rows, with their markers in the plot
ARROWS = {"higher": "\u00a0↑", "lower": "\u00a0↓", "": ""}


def numbers(method: dict, part: str, name: str, group: str | None = None) -> list[float]:
    """The known values of `name` among the scores, factors or costs of a method's subjects."""
    subjects = [subject for subject in method["subjects"] if group in (None, subject["group"])]
    return [value for subject in subjects if (value := subject.get(part, {}).get(name)) is not None]


def scatter(results: dict) -> bytes | None:
    """One point a method, with the intervals of both axes, as SVG; None where no method has both scores."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    values = [
        (method, *(numbers(method, "scores", name) for name in results["axes"]))
        for method in results["methods"]
    ]
    points = [(method, x, y) for method, x, y in values if x and y]
    if not points:
        return None
    figure = Figure((5.2, 4.4), dpi=72, layout="constrained")  # so that a pixel is a point, the unit of SVG
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    for point in points:
        _draw_point(axes, *point)
    for method, y in ((method, y) for method, x, y in values if y and not x and method["kind"] != "method"):
        _draw_level(axes, method, fmean(y))  # real images have no prompt
    axes.margins(0.09)
    for axis, name in zip((axes.xaxis, axes.yaxis), results["axes"], strict=True):
        metric = results["metrics"][name]
        axis.set_label_text(metric["title"] + ARROWS[metric["better"]], parse_math=False)
        if metric["style"] == "percent":
            ticks = axis.get_majorticklocs()
            fine = len(ticks) > 1 and ticks[1] - ticks[0] < 0.01  # without a decimal, ticks would repeat
            axis.set_major_formatter(PercentFormatter(1, decimals=1 if fine else 0))
    axes.grid(color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color("#b8bcc2")
    canvas.draw()  # settles the layout, which the labels' places depend on
    _place_labels(axes, points)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _draw_point(axes, method: dict, x: list[float], y: list[float]) -> None:
    """A method's point, with the intervals of both scores."""
    colour, bars = method["colour"], ([fmean(y)] * 2, [fmean(x)] * 2)
    axes.plot(confidence_interval(x), bars[0], bars[1], confidence_interval(y), color=colour, alpha=0.45)
    marker = {"color": colour, "markersize": 8, "markeredgecolor": "white"}
    axes.plot(bars[1][0], bars[0][0], KINDS[method["kind"]], **marker)


def _draw_level(axes, method: dict, y: float) -> None:
    """A dashed line at a score, with the method's name."""
    axes.axhline(y, color=method["colour"], linestyle="--", linewidth=1)
    at = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.text(0.99, y, method["label"], color=method["colour"], parse_math=False, **at)


def _place_labels(axes, points: list[tuple[dict, list[float], list[float]]]) -> None:
    """Places each label near its point, where it covers least of the markers, the bars and the labels
    before it."""
    from matplotlib.text import Text

    def covered(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
        low, high = (
            np.maximum(boxes[:, None, :2], others[:, :2]),
            np.minimum(boxes[:, None, 2:], others[:, 2:]),
        )
        return (high - low).clip(0).prod(-1).sum(1)

    renderer, turns = axes.figure.canvas.get_renderer(), np.radians(np.arange(0, 360, 15))
    gaps = np.repeat([8, 16, 28, 44, 64], len(turns))  # rings around the point
    rings = np.tile(np.stack([np.cos(turns), np.sin(turns)], -1), (5, 1))
    taken = np.array(
        [artist.get_window_extent(renderer).padded(4).extents for artist in (*axes.lines, *axes.texts)]
    )
    for method, x, y in points:
        place, colour = (fmean(x), fmean(y)), method["colour"]
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
        middle = {"ha": "center", "va": "center", "textcoords": "offset points"}
        note = axes.annotate(
            method["label"], place, (0, 0), color=colour, parse_math=False, arrowprops=leader, **middle
        )
        size = np.array(Text.get_window_extent(note, renderer).size)
        offsets = (size / 2 + gaps[:, None]) * rings
        low = axes.transData.transform(place) + offsets - size / 2
        boxes = np.concatenate([low, low + size], 1)
        outside = size.prod() - covered(boxes, axes.bbox.extents[None])
        best = np.argmin(4 * covered(boxes, taken) + 20 * outside + gaps)
        note.xyann = tuple(offsets[best])
        note.arrow_patch.set_visible(gaps[best] > 10)
        taken = np.concatenate([taken, boxes[[best]]])
