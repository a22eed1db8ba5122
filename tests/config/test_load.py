from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.config import (
    AdamSpec,
    AveragingSpec,
    BatchSchedule,
    JobSpec,
    KFACSpec,
    LearningRateSchedule,
    SGDSpec,
    ValueSchedule,
    dump_spec,
    kfac_settings,
    load_spec,
    parse_spec,
)
from kfac_dist.errors import InvalidSpecError, NotFoundError, UsageError

CONTRACT = """\
name: mnist-autoencoder
task: autoencoder                 # built-in, or package.module:Class, or file.py:Class
task_args: {hidden: [1000, 500, 250, 30], activation: tanh}
data: {name: mnist, limit: null}
steps: 500
batch_size: 1000
optimizer:
  name: kfac
  step_rule: adaptive
  inverse: block_diagonal
  fisher_type: mc
  damping: {initial: 0.3, adapt_period: 5}
  gamma: {adapt_period: 20}
  l2: 1.0e-5
  factor_update_period: 1
  inverse_update_period: 20
  statistics_fraction: 0.125
  fisher_fraction: auto
  averaging: {decay: 0.99, start: 200}
workers: {gradient: 2, inverse: 1, parameter_server: 1, device: auto, threads: null}
staleness: {max_steps: 40, at_bound: wait, refresh_policy: largest_drift}
checkpoint: {every_steps: 100, keep: 3}
faults: {max_restarts: 3, max_bad_steps: 10, min_gradient_workers: 1}
seed: 0
"""
SMALL = {"name": "a", "task": "autoencoder", "steps": 3, "batch_size": 10}


