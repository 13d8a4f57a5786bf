"""How much of the project's own corpus the engine finds (see bench/README.md)."""
