"""How much of LoCoMo's evidence the engine finds (see bench/README.md)."""