def _file(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_example_of_the_contract_is_valid_and_its_values_are_the_defaults(
    tmp_path: Path,
) -> None:
    spec = load_spec(_file(tmp_path, CONTRACT))
    assert spec.workers.gradient == 2
    assert spec.task_args["hidden"] == [1000, 500, 250, 30]
    changed = spec.model_dump(exclude={"workers", "task_args", "data"})
    plain = parse_spec(
        {"name": "mnist-autoencoder", "task": "autoencoder", "steps": 500, "batch_size": 1000}
    )
    assert changed == plain.model_dump(exclude={"workers", "task_args", "data"})


def test_what_is_dumped_loads_to_the_same(tmp_path: Path) -> None:
    for optimizer in ({"name": "kfac"}, {"name": "sgd"}, {"name": "adam", "betas": [0.8, 0.9]}):
        spec = parse_spec(SMALL | {"optimizer": optimizer, "task_args": {"x": None, "y": "no"}})
        assert load_spec(_file(tmp_path, dump_spec(spec))) == spec


def test_toml_and_json_say_the_same_as_yaml(tmp_path: Path) -> None:
    toml = 'name = "a"\ntask = "autoencoder"\nsteps = 3\nbatch_size = 10\n[data]\nlimit = 5\n'
    json = (
        '{"name": "a", "task": "autoencoder", "steps": 3, "batch_size": 10, "data": {"limit": 5}}'
    )
    yaml = "name: a\ntask: autoencoder\nsteps: 3\nbatch_size: 10\ndata: {limit: 5}\n"
    specs = [
        load_spec(_file(tmp_path, text, f"job.{suffix}"))
        for text, suffix in ((toml, "toml"), (json, "json"), (yaml, "yml"))
    ]
    assert specs[0] == specs[1] == specs[2]


def test_sections_are_chosen_by_their_name() -> None:
    assert isinstance(parse_spec(SMALL).optimizer, KFACSpec)
    assert isinstance(parse_spec(SMALL | {"optimizer": {"l2": 0}}).optimizer, KFACSpec)
    assert isinstance(parse_spec(SMALL | {"optimizer": {"name": "sgd"}}).optimizer, SGDSpec)
    adam = parse_spec(SMALL | {"optimizer": {"name": "adam", "betas": [0.5, 0.6]}}).optimizer
    assert isinstance(adam, AdamSpec)
    assert adam.betas == (0.5, 0.6)
    growing = {"schedule": "exponential", "initial": 10, "full_at": 50}
    assert parse_spec(SMALL | {"batch_size": growing}).batch_size == BatchSchedule(
        schedule="exponential", initial=10, full_at=50
    )
    assert parse_spec(SMALL | {"optimizer": {"averaging": None}}).optimizer.averaging is None


def test_a_number_may_be_a_schedule(tmp_path: Path) -> None:
    lr = {"schedule": "cosine", "initial": 1, "final": 0, "steps": 9, "warmup_steps": 3}
    damping = {"schedule": "exponential", "initial": 9, "final": 1, "steps": 9}
    optimizer = {"lr": lr, "damping": {"initial": damping, "adapt_period": None}}
    spec = parse_spec(SMALL | {"optimizer": optimizer})
    assert isinstance(spec.optimizer, KFACSpec)
    assert spec.optimizer.lr == LearningRateSchedule(**lr)
    assert spec.optimizer.damping.initial == ValueSchedule(**damping)
    assert spec.optimizer.damping.first == 9.0
    assert load_spec(_file(tmp_path, dump_spec(spec))) == spec
    assert kfac_settings(spec.optimizer.model_dump()) == spec.optimizer


def test_overrides_are_yaml_and_later_ones_win() -> None:
    spec = parse_spec(
        SMALL,
        overrides=[
            "steps=7",
            "steps=8",
            "optimizer.damping.initial=1e1",
            "task_args.hidden=[4, 2]",
            "data={name: mnist, limit: 3}",
            "optimizer.averaging.start=5",
        ],
    )
    assert spec.steps == 8
    assert isinstance(spec.optimizer, KFACSpec)
    assert spec.optimizer.damping.initial == 10.0
    assert spec.task_args == {"hidden": [4, 2]}
    assert (spec.data.name, spec.data.limit) == ("mnist", 3)
    assert spec.optimizer.averaging == AveragingSpec(start=5)
    assert "data" not in SMALL  # the values that were given are left alone


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=3", "steps=[1"])
def test_what_does_not_look_like_an_override_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_spec(SMALL, overrides=[text])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(InvalidSpecError, match="batch_size is 10, which has no keys to set"):
        parse_spec(SMALL, overrides=["batch_size.initial=3"])


def test_yaml_has_the_types_of_yaml_1_2(tmp_path: Path) -> None:
    text = (
        "name: no\ntask: on\nsteps: 010\nbatch_size: 0x10\n"
        "task_args: {a: 1e-5, b: 1:30, c: 2020-01-01, d: yes, e: ~, f: .5, g: +3, h: True}\n"
    )
    spec = load_spec(_file(tmp_path, text))
    assert (spec.name, spec.task, spec.steps, spec.batch_size) == ("no", "on", 10, 16)
    assert spec.task_args == {
        "a": 1e-5,
        "b": "1:30",
        "c": "2020-01-01",
        "d": "yes",
        "e": None,
        "f": 0.5,
        "g": 3,
        "h": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\nsteps: 3\n", "job.yaml:2:6: expected ',' or ']'"),
        ("name: a\nname: b\n", "job.yaml:2:1: the key 'name' occurs twice"),
        ("a: b: c\n", "job.yaml:1:5: mapping values are not allowed here"),
        ("name: a\n\tsteps: 3\n", "job.yaml:2:1: found character"),
        ("name: \x00\n", "job.yaml: "),
        ("x: !!python/object:os.system {}\n", "job.yaml:1:4: could not determine a constructor"),
        ("", "job.yaml: is empty"),
        ("- a\n", "job.yaml: holds list"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2:1: "),
        ("[a]: 1\n", "job.yaml:1:1: "),
        ("1: 2\n", "is not a key"),
    ],
)
def test_what_is_no_specification_is_told_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        load_spec(_file(tmp_path, text))
    assert message in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(InvalidSpecError, match=r"a \.yaml, \.yml, \.json or \.toml file"):
        load_spec(_file(tmp_path, "a", "job.txt"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InvalidSpecError, match="cannot be read: Is a directory"):
        load_spec(tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(InvalidSpecError, match="byte 6 is not UTF-8"):
        load_spec(tmp_path / "latin.yaml")
    with pytest.raises(InvalidSpecError, match="line 2"):
        load_spec(_file(tmp_path, "a = 1\nb c\n", "job.toml"))


def test_settings_of_the_serial_optimizer_may_be_numbers() -> None:
    settings = kfac_settings({"damping": 3, "gamma": 0.5, "step_rule": "norm_constraint"})
    assert (settings.damping.initial, settings.gamma.initial) == (3.0, 0.5)
    assert kfac_settings({"damping": {"initial": 3}}).damping == settings.damping
    assert kfac_settings({}) == KFACSpec()
    with pytest.raises(InvalidSpecError) as caught:
        kfac_settings({"dampin": 1, "gamma": True})
    assert "KFAC: dampin: unknown key. Did you mean damping?" in caught.value.message
    assert "KFAC: gamma: true is not a mapping" in caught.value.message


def test_a_specification_is_frozen() -> None:
    spec: JobSpec = parse_spec(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        spec.steps = 4  # type: ignore[misc]
