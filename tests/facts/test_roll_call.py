"""The slow path of a roll call: who never comes is told from who is slow, and a late note convicts nobody."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta

import pytest

from shardwise import roll_call
from shardwise.errors import CollectiveError
from shardwise.roll_call import DistributedOperationException, Place, RollCall

RANK = 0


class Store:
    """Rank 1's notes and rank 0's door; the door opens when ``opens_after`` looks at it were in vain."""

    timeout = timedelta(seconds=0.3)

    def __init__(self, note: Place | None, opens_after: int | None = None) -> None:
        self.note = None if note is None else json.dumps(asdict(note)).encode()
        self.looks = 0
        self.opens_after = opens_after

    def add(self, key: str, amount: int) -> int:
        return 1

    def set(self, key: str, value: str) -> None:
        pass

    def get(self, key: str) -> bytes:
        assert key == "place/1" and self.note is not None
        return self.note

    def check(self, keys: list[str]) -> bool:
        if keys == ["place/1"]:
            return self.note is not None
        self.looks += 1
        return self.opens_after is not None and self.looks > self.opens_after

    def delete_key(self, key: str) -> bool:
        return True


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(roll_call, "LOOK_AGAIN_SECONDS", 0.0)


HERE = Place(1, 0, "gather", "float32[2]")


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (Place(1, 0, "wait_for_everyone"), "rank 1 is in wait_for_everyone"),
        (Place(1, 0, "", ended=True), "rank 1 has left its script"),
        (Place(0, 1, ""), "rank 1 has begun step 1 of training"),
        (Place(1, 1, "gather", "float32[2]"), "after 1 steps"),
    ],
)
def test_a_rank_elsewhere_is_an_error_that_names_both_places(there: Place, told: str) -> None:
    with pytest.raises(CollectiveError, match=r"rank 0 is in gather of float32\[2\]") as error:
        RollCall(Store(there), RANK, 2).answer("gather", "float32[2]")
    assert told in str(error.value)
    assert "all ranks" in str(error.value)
    assert not isinstance(error.value, DistributedOperationException)


def test_other_data_is_an_error_of_its_own() -> None:
    with pytest.raises(DistributedOperationException, match=r"rank 0 has float32\[2\], rank 1 has float32\[3\]"):
        RollCall(Store(Place(1, 0, "gather", "float32[3]")), RANK, 2).answer("gather", "float32[2]")


def test_a_long_structure_is_shown_where_it_differs() -> None:
    mine, others = ("x" * 1000 + end + "y" * 1000 for end in ("MINE", "OTHER"))
    with pytest.raises(DistributedOperationException, match=r"MINE.*OTHER") as error:
        RollCall(Store(Place(1, 0, "gather", others)), RANK, 2).answer("gather", mine)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("there", [None, Place(0, 0, "wait_for_everyone"), Place(0, 0, ""), HERE])
def test_a_rank_of_which_nothing_bad_is_known_is_waited_for(there: Place | None) -> None:
    RollCall(Store(there, opens_after=20), RANK, 2).answer("gather", "float32[2]")
    with pytest.raises(CollectiveError, match="did not come"):
        RollCall(Store(there), RANK, 2).answer("gather", "float32[2]")


@pytest.mark.parametrize("there", [Place(1, 1, ""), Place(2, 0, "", ended=True), Place(2, 0, "reduce")])
def test_a_note_from_behind_the_door_convicts_nobody(there: Place) -> None:
    """The door opens between this rank's look at it and its look at the notes."""
    RollCall(Store(there, opens_after=1), RANK, 2).answer("gather", "float32[2]")
