"""Fear: a file of somebody else's does something else than give its tensors, or gives others than it holds.

Whatever a file holds, reading it gives plain values or a CheckpointError: nothing runs, nothing hangs.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.checkpoint.convert import convert_checkpoint
from shardwise.checkpoint.foreign import unpickler
from shardwise.checkpoint.foreign.open import read_foreign
from shardwise.checkpoint.foreign.source import Source
from shardwise.checkpoint.foreign.torch_file import Stored, TorchFile
from shardwise.checkpoint.foreign.unpickler import plain, read_pickle
from shardwise.checkpoint.load import Checkpoint
from shardwise.errors import CheckpointError
from tests.foreign import unpack

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ("z2-w2-fp32", "z3-w2-bf16", "z1-w2-bf16-optimizer")


def refuse(reference: Any) -> Any:
    raise ValueError(reference)


def read(data: bytes) -> Any:
    return read_pickle(data, {}, refuse, frozenset(), "file.pt")


def read_everything(source: Source) -> None:
    for cells in source.cells:
        for cell in cells.values():
            assert cell.values(0, cell.numel).numel() == cell.numel
            cell.stored.tensor().clone()


# --- hostile pickles --------------------------------------------------------------------------------------------------


class Calls:
    """Pickled, it asks for a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.request = function, arguments

    def __reduce__(self) -> Any:
        return self.request


def payloads(sentinel: Path) -> dict[str, bytes]:
    """Pickles that would leave a file, if anything in them ran, and the name that must be told."""
    touch = f"open({str(sentinel)!r}, 'w')"
    found = {}
    for protocol in (2, 4):
        for name, call in {
            "posix.system": Calls(os.system, f"touch {sentinel}"),
            "builtins.eval": Calls(eval, touch),
            "builtins.exec": Calls(exec, touch),
            "builtins.getattr": Calls(getattr, "x", "upper"),
            "torch.serialization.load": Calls(torch.load, str(sentinel)),
            "shutil.copyfile": Calls(shutil.copyfile, "/etc/hostname", str(sentinel)),
            "numpy.memmap": Calls(np.memmap, str(sentinel), "u1", "w+", 0, (5,)),
        }.items():
            found[f"{name}/{protocol}"] = pickle.dumps({"module": [call]}, protocol)
    code = touch.encode()
    text = b"X" + len(code).to_bytes(4, "little") + code
    found["builtins.eval/inst"] = b"(" + text + b"ibuiltins\neval\n."
    found["builtins.eval/obj"] = b"(cbuiltins\neval\n" + text + b"o."
    found["posix.system/dotted"] = b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93\x8c\x05posix\x8c\x06system\x93."
    return found


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    for name, data in payloads(sentinel).items():
        with pytest.raises(CheckpointError) as caught:
            read(data)
        # Old protocols have the names of Python 2's modules.
        wanted = name.partition("/")[0].rpartition(".")[2]
        assert f".{wanted}'" in str(caught.value), name
        assert not sentinel.exists(), name


def test_a_payload_in_a_real_file_is_refused_by_name(tmp_path: Path) -> None:
    recording = unpack("z2-w2-fp32", tmp_path)
    sentinel = tmp_path / "sentinel"
    for path in sorted(recording.own_directory.glob("*.pt")):
        before = path.read_bytes()
        torch.save({"module": {}, "optimizer_state_dict": Calls(os.system, f"touch {sentinel}")}, path)
        with pytest.raises(CheckpointError, match=r"posix\.system") as caught:
            Checkpoint(recording.own_directory)
        assert path.name in str(caught.value)
        with pytest.raises(CheckpointError, match=r"posix\.system"):
            convert_checkpoint(recording.own_directory, tmp_path / "out")
        assert not sentinel.exists() and not list((tmp_path / "out").rglob("manifest.json"))
        path.write_bytes(before)


def test_attributes_are_never_set_on_what_is_shared() -> None:
    """BUILD on a class, or on a value of ours, must not leave anything behind for the next file."""
    on_class = b"\x80\x02ccollections\nCounter\nN}X\x05\x00\x00\x00itemsK\x01s\x86b."
    on_name = b"\x80\x02cdeepspeed.utils.tensor_fragment\nfragment_address\nN}X\x01\x00\x00\x00xK\x01s\x86b."
    for data in (on_class, on_name):
        with pytest.raises(CheckpointError):
            read(data)
    assert Counter("aa").items()


@pytest.mark.parametrize("value", [
    {"a": [1, 2.5, None, True, "text", b"bytes"], (1, "x"): {2, 3}},
    OrderedDict(one=Counter("hello")),
    {"scalar": np.float64(2.5), "array": np.arange(6, dtype="<i4").reshape(2, 3), "flag": np.bool_(True)},
    {"big": 1 << 80, "neg": -(1 << 40), "dtype": torch.bfloat16, "size": torch.Size([3, 4])},
])  # fmt: skip
def test_plain_values_come_back(value: Any) -> None:
    for protocol in (2, 4):
        found = plain(read(pickle.dumps(value, protocol)), "file.pt")
        assert repr(found) == repr(plain(value, "here", lambda x: x.item() if isinstance(x, np.generic) else x))


def test_values_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickler, "MAX_VALUES", 10_000)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nests"):
        plain(read(pickle.dumps(loop, 2)), "client_state")
    laughs: Any = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    with pytest.raises(CheckpointError, match="parts"):
        plain(read(pickle.dumps(laughs, 2)), "client_state")
    key: Any = ()
    for _ in range(40):
        key = (key, key)
    with pytest.raises(CheckpointError, match="damaged"):
        # A hash of it takes longer than there is time; so it is never taken.
        read(b"\x80\x02}" + pickle.dumps(key, 2)[2:-1] + b"K\x01s.")


