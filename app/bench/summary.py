"""The report's main table as text."""

from statistics import fmean

from customize.app.bench.plot import numbers
from customize.app.bench.report import shown
from customize.metrics.scores import confidence_interval


def summary(results: dict) -> str:
    """Markdown: a row a method with means and 95 % intervals over subjects, then published rows with their
    protocols; below it what the columns mean."""
    metrics, published = results["metrics"], results.get("published", [])
    heads = [metric["title"] for metric in metrics.values()]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for method in results["methods"]:
        cells = [_cell(numbers(method, "scores", name), metric["style"]) for name, metric in metrics.items()]
        lines.append(f"| {method['label']} | {' | '.join(cells)} |")
    for row in published:
        cells = [shown(row["scores"].get(name), "number") for name in metrics]
        lines.append(f"| *{row['label']}* ({row['protocol']}) | {' | '.join(cells)} |")
    meanings = [f"{metric['title']}: {metric['about']}" for metric in metrics.values()]
    return "\n".join([*lines, "", *meanings])


def _cell(values: list[float], style: str) -> str:
    if len(values) < 2:
        return shown(values[0] if values else None, style)
    low, high = (shown(bound, style).removesuffix(" %") for bound in confidence_interval(values))
    return f"{shown(fmean(values), style)} ({low} to {high})"
