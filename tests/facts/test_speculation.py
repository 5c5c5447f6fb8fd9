"""The fear: a study of steps that are taken back whose "exact" way is not, or whose inverse is the wrong formula."""

from __future__ import annotations

import pytest
import torch

from bench.speculation import STATES, Windows, worth


@pytest.fixture
def windows() -> Windows:
    with torch.no_grad():
        return Windows(2, 4099, seed=1)


@torch.no_grad()
def test_saving_takes_a_step_back_to_the_bit(windows: Windows) -> None:
    before = [{name: value.clone() for name, value in windows.states(index)} for index in range(2)]
    windows.new_gradients(3.0)
    windows.step(windows.save)
    after = [{name: value.clone() for name, value in windows.states(index)} for index in range(2)]
    windows.copy_back()
    for index in range(2):
        assert all(torch.equal(value, before[index][name]) for name, value in windows.states(index))
    windows.step()
    for index in range(2):
        assert all(torch.equal(value, after[index][name]) for name, value in windows.states(index))
        assert not torch.equal(after[index]["master"], before[index]["master"])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_inverse_is_near_but_other(windows: Windows, scale: float) -> None:
    windows.new_gradients(scale)
    windows.step(windows.save)
    solved = windows.solved_back(1)
    for name in STATES:
        former = windows.saved[1][name]
        largest = former.abs().max().item()
        torch.testing.assert_close(solved[name], former, rtol=0, atol=2e-5 * largest)
        assert not torch.equal(solved[name], former), name
        assert (dict(windows.states(1))[name] - former).abs().max() > 1e-3 * largest, (
            "the step changed nothing to speak of"
        )


def test_worth() -> None:
    # Half of backward, 1.5 times as long with saving: all of it is hidden.
    assert worth(0.5, factor=1.2, saving=1.5, back=1.0) == (1.0, 0.5)
    # As long as backward: half a step sticks out, and half a step is gained.
    assert worth(1.0, factor=1.2, saving=1.5, back=1.0) == (0.5, 0.25)
    assert worth(1.0, factor=1.2, saving=2.5, back=1.0) == (-0.5, 0.0)
