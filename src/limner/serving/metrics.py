"""Figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.accepted = Counter("limner_jobs_accepted", "Jobs accepted.", ["model"], registry=registry)
        self.ended = Counter("limner_jobs_ended", "Jobs that ended here, by how.", ["state"], registry=registry)
        self.refused = Counter("limner_jobs_refused", "Jobs refused since there were too many.", registry=registry)
        self.pictures = Counter("limner_pictures", "Pictures drawn.", ["model"], registry=registry)
        self.steps = Counter("limner_steps", "Denoising steps done, times pictures.", registry=registry)
        self.jobs = Gauge("limner_jobs", "Jobs in the database, by state.", ["state"], registry=registry)
        self.models = Gauge("limner_models_loaded", "Models in memory.", registry=registry)
        self.drawing = Histogram(
            "limner_drawing_seconds", "From the start of a job to its end.", buckets=SECONDS, registry=registry
        )
        self.requests = Histogram(
            "limner_request_seconds",
            "Time to answer.",
            ["method", "route", "status"],
            buckets=SECONDS,
            registry=registry,
        )

    def render(self, counts: dict[str, int], loaded: int) -> bytes:
        """The page that Prometheus reads."""
        for state in ("queued", "running", "done", "failed", "cancelled"):
            self.jobs.labels(state).set(counts.get(state, 0))
        self.models.set(loaded)
        return generate_latest(self.registry)
