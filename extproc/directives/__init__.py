"""Directives: an agent's standing instruction, from the database to each request. `directive.py` says what one is."""
