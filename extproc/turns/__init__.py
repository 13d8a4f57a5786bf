"""After the response: a finished turn becomes a checkpoint, an extraction task and a trace row, and nothing is lost.

`turn` is what all of it is about; `outbox` keeps turns until everybody has them; `delivery` brings them there.
"""
