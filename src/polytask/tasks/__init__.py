"""What to do: tasks, their examples and labels, readers, splits and scorers. Knows no model."""

from polytask.tasks.task import Example, Label, LabelCard, Task, TaskCard

__all__ = ["Example", "Label", "LabelCard", "Task", "TaskCard"]
