"""Tasks: a model, its data and its predictive distribution, built in or written by the user."""

from kfac_dist.tasks.build import build_model, check_model, class_axis_of, distribution_of
from kfac_dist.tasks.load_task import BUILT_IN, load_task, torch_dtype
from kfac_dist.tasks.task import Task
from kfac_dist.tasks.user import UserDataset, UserTask, user_code
from kfac_dist.tasks.working_folder import enter_working_folder, working_folder

__all__ = [
    "BUILT_IN",
    "Task",
    "UserDataset",
    "UserTask",
    "build_model",
    "check_model",
    "class_axis_of",
    "distribution_of",
    "enter_working_folder",
    "load_task",
    "torch_dtype",
    "user_code",
    "working_folder",
]
