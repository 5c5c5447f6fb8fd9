"""The first code of a machine that a launcher has started: takes its place in the run, then becomes its agent.

Run by path (`python node.py PLACE CAPSULE`) and from the standard library alone: what it sets, such as PYTHONPATH,
must hold before the package is loaded. PLACE is the machine's rank, or names a variable that holds its rank or name.
"""

import json
import os
import sys

# Of the launcher of one process a machine; the ranks below are not its ranks, and a library that believes so hangs.
MPI_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "HYDI_", "HYDRA_", "PRTE_", "MPI_LOCAL", "MV2_COMM_", "MPIR_", "I_MPI_HYDRA_")


def main() -> None:
    """Sets the variables, goes to the directory and starts `member` in this process's place."""
    place, text = sys.argv[1:]
    capsule = json.loads(text)
    names = [name for name, _ in capsule["hosts"]]
    rank = rank_of(place, names)
    for name in [name for name in os.environ if name.startswith(MPI_PREFIXES)]:
        del os.environ[name]
    os.environ.update(capsule["variables"])
    try:
        os.chdir(capsule["directory"])
    except OSError as error:
        sys.exit(
            f"error: {names[rank]} has not the directory {capsule['directory']} ({error.strerror}), which the run "
            "works in. Start it from a directory that every machine has under the same path."
        )
    os.execv(sys.executable, [sys.executable, "-m", "shardwise.launch.member", str(rank), str(os.getppid()), text])


def rank_of(place: str, names: list[str]) -> int:
    """This machine's rank, from the number or the variable that is its place."""
    if place.isdecimal():
        return int(place)
    said = os.environ.get(place, "")
    if said in names:
        return names.index(said)
    if said.isdecimal() and int(said) < len(names):
        return int(said)
    sys.exit(f"error: {place} is {said!r} on this machine, expected a rank or one of {', '.join(names)}.")


if __name__ == "__main__":
    main()
