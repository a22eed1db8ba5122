from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event, RunFolder
from kfac_dist.runs.reports.report import render_report
from tests.runs.samples import LAYERS, sample_record, sample_run, sample_spec

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    with sample_run(tmp_path, steps=80) as folder:
        text = render_report(folder).read_text()
    page = _Page(text)
    assert not [tag for tag, attributes in page.tags if {"src", "href"} & attributes.keys()]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "img", "object")]
    links = set(re.findall(r"https?://[^\"'\s]*", text))
    assert links == {"http://www.w3.org/2000/svg"}  # the name of a namespace, not an address


def test_the_report_shows_how_the_run_went(tmp_path: Path) -> None:
    with sample_run(tmp_path, steps=80) as folder:
        text = render_report(folder).read_text()
        job = folder.read_job().job
    for part in (job, "SUCCEEDED", "squared error", "4.02", "inverse_worker 0 died", "raised"):
        assert part in text
    assert _data(text)["layers"] == list(LAYERS)
    assert len(_data(text)["steps"]) == 80


def test_the_report_shows_the_workers_of_the_last_step(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec(workers={"gradient": 3})) as folder:
        assert "3 + 1 + 3" in render_report(folder).read_text()
        folder.append_metrics(sample_record(1, gradient_workers=2, shards=2))
        assert "2 + 1 + 2" in render_report(folder).read_text()


def test_what_comes_from_a_user_is_escaped(tmp_path: Path) -> None:
    spec = sample_spec(task=HOSTILE, task_args={HOSTILE: HOSTILE})
    with RunFolder.create(tmp_path, spec) as folder:
        folder.append_metrics(
            sample_record(1, inverse_version_step={HOSTILE: 1}, numeric_events={HOSTILE: 1})
        )
        folder.append_event(Event(kind=HOSTILE, message=HOSTILE, step=1, severity="error"))
        failure = FirstFailure(role=HOSTILE, rank=0, time_seconds=0.0, log_tail=HOSTILE)
        folder.update_job(state="FAILED", reason=HOSTILE, message=HOSTILE, first_failure=failure)
        text = render_report(folder).read_text()
    tags = [tag for tag, _ in _Page(text).tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert _data(text)["layers"] == [HOSTILE]


def test_a_run_without_steps_has_a_report_too(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, sample_spec(optimizer={"name": "adam"})) as folder:
        text = render_report(folder).read_text()
    assert _data(text)["steps"] == []
    assert 'id="heat"' not in text


def _data(text: str) -> dict[str, list[object]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    data: dict[str, list[object]] = json.loads(found[1])
    return data
