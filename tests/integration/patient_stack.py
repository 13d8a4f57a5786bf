"""An `extproc up` whose parts may take their time, for tests whose subject is something else.

On a busy machine each limit is missed now and then: the context filter's 45 ms, the engine's 35, Envoy's 100 and its
300 for the gate. What is answered then has tests of its own, with the limits as shipped.
"""

from __future__ import annotations

import shlex
from pathlib import Path

_SETTINGS = {
    "IBEX_AUTH_TIMEOUT_MS": "1000",
    "IBEX_BUDGET_MS": "1000",
    "IBEX_DIRECTIVE_WAIT_MS": "500",
    "IBEX_RETRIEVAL_WALL_MS": "900",
}
_ENVOY = r"""#!/bin/sh
# Envoy, with the configuration that it is given changed in its place.
for word; do
  if [ "$before" = --config-path ]; then
    sed -E -i \
      -e 's/(message_timeout|connect_timeout): 0\..*/\1: 5s/' \
      -e 's/^( *(- )?)timeout: 0\.3s$/\1timeout: 5s/' \
      -e 's/^( *(- )?)timeout: 1s$/\1timeout: 10s/' \
      -e 's/unhealthy_threshold: 2$/unhealthy_threshold: 100/' \
      "$word"
    grep -q 'message_timeout: 5s' "$word" && grep -q 'unhealthy_threshold: 100' "$word" || exit 9
  fi
  before=$word
done
exec {binary} "$@"
"""


def patience(envoy: Path, directory: Path) -> dict[str, str]:
    """Variables for `extproc up`; a script that `directory` keeps stands before Envoy."""
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / "patient-envoy"
    script.write_text(_ENVOY.replace("{binary}", shlex.quote(str(envoy))))
    script.chmod(0o755)
    return {**_SETTINGS, "IBEX_ENVOY": str(script)}
