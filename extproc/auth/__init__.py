"""The reference auth service: organisations, their agents, and tokens that prove who calls.

Any other `ibex.auth.v1.AuthService` can stand in its place: the gate knows this one by its gRPC interface alone.
"""
