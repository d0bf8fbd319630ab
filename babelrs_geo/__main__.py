"""The command line as a program: `babelrs-geo`, or `python -m babelrs_geo`."""

import atexit
import os
import sys
import threading

from babelrs_geo import cli


def main() -> None:
    """Run it, and end at once. To take apart what torch and pandas built would take most of a second, after which the
    process is gone in any case.
    """
    try:
        cli.main()
    except SystemExit as end:
        if not isinstance(end.code, int) or threading.active_count() > 1:  # Python waits for other threads
            raise
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # Python says so
            raise end from None
        atexit._run_exitfuncs()
        os._exit(end.code)


if __name__ == "__main__":
    main()
