"""What this package can tell on the command line: ``python -m sofim_fused``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sofim_fused import bench, info, memory

COMMANDS = {
    "info": (info, "what was built, and which backend each device uses and why"),
    "memory": (memory, "what training a model takes, before any of it is allocated"),
    "bench": (bench, "the time of steps on this machine, beside PyTorch's SGD and AdamW"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sofim_fused", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (module, what) in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        module.configure(parsers[name])
    options = parser.parse_args(arguments)
    try:
        for line in COMMANDS[options.command][0].run(options):
            print(line, flush=True)
    except ValueError as error:
        parsers[options.command].error(str(error))


if __name__ == "__main__":
    main()
