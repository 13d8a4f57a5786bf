"""The gate: may this request pass, for whom, and how often? Closed on every doubt."""
