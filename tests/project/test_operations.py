"""The page for operators says what the catalogue of metrics says."""

from __future__ import annotations

import re

import yaml

from kfac_dist.coordination.metrics import CATALOGUE
from tests.paths import ROOT

PAGE = (ROOT / "docs/operations.md").read_text()


def test_the_table_of_metrics_is_the_catalogue() -> None:
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| `kfac_.*\|$", PAGE, re.M)]
    documented = [tuple(cell.strip() for cell in row[:4]) for row in rows]
    assert documented == [
        (f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels), m.help)
        for m in CATALOGUE
    ]
    assert all(len(row) == 5 and row[4] for row in rows)


def test_the_example_scrapes_the_port_of_the_example_and_keeps_the_label_job() -> None:
    (example,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", PAGE, re.S)
    (scrape,) = yaml.safe_load(example)["scrape_configs"]
    assert scrape["honor_labels"] is True
    (port,) = re.findall(r"--metrics-port ([1-9]\d*)", PAGE)
    assert scrape["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]


def test_queries_name_metrics_of_the_catalogue() -> None:
    (queries,) = re.findall(r"```promql\n(.*?)```", PAGE, re.S)
    series = {
        metric.name + suffix
        for metric in CATALOGUE
        for suffix in (("_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    assert set(re.findall(r"kfac_\w+", queries)) <= series
