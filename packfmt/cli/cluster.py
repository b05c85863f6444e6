"""A Dask cluster as an executor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from packfmt.errors import MachineError

PATIENCE = 20  # seconds that a scheduler may take to answer
RETRIES = 2  # of a part that failed; one whose worker was killed is begun again by the scheduler itself


@contextmanager
def executor(address: str) -> Iterator[Executor]:
    """The workers of the scheduler at an address, such as tcp://10.0.0.1:8786.

    Raises
    ------
    MachineError
        If Dask is not installed, or no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MachineError("--scheduler: Dask is not installed; pip install 'packfmt[dask]'") from error
    import logging

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is told once, by us
    try:
        client = Client(address or "nowhere", timeout=PATIENCE)  # without any address it would start its own
    except (OSError, ValueError) as error:
        raise MachineError(f"{address!r}: no Dask scheduler answers there, such as at tcp://10.0.0.1:8786") from error
    with client:
        if not client.nthreads():
            print(f"{address}: no workers yet", file=sys.stderr)
        yield client.get_executor(pure=False, retries=RETRIES)
