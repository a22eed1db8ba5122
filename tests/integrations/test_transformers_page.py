"""The code of docs/integrations.md runs, as it is there."""

import re

import pytest

from tests.paths import ROOT

pytest.importorskip("transformers", reason="needs the extra integrations")
pytest.importorskip("peft", reason="needs the extra integrations")
pytest.importorskip("lightning", reason="needs the extra integrations")
pytest.importorskip("accelerate", reason="needs the extra integrations")

from accelerate.state import AcceleratorState

PAGE = (ROOT / "docs/integrations.md").read_text()
SECTIONS = re.split(r"^## ", PAGE, flags=re.M)[1:]
BLOCKS = {
    section.splitlines()[0]: code
    for section in SECTIONS
    for code in re.findall(r"```python\n(.*?)```", section, re.S)
}


@pytest.fixture(autouse=True)
def no_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_library_has_an_example():
    assert list(BLOCKS) == [
        "Any model", "transformers", "Trainer", "peft", "Lightning", "Accelerate",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", list(BLOCKS))
def test_examples_run(library, capsys):
    exec(compile(BLOCKS[library], f"docs/integrations.md, {library}", "exec"), {"__name__": "page"})
    loss = re.search(r"after 20 steps: ([\d.]+)", capsys.readouterr().out)
    assert loss is not None
    assert float(loss[1]) < {"peft": 2.45}.get(library, 2.3)
