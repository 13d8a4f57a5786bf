"""How fast the engine answers, and what it holds, by the size of a namespace (see bench/README.md)."""
