"""One readable loop: objectives, schedules, checkpoints, many adapters at once, several processes."""

from polytask.training.loop import Event, Learned, train
from polytask.training.settings import Job, Settings

__all__ = ["Event", "Job", "Learned", "Settings", "train"]
