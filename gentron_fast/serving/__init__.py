"""Serving: requests that come and go, made together on one pipeline."""

from gentron_fast.serving.job import DeadlinePassed, Job, Progress
from gentron_fast.serving.request import Request
from gentron_fast.serving.scheduler import QueueFull, Scheduler, SchedulerClosed

__all__ = [
    "DeadlinePassed",
    "Job",
    "Progress",
    "QueueFull",
    "Request",
    "Scheduler",
    "SchedulerClosed",
]
