"""The generated modules are what the .proto files make; the numbers are the contract's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from ibex.auth.v1 import auth_pb2
from ibex.context.v1 import context_pb2

PROTO = Path(__file__).parents[2] / "proto"
BIN = Path(sys.executable).parent


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    files = sorted(str(file.relative_to(PROTO)) for file in PROTO.rglob("*.proto"))
    subprocess.run(
        [
            sys.executable,
            *("-m", "grpc_tools.protoc", "-I", "."),
            *(f"--plugin=protoc-gen-{name}={BIN / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")),
            *(f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python")),
            *(f"--{kind}_out=quiet:{tmp_path}" for kind in ("mypy", "mypy_grpc")),
            *files,
        ],
        cwd=PROTO,
        check=True,
        timeout=50,
    )
    made = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*.py*")}
    kept = {
        file.relative_to(PROTO): file.read_text()
        for file in PROTO.rglob("*_pb2*.py*")
        if "__pycache__" not in file.parts
    }
    assert len(made) == 12
    assert made == kept, "run `make proto`"


def numbers(message: Descriptor) -> dict[str, int]:
    return {field.name: field.number for field in message.fields}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            context_pb2.AssembleContextRequest,
            "agent_id org_id session_id query model directive_version_id available_tokens recent_messages options "
            "request_id trace_id span_id principal_context user_id=100",
        ),
        (
            context_pb2.AssemblyOptions,
            "skip_cold_memories skip_hot_memories recency_weight relevance_weight usefulness_weight confidence_weight "
            "max_memories",
        ),
        (
            context_pb2.AssembleContextResponse,
            "assembled_context tokens_used memories_included memories_used directive_tokens history_tokens "
            "memory_tokens metrics request_id trace_id span_id score_schema",
        ),
        (
            context_pb2.AssemblyMetrics,
            "budget_calculation_ms directive_load_ms hot_memory_retrieval_ms cold_memory_retrieval_ms ranking_ms "
            "packing_ms formatting_ms total_ms candidates_evaluated",
        ),
        (
            context_pb2.MemoryUsed,
            "memory_id composite_score relevance_score recency_score usefulness_score rank category exclusion "
            "similarity confidence token_estimate",
        ),
        (
            context_pb2.SearchMemoriesRequest,
            "agent_id org_id query limit min_similarity categories tags session_id user_id=100",
        ),
        (context_pb2.Memory, "id content category confidence composite_score retrieval_count created_at"),
        (context_pb2.RecordMemoryFeedbackRequest, "memory_ids session_id trace_id org_id feedback"),
        (context_pb2.MemoryScoreUpdate, "memory_id previous_score new_score"),
        (auth_pb2.ValidateTokenResponse, "org_id permissions agent_id user_id token_id expires_at"),
        (auth_pb2.CreateTokenRequest, "org_id name description type permissions expires_at user_id agent_id"),
        (auth_pb2.TokenMetadata, "token_id name prefix permissions expires_at created_at revoked_at is_revoked"),
        (
            auth_pb2.PrincipalContext,
            "org_id principal_id agent_id principal_type authz_snapshot_id authz_snapshot_digest authority issued_at "
            "expires_at request_id trace_id source permissions token_id",
        ),
    ],
    ids=lambda value: value.DESCRIPTOR.name if hasattr(value, "DESCRIPTOR") else "",
)
def test_field_numbers_are_the_contracts(message: type[context_pb2.Memory], expected: str) -> None:
    wanted: dict[str, int] = {}
    for number, field in enumerate(expected.split(), start=1):
        name, _, exception = field.partition("=")
        wanted[name] = int(exception) if exception else number
    assert numbers(message.DESCRIPTOR) == wanted
