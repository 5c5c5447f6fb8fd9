"""`import shardwise` is quick: heavy libraries come in with the first name that needs them, the compiler never."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import shardwise


def modules_after(statements: str, *names: str) -> dict[str, bool]:
    """Run `statements` in a fresh interpreter; whether each of the modules `names` is loaded then."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps({{name: name in sys.modules for name in {names!r}}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "statements",
    [
        "import shardwise",
        "from shardwise import ConfigError, StateError, CollectiveError, ShardwiseError",
        "import shardwise; shardwise.__version__; dir(shardwise)",
        "import shardwise.layout, shardwise.errors",
        "import shardwise.config",
    ],
)
def test_torch_is_not_loaded(statements: str) -> None:
    assert modules_after(statements, "torch", "numpy", "transformers") == {
        "torch": False,
        "numpy": False,
        "transformers": False,
    }


def test_the_engine_loads_torch_but_neither_its_compiler_nor_its_checkpoints() -> None:
    slow = ("torch._dynamo", "torch.distributed.checkpoint", "sympy")
    before = f"import sys, torch; loaded = {{name for name in {slow!r} if name in sys.modules}}"
    added = "import shardwise; shardwise.initialize; shardwise.Engine; assert 'shardwise.zero.engine' in sys.modules"
    forget = "for name in loaded: del sys.modules[name]"  # what torch alone brings is not our doing
    assert modules_after(f"{before}\n{added}\n{forget}", *slow) == dict.fromkeys(slow, False)


def test_every_public_name_is_there() -> None:
    for name in shardwise.__all__:
        value = getattr(shardwise, name)
        assert value.__name__ == name
        assert value.__doc__
    assert set(shardwise.__all__) <= set(dir(shardwise)), "a name that completion does not offer"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'shardwise' has no attribute 'initialise'"):
        _ = shardwise.initialise
    assert not hasattr(shardwise, "missing")
