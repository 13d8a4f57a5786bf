"""What the filter costs: Envoy alone, Envoy with a bare processor, Envoy with this project's filter, in one run.

`python -m bench.overhead --help`; the method and how to read the result are in `bench/README.md`.
"""
