"""A memory filter for Envoy."""
