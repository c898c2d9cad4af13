"""Every config loads, is a locked ConfigDict, and its model sections describe models that exist."""

from pathlib import Path

import pytest

from experiments import door
from swallow_jax import hf, llama, mesh, optim, run

ROOT = Path(__file__).parent.parent
FILES = sorted(
    str(f.relative_to(ROOT)) for f in (ROOT / "configs").rglob("*.py") if f.stem not in ("__init__", "models", "meshes")
)


@pytest.mark.parametrize("file", FILES)
def test_config_loads_and_its_sections_become_dataclasses(file):
    config = door.load_config(str(ROOT / file))
    assert config.is_locked
    for name, cls in (("mesh", mesh.MeshConfig), ("compute", llama.Compute), ("optim", optim.OptimConfig)):
        if name in config:
            run.build(cls, config[name].to_dict(), name)
    if config.get("model"):
        shape = hf.parse_config(config.model.to_dict(), file)
        assert llama.parameter_count(shape)[0] > 0
    assert (ROOT / file).read_text(encoding="utf-8").startswith('"""'), "a config opens with its question and command"
