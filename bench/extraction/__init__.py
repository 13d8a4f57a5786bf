"""How much of what was said is extracted, and how much of what is extracted was said: `python -m bench.extraction`."""
