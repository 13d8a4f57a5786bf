"""What watching costs: CPU per streamed chunk, memory over many streams, and what a client sees of it behind an Envoy.

`python -m bench.observer --help`; the method and how to read the result are in `bench/README.md`.
"""
