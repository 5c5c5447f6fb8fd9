"""One rank of the self-test."""

import os
import sys
from pathlib import Path

from shardwise.selftest.job import run

run(Path(sys.argv[1]), os.environ)
