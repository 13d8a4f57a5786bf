"""Memories: what they are, where they are kept, and the commands that manage them."""
