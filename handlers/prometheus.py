"""``/metrics``: what the process has counted, in the form that Prometheus reads; PROTOCOL 17.5.

Prometheus' library is imported here and nowhere else, and this module only where
metrics are offered: it takes a tenth of a second and some megabytes.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping

import tornado.routing
import tornado.web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from handlers.base import JsonHandler
from handlers.metrics import METRICS, PREFIX, Labels, Process, Row
from server.metrics import Histogram


class Rows(Collector):
    """The rows as Prometheus' library wants them."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def describe(self) -> Iterable[Metric]:
        """Nothing is read before somebody asks."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Each metric with its numbers of now."""
        for row in METRICS:
            values = row.read(self._process)
            if row.kind == "histogram":
                yield _histogram(row, values)
                continue
            family = (CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily)(
                PREFIX + row.name, row.about, labels=row.labels
            )
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


def _histogram(row: Row, values: Mapping[Labels, Histogram]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + row.name, row.about, labels=row.labels)
    for labels, histogram in values.items():
        buckets: list[tuple[str, float]] = []
        count = 0
        for bound, more in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            count += more
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), count))
        family.add_metric(labels, buckets, histogram.total)
    return family


class Collections(Collector):
    """How often Python's collector of cycles ran, by generation; prometheus-client's own takes a callback for it."""

    def collect(self) -> Iterator[Metric]:
        """Of now."""
        family = CounterMetricFamily("python_gc_collections", "runs of the collector of cycles", labels=("generation",))
        for generation, stats in enumerate(gc.get_stats()):
            family.add_metric((str(generation),), stats["collections"])
        yield family


def make_registry(process: Process) -> CollectorRegistry:
    """All metrics of one process, apart from any other's."""
    registry = CollectorRegistry()
    registry.register(Rows(process))
    registry.register(Collections())
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class MetricsHandler(JsonHandler):
    """``GET /metrics``; PROTOCOL 17.5.1."""

    def initialize(self, registry: CollectorRegistry) -> None:
        """``registry`` is read at each request."""
        self._registry = registry

    def get(self) -> None:
        """200, as text for Prometheus, or as OpenMetrics for who accepts that."""
        encode, content_type = choose_encoder(self.request.headers.get("Accept", ""))
        self.set_header("Content-Type", content_type)
        self.set_header("Cache-Control", "no-store")
        self.finish(encode(self._registry))


def metrics_route(process: Process, prefix: str) -> tornado.routing.Rule:
    """The path of the metrics."""
    return tornado.web.url(prefix, MetricsHandler, {"registry": make_registry(process)})
