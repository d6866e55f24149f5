"""``python -m benchmarks COMMAND``: see benchmarks/README.md."""

import sys

from benchmarks import report, serve

COMMANDS = {"serve": serve.main, "report": report.main}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [--help]", file=sys.stderr)
        return 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


sys.exit(main())
