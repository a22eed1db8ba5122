import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kfac_dist.errors import InvalidSpecError, JobFailedError, NotFoundError
from kfac_dist.runs.checkpoint_folder import list_checkpoints
from workers.checkpoint import LoadedCheckpoint, load_newest, write_checkpoint

ROLES = {
    "parameter_server": {
        "theta": np.linspace(-1, 1, 7),
        "damping": np.array(150.0),
    },
    "inverse_worker": {"fc/A": np.eye(3, dtype=np.float32), "num_updates": np.array(4)},
}
STATE = {"cursor": {"epoch": 1, "offset": 250}, "versions": {"fc": 95, "out": None}, "x": 0.1}


def save(folder: Path, step: int, keep: int = 3, **state: Any) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(folder, step, ROLES, STATE | state, keep)


def load(folder: Path) -> LoadedCheckpoint:
    loaded = load_newest(folder)
    assert loaded is not None
    return loaded


def steps(folder: Path) -> list[int]:
    return [info.step for info in list_checkpoints(folder)]


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as if another version of the program had written it."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    rewrite(path, json.dumps(manifest))


def rewrite(path: Path, text: str) -> None:
    (path / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def test_a_checkpoint_is_loaded_as_it_was_written(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", 100)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000100"
    loaded = load(path.parent)
    assert (loaded.step, loaded.path, loaded.refused) == (100, path, ())
    assert loaded.state == STATE
    assert loaded.roles.keys() == ROLES.keys()
    for role, arrays in ROLES.items():
        assert loaded.roles[role].keys() == arrays.keys()
        for name, array in arrays.items():
            found = loaded.roles[role][name]
            np.testing.assert_array_equal(found, array)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.flags.writeable


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert sorted(file.name for file in path.iterdir()) == [
        "inverse_worker.safetensors",
        "manifest.json",
        "manifest.sha256",
        "parameter_server.safetensors",
    ]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["state"]) == (1, 100, STATE)
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


@pytest.mark.parametrize(
    "array",
    [
        np.array(3.5),
        np.zeros((0, 4), dtype=np.float32),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(12)[::3],
        np.array([True, False]),
        np.array([1, 255], dtype=np.uint8),
        np.array([math.nan, -0.0, math.inf, 5e-324]),
    ],
    ids=["scalar", "empty", "fortran", "strided", "bool", "uint8", "special"],
)
def test_arrays_of_all_kinds_come_back_bit_for_bit(tmp_path: Path, array: np.ndarray) -> None:
    write_checkpoint(tmp_path, 1, {"role": {"x": array}}, {}, keep=1)
    found = load(tmp_path).roles["role"]["x"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


@given(
    st.dictionaries(
        st.text("abc_-", min_size=1, max_size=5),
        st.dictionaries(
            st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
            npst.arrays(
                st.sampled_from([np.float64, np.float32, np.int64]),
                npst.array_shapes(min_dims=0, max_dims=3, max_side=4),
            ),
            max_size=3,
        ),
        max_size=3,
    ),
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3),
        ),
        max_size=4,
    ),
    st.integers(0, 10**10),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    roles: dict[str, dict[str, np.ndarray]],
    state: dict[str, Any],
    step: int,
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder, step, roles, state, keep=1)
    loaded = load(folder)
    assert (loaded.step, loaded.state) == (step, state)
    assert {
        r: {n: (a.dtype, a.shape, a.tobytes()) for n, a in x.items()}
        for r, x in loaded.roles.items()
    } == {r: {n: (a.dtype, a.shape, a.tobytes()) for n, a in x.items()} for r, x in roles.items()}


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "none") is None
    assert list_checkpoints(tmp_path / "none") == ()


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in range(10, 60, 10):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [50, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000040", "step-00000050"]


def test_steps_of_any_length_are_in_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(tmp_path, step)
    assert steps(tmp_path) == [100_000_001, 100_000_000, 99_999_999]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000900").write_text("a file, not a folder")
    (tmp_path / "README").write_text("mine")
    save(tmp_path, 100, keep=1)
    save(tmp_path, 200, keep=1)
    assert steps(tmp_path) == [200]
    assert {"step-notes", "step-00000900", "README"} < {path.name for path in tmp_path.iterdir()}


def test_a_second_checkpoint_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 100, attempt=1)
    save(tmp_path, 200, attempt=1)
    save(tmp_path, 200, attempt=2)
    assert load(tmp_path).state["attempt"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00000200"]


def test_later_steps_of_an_attempt_that_was_given_up_are_removed(tmp_path: Path) -> None:
    """A run that resumed from 100, because 200 was torn, has 150 as its newest checkpoint."""
    save(tmp_path, 100)
    (save(tmp_path, 200) / "manifest.json").unlink()
    save(tmp_path, 150, keep=1)
    assert steps(tmp_path) == [150]


def test_leftovers_of_a_crash_are_removed_at_the_next_write(tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-step-00000100"
    leftover.mkdir()
    (leftover / "half.safetensors").write_bytes(b"half")
    save(tmp_path, 200)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000200"]


@given(st.data())
def test_if_one_is_torn_or_altered_at_any_byte_the_one_before_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder, 100)
    newest = save(folder, 200)
    file = data.draw(st.sampled_from(sorted(newest.iterdir())), label="file")
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1), label="position")
    damage = data.draw(st.sampled_from(["truncate", "flip", "append", "missing"]), label="damage")
    if damage == "missing":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:position])
    elif damage == "append":
        file.write_bytes(content + b"\0")
    else:
        content[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        file.write_bytes(content)
    loaded = load(folder)
    assert loaded.step == 100
    (message,) = loaded.refused
    assert message.startswith("checkpoint step-00000200 refused: ")
    assert "manifest" in message or file.name in message


def test_the_messages_say_what_is_wrong(tmp_path: Path) -> None:
    whole = save(tmp_path, 1, keep=9)
    (save(tmp_path, 2, keep=9) / "parameter_server.safetensors").unlink()
    torn = save(tmp_path, 3, keep=9) / "parameter_server.safetensors"
    size = torn.stat().st_size
    torn.write_bytes(torn.read_bytes()[:-1])
    flipped = save(tmp_path, 4, keep=9) / "inverse_worker.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"!")
    (save(tmp_path, 5, keep=9) / "manifest.json").write_text("{")
    (save(tmp_path, 6, keep=9) / "manifest.json").unlink()
    loaded = load(tmp_path)
    assert loaded.path == whole
    assert loaded.refused == (
        "checkpoint step-00000006 refused: manifest.json is missing",
        "checkpoint step-00000005 refused: "
        "manifest.json has another sha256 than manifest.sha256 says",
        "checkpoint step-00000004 refused: "
        "inverse_worker.safetensors has another sha256 than manifest.json says",
        "checkpoint step-00000003 refused: "
        f"parameter_server.safetensors has {size - 1} bytes, not {size}",
        "checkpoint step-00000002 refused: parameter_server.safetensors is missing",
    )


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "its format is 2; this version reads 1"),
        (drop("format"), "its format is None; this version reads 1"),
        (lambda m: m.update(step=7), "manifest.json says step 7"),
        (drop("files"), "manifest.json is not laid out as format 1"),
        (drop("state"), "manifest.json is not laid out as format 1"),
        (lambda m: m.update(files=[1]), "manifest.json is not laid out as format 1"),
        (lambda m: m.update(state=3), "manifest.json is not laid out as format 1"),
        (
            lambda m: m["files"].update({"role.safetensors": {}}),
            "role.safetensors is missing",
        ),
        (
            lambda m: m["files"]["inverse_worker.safetensors"].pop("sha256"),
            "manifest.json is not laid out as format 1",
        ),
        (
            lambda m: m["files"].update({"../x.safetensors": {}}),
            "manifest.json lists '../x.safetensors', which is not the file of a role",
        ),
        (
            lambda m: m["files"].update({"weights.pkl": {}}),
            "manifest.json lists 'weights.pkl', which is not the file of a role",
        ),
    ],
)
def test_a_manifest_that_this_version_cannot_use_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    save(tmp_path, 100)
    reseal(save(tmp_path, 200), change)
    loaded = load(tmp_path)
    assert (loaded.step, loaded.refused) == (
        100,
        (f"checkpoint step-00000200 refused: {message}",),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "manifest.json is not JSON"), ("[]", "manifest.json is not a JSON object")],
)
def test_a_sealed_manifest_that_cannot_be_read_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    save(tmp_path, 100)
    rewrite(save(tmp_path, 200), text)
    assert message in load(tmp_path).refused[0]


