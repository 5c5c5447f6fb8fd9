"""Imported once, by the process that ranks are forks of: what every rank needs, so that none imports it again.

A fork that may die with its parent needs a parent that does so too.
"""

from __future__ import annotations

import torch._dynamo  # noqa: F401 - torch imports it with a process's first optimizer, for seconds

import shardwise.zero.engine  # noqa: F401
import tests.ranks
import tests.world.engine_runs

tests.ranks.die_with_parent()
