"""What was said becomes what is remembered: extraction, consolidation, and the task around them."""