def test_keys_of_a_later_minor_version_are_tolerated(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    (path / "notes.txt").write_text("mine")
    reseal(
        path, lambda m: (m.update(host="x"), m["files"]["inverse_worker.safetensors"].update(n=1))
    )
    assert load(tmp_path).state == STATE


def test_a_role_file_with_the_right_hash_that_is_not_safetensors_is_refused(
    tmp_path: Path,
) -> None:
    save(tmp_path, 100)
    path = save(tmp_path, 200)
    content = b"\x80\x04K\x01."  # a pickle
    (path / "inverse_worker.safetensors").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    reseal(path, lambda m: m["files"].update({"inverse_worker.safetensors": entry}))
    assert "inverse_worker.safetensors cannot be read" in load(tmp_path).refused[0]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 100)
    role = save(tmp_path, 200) / "inverse_worker.safetensors"
    role.unlink()
    role.mkdir()
    loaded = load(tmp_path)
    assert loaded.step == 100
    assert "Is a directory" in loaded.refused[0]


def test_when_all_are_refused_the_message_names_each(tmp_path: Path) -> None:
    for step in (100, 200):
        (save(tmp_path, step) / "manifest.json").unlink()
    with pytest.raises(NotFoundError) as caught:
        load_newest(tmp_path)
    assert "checkpoint step-00000200 refused: manifest.json is missing" in caught.value.message
    assert "checkpoint step-00000100 refused: manifest.json is missing" in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step of a checkpoint must be at least 0; got -1"),
        ({"keep": 0}, r"checkpoint\.keep must be at least 1; got 0"),
        ({"roles": {"../role": {}}}, r"'-' and '_'; got '\.\./role'"),
        ({"roles": {"": {}}}, "'-' and '_'; got ''"),
        ({"state": {"loss": math.nan}}, "JSON"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    valid: dict[str, Any] = {"step": 1, "roles": ROLES, "state": {}, "keep": 1}
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "checkpoints", **(valid | arguments))
    assert not (tmp_path / "checkpoints").exists()


