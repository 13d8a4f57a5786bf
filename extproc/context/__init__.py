"""The engine: finds the memories that matter to a request and writes the block that goes into it."""
