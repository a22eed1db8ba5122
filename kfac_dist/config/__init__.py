"""The job specification: its sections, how it is read, and the messages when it is wrong.

Start at `load_spec`: it takes a YAML or TOML file and `--set` overrides, and returns a frozen
`JobSpec` or raises an InvalidSpecError that lists all problems.
"""

from kfac_dist.config.job import (
    BatchSchedule,
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    FaultSpec,
    JobSpec,
    StalenessSpec,
    WorkersSpec,
)
from kfac_dist.config.keys import Key, job_keys
from kfac_dist.config.load import dump_spec, kfac_settings, load_spec, parse_spec
from kfac_dist.config.optimizers import (
    AdamSpec,
    AveragingSpec,
    DampingSpec,
    GammaSpec,
    KFACSpec,
    LearningRateSchedule,
    OptimizerSpec,
    SGDSpec,
    ValueSchedule,
)
from kfac_dist.config.schema import job_schema

__all__ = [
    "AdamSpec",
    "AveragingSpec",
    "BatchSchedule",
    "CheckpointSpec",
    "DampingSpec",
    "DataSpec",
    "EvaluationSpec",
    "FaultSpec",
    "GammaSpec",
    "JobSpec",
    "KFACSpec",
    "Key",
    "LearningRateSchedule",
    "OptimizerSpec",
    "SGDSpec",
    "StalenessSpec",
    "ValueSchedule",
    "WorkersSpec",
    "dump_spec",
    "job_keys",
    "job_schema",
    "kfac_settings",
    "load_spec",
    "parse_spec",
]
