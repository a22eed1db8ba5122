"""Reads metrics as Prometheus does."""

from __future__ import annotations

from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
_DIRECT = build_opener(ProxyHandler({}))


def scrape(url: str) -> Samples:
    """Return every sample at `url`, by name and labels."""
    with _DIRECT.open(url, timeout=10) as answer:
        return samples(answer.read().decode())


def samples(text: str) -> Samples:
    """Return every sample of a text by name and labels, and check that no two are the same."""
    found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    by_name = {(s.name, frozenset(s.labels.items())): s.value for s in found}
    assert len(by_name) == len(found)
    return by_name


def value(found: Samples, name: str, **labels: str) -> float:
    """Return one sample."""
    return found[name, frozenset(labels.items())]


def by_label(found: Samples, name: str, label: str) -> dict[str, float]:
    """Return the samples of a name, by the value of one of their labels."""
    return {dict(labels)[label]: v for (own, labels), v in found.items() if own == name}
