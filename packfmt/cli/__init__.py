"""The command line. A command is parsing, one call, printing; errors become one line and an exit code here.

Exit codes: 0 good; 1 findings or differences; 2 wrong usage or a refused plan; 3 input that cannot be
read, or an environment failure; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

STOPPED = "interrupted; nothing was left half-written"
GOOD, FOUND, REFUSED, FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def main() -> None:
    """Run the command line and exit with its code. A request to terminate ends it as an interrupt does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        code = run()
    except KeyboardInterrupt:  # while modules were imported
        code = _say(STOPPED, INTERRUPTED)
    if code == INTERRUPTED:
        # An interrupt that falls into the start of a pool's thread leaves that thread waiting for work
        # and Python, on its way out, waiting for the thread. All files are closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Everything that goes wrong is told in one line on stderr."""
    from typer.exceptions import Abort, TyperException

    from packfmt.cli.options import app
    from packfmt.errors import MismatchError, PackfmtError, PlanError, why

    for room in ("making", "reading", "benching"):  # each adds its commands to the application
        import_module(f"packfmt.cli.{room}")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments:
            app(["--help"], prog_name="packfmt", standalone_mode=False)
            return REFUSED
        result = app(arguments, prog_name="packfmt", standalone_mode=False)
        if result == INTERRUPTED:
            return _say(STOPPED, INTERRUPTED)
        return result if isinstance(result, int) else GOOD
    except TyperException as error:
        return _usage(error)
    except (KeyboardInterrupt, Abort) as stop:
        return _say(str(stop) or STOPPED, INTERRUPTED)
    except MismatchError as error:
        return _say(str(error), FOUND)
    except PlanError as error:
        return _say(str(error), REFUSED)
    except PackfmtError as error:
        return _say(str(error), FAILED)
    except OSError as error:
        return _say(f"{error.filename or ''}: {why(error)}".lstrip(": "), FAILED)
    except MemoryError:
        return _say(
            "out of memory; packfmt plan says how much a conversion holds at once; measure smaller shapes or batches",
            FAILED,
        )
    except Exception as error:
        if os.environ.get("PACKFMT_TRACEBACK"):
            raise
        kind = type(error).__name__
        return _say(f"a fault in packfmt: {kind}: {error}; PACKFMT_TRACEBACK=1 shows where", FAILED)


def _usage(error: Any) -> int:
    """Wrong usage in one line, and where help is."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "packfmt"
    return _say(f"{error.format_message().rstrip('.')}; {command} --help says more", REFUSED)


def _say(message: str, code: int) -> int:
    print(f"packfmt: {message}", file=sys.stderr)
    return code