@QUICK
@given(st.lists(st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes]) | st.binary(max_size=6)))
def test_any_program_ends_with_a_value_or_an_error(program: list[bytes]) -> None:
    with contextlib.suppress(CheckpointError):
        plain(read(b"\x80\x02" + b"".join(program) + b"."), "file.pt")


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {name: unpack(name, folder).own_directory for name in NAMES}


@QUICK
@given(data=st.data())
def test_a_damaged_file_gives_tensors_or_an_error(data: st.DataObject, originals: dict[str, Path]) -> None:
    own = originals[data.draw(st.sampled_from(NAMES))]
    path = data.draw(st.sampled_from(sorted(own.glob("*.pt"))))
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
    if how == "flip":
        after = before[:at] + bytes([before[at] ^ (1 << data.draw(st.integers(0, 7)))]) + before[at + 1 :]
    elif how == "cut":
        after = before[:at]
    elif how == "insert":
        after = before[:at] + data.draw(st.binary(min_size=1, max_size=9)) + before[at:]
    else:
        other = data.draw(st.integers(0, len(before) - 8))
        after = before[:at] + before[other : other + 8] + before[at + 8 :]
    path.write_bytes(after)
    try:
        source = read_foreign(own)
        read_everything(source)
        source.close()
    except CheckpointError:
        pass
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_finds_a_flipped_bit_in_a_tensor(name: str, tmp_path: Path) -> None:
    own = unpack(name, tmp_path).own_directory
    for path in sorted(own.glob("*.pt")):
        before = path.read_bytes()
        file = TorchFile(path)
        stored = first_tensor(file.value)
        at = stored.begin + 1
        path.write_bytes(before[:at] + bytes([before[at] ^ 16]) + before[at + 1 :])
        with pytest.raises(CheckpointError, match="checksum") as caught:
            convert_checkpoint(own, tmp_path / "out")
        assert path.name in str(caught.value)
        assert not list((tmp_path / "out").rglob("*.safetensors")), "a half was left behind"
        path.write_bytes(before)
    convert_checkpoint(own, tmp_path / "out")


def first_tensor(value: Any) -> Stored:
    """Of a nest, one that has elements and is used."""
    if isinstance(value, Stored):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in items:
        found = first_tensor(item)
        if found is not None and found.numel:
            return found
    return None  # type: ignore[return-value]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


def test_tensors_that_claim_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"wide": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(CheckpointError, match="does not lie in its data"):
        TorchFile(path)
    torch.save({"view": torch.arange(10.0)[3:7], "turned": torch.arange(6.0).view(2, 3).t(), "none": torch.empty(0, 4)},
               path)  # fmt: skip
    value = TorchFile(path).value
    assert value["view"].tensor().tolist() == [3, 4, 5, 6]
    assert value["turned"].tensor().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert value["turned"].flat(1, 4).tolist() == [3, 1, 4]
    assert value["none"].tensor().shape == (0, 4)


def test_other_containers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="zip format"):
        TorchFile(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="zip format"):
        TorchFile(path)
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(300)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        TorchFile(tmp_path / "absent.pt")


# --- layouts ----------------------------------------------------------------------------------------------------------


def add(name: str) -> Callable[[Path], None]:
    def change(own: Path) -> None:
        shutil.copyfile(next(own.glob("*_model_states.pt")), own / name)

    return change


def add_folder(own: Path) -> None:
    (own / "offloaded_tensors").mkdir()


def remove(name: str) -> Callable[[Path], None]:
    def change(own: Path) -> None:
        (own / name).unlink()

    return change


@pytest.mark.parametrize(("name", "change", "said"), [
    ("z2-w2-fp32", add("mp_rank_01_model_states.pt"), "tensor parallelism"),
    ("z3-w2-bf16", add("zero_pp_rank_0_mp_rank_01_model_states.pt"), "tensor parallelism"),
    ("z2-w2-fp32", add("layer_01-model_00-model_states.pt"), "pipeline"),
    ("z2-w2-fp32", add("layer_0_expert_3_mp_rank_00_model_states.pt"), "experts"),
    ("z2-w2-fp32", add_folder, "offloaded"),
    ("z2-w2-fp32", remove("zero_pp_rank_0_mp_rank_00_optim_states.pt"), "no file of rank 0"),
    ("z2-w2-fp32", remove("zero_pp_rank_1_mp_rank_00_optim_states.pt"), "2 ranks"),
    ("z2-w2-fp32", remove("mp_rank_00_model_states.pt"), "0 files of model states"),
    ("z3-w2-bf16", remove("zero_pp_rank_1_mp_rank_00_model_states.pt"), "1 files of model states"),
])  # fmt: skip
def test_other_layouts_are_one_clear_error(
    name: str, change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    own = unpack(name, tmp_path).own_directory
    change(own)
    with pytest.raises(CheckpointError, match=said):
        read_foreign(own)


def test_files_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    own = unpack("z2-w2-fp32", tmp_path).own_directory
    other = unpack("z2-w3-fp32", tmp_path).own_directory
    shutil.copyfile(other / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
                    own / "zero_pp_rank_1_mp_rank_00_optim_states.pt")  # fmt: skip
    with pytest.raises(CheckpointError):
        read_foreign(own)