def test_a_wrong_role_name_is_an_invalid_spec() -> None:
    with pytest.raises(InvalidSpecError):
        write_checkpoint(Path("unused"), 1, {"a b": {}}, {}, keep=1)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 100)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(JobFailedError, match="step 200 cannot be written") as caught:
            save(tmp_path, 200)
    assert caught.value.reason == "checkpoint_not_written"
    assert "No space left on device" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]


class PowerCut(BaseException):
    """The machine stopped."""


class Machine:
    """Stops at its n-th operation on the file system; nothing works from then on."""

    def __init__(self, patched: pytest.MonkeyPatch, stop_at: int) -> None:
        self.left = stop_at
        for owner, name in (
            (os, "fsync"),
            (Path, "mkdir"),
            (Path, "open"),
            (Path, "rename"),
            (shutil, "rmtree"),
        ):
            patched.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                if self.left == -1 and operation is REMOVE_TREE:
                    next(iter(args[0].iterdir())).unlink()  # only half of it is removed
                raise PowerCut
            return operation(*args, **kwargs)

        return guarded


REMOVE_TREE = shutil.rmtree


def is_whole(path: Path, scratch: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=scratch) as alone:
        shutil.copytree(path, Path(alone) / path.name)
        return load(Path(alone)).path.name == path.name


@pytest.mark.parametrize("step", [200, 300], ids=["replacing", "new"])
def test_a_power_cut_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    stop_at, finished = 0, False
    while not finished:
        folder = tmp_path / str(stop_at)
        save(folder, 100, keep=2, attempt=1)
        save(folder, 200, keep=2, attempt=1)
        with pytest.MonkeyPatch.context() as patched:
            Machine(patched, stop_at)
            try:
                save(folder, step, keep=2, attempt=2)
                finished = True
            except PowerCut:
                pass
        loaded = load(folder)
        assert loaded.refused == ()
        assert (loaded.step, loaded.state["attempt"]) in {(200, 1), (step, 2)}
        assert all(is_whole(info.path, tmp_path) for info in list_checkpoints(folder))
        save(folder, step, keep=2, attempt=3)
        assert load(folder).state["attempt"] == 3
        expected = sorted({100, 200, step})[-2:]
        assert [path.name for path in sorted(folder.iterdir())] == [
            f"step-{kept:08d}" for kept in expected
        ]
        stop_at += 1
    assert stop_at > 8


def test_a_run_folder_that_is_gone_does_not_come_back_as_a_stump(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match="cannot be written"):
        write_checkpoint(tmp_path / "gone" / "checkpoints", 5, ROLES, STATE, keep=3)
    assert not (tmp_path / "gone").exists()


def test_a_checkpoint_without_a_part_that_is_needed_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 100)
    newest = save(tmp_path, 200)
    reseal(newest, lambda manifest: manifest["files"].pop("parameter_server.safetensors"))

    def lacks(loaded: LoadedCheckpoint) -> str | None:
        return None if "parameter_server" in loaded.roles else "role parameter_server"

    loaded = load_newest(tmp_path, lacks=lacks)
    assert loaded is not None
    assert loaded.step == 100
    (refused,) = loaded.refused
    assert refused.endswith("step-00000200 refused: manifest.json has no role parameter_server")
