"""`extproc`, whose questions to Redis may take their time: `python -m tests.integration.patient_process gate`.

As shipped a directive is given 5 ms and a count 20 ms, which a busy machine misses now and then: what is answered then
is right, and not what these tests are about.
"""

from __future__ import annotations

import os

from extproc.cli import GRPC_EXPERIMENTS, main

PATIENCE_S = 0.25
"""Short of what a request waits for its directive in these tests: there must be time for the service after it."""


def be_patient() -> None:
    os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)  # as `main` does, before gRPC is imported
    from extproc import serve
    from extproc.directives import client

    serve._REDIS_TIMEOUT_S = client.REDIS_TIMEOUT_S = PATIENCE_S


if __name__ == "__main__":
    if os.environ.get("IBEX_REDIS_URL"):  # without it a filter does not even load what asks for directives
        be_patient()
    main()
