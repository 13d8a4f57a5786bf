"""What operators see: spans, metrics, logs. Ids and numbers, never content."""
