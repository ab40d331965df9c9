"""What to do: tasks, their examples and labels, readers, splits and scorers. Knows no model."""

from polytask.tasks.task import Example, Label, Task, TaskCard

__all__ = ["Example", "Label", "Task", "TaskCard"]
