"""What Prometheus reads: the scheduler's figures, latencies, answers, and this process."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
GAUGES = {
    "queue_length": "Requests that wait",
    "batch": "Clips that are being made",
    "max_batch": "The most clips that are made at a time",
    "steps_per_second": "Denoising steps a second, each clip's counted, over the last 10 s",
    "memory_bytes": "The most memory held so far: of the device, or of the process on the CPU",
}
COUNTERS = {
    "submitted": "Requests taken",
    "done": "Requests done",
    "failed": "Requests failed",
    "cancelled": "Requests cancelled",
    "rejected": "Requests refused because the queue was full",
    "steps": "Denoising steps, each clip's counted",
}


class SchedulerCollector(Collector):
    """The figures of a scheduler's stats(), as gentron_NAME."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def collect(self):
        stats = self.scheduler.stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"gentron_{name}", text, stats[name])
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"gentron_{name}", text, stats[name])


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, scheduler):
        self.registry = CollectorRegistry()
        self.registry.register(SchedulerCollector(scheduler))
        ProcessCollector(registry=self.registry)
        self._latency = Histogram(
            *("gentron_latency_seconds", "From the request to its clip or images", ["kind"]),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._responses = Counter(
            "gentron_http_responses", "Answers", ["status"], registry=self.registry
        )

    def took(self, kind: str, seconds: float) -> None:
        """A finished request: its kind, "video" or "image"."""
        self._latency.labels(kind).observe(seconds)

    def answered(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
