"""Every name that crosses a process border, once: who sets it, who reads it.

`contract.md` section 2 fixes the headers; Envoy matches header names in lower case, so they stand in lower case here.
"""

# Headers of a request. Those of an identity (x-ibex-agent-id, x-ibex-user-id) are settings: see `IBEX_IDENTITY_*`.
SESSION_ID_HEADER = "x-ibex-session-id"
"""Client sets (1-64 visible ASCII characters), filter reads, mints when absent, and echoes on the response."""
SKIP_MEMORY_HEADER = "x-ibex-skip-memory"
"""Client sets to 1, true, yes or on; filter reads."""
SKIP_EXTRACTION_HEADER = "x-ibex-skip-extraction"
"""Client sets to the same values; observer reads: no text is kept of the turn, and nothing learnt from it."""
REQUEST_ID_HEADER = "x-request-id"
"""Envoy sets, everyone reads."""

# Headers of a response. The filter sets them; Envoy has a default for each, for when the filter cannot answer.
MEMORIES_INJECTED_HEADER = "x-ibex-memories-injected"
CONTEXT_TOKENS_HEADER = "x-ibex-context-tokens"
CONTEXT_FALLBACK_HEADER = "x-ibex-context-fallback"

# Envoy's dynamic metadata.
CONTEXT_METADATA = "ibex.context"
"""Filter sets with the body reply; access log and observer read. Keys: see `extproc.filter.report`."""

GATE_METADATA = "envoy.filters.http.ext_authz"
"""Gate sets, allowed or denied, and Envoy names it after the filter's type, whatever the filter is called; filter and
observer take identities from it, access log and observer read the rest. Keys: see `extproc.gate.wire`."""

# Span attributes: GenAI semantic conventions where they have a name, `ibex.` elsewhere. Ids and numbers, never content.
GEN_AI_OPERATION_NAME = "gen_ai.operation.name"
GEN_AI_DATA_SOURCE_ID = "gen_ai.data_source.id"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_AGENT_ID = "gen_ai.agent.id"
GEN_AI_CONVERSATION_ID = "gen_ai.conversation.id"
MEMORY_IDS_ATTRIBUTE = "ibex.memory.ids"
MEMORY_SCORES_ATTRIBUTE = "ibex.memory.scores"
MEMORIES_INCLUDED_ATTRIBUTE = "ibex.memory.included"
CANDIDATES_ATTRIBUTE = "ibex.memory.candidates"
CONTEXT_TOKENS_ATTRIBUTE = "ibex.context.tokens"
DIRECTIVE_VERSION_ATTRIBUTE = "ibex.directive.version_id"
OUTCOME_ATTRIBUTE = "ibex.context.outcome"
STAGE_MS_ATTRIBUTE = "ibex.stage.{}_ms"
"""Float, one for each stage of `extproc.context.engine.Stage`."""
ORG_ATTRIBUTE = "ibex.org.id"
REQUEST_ID_ATTRIBUTE = "ibex.request.id"
TOKEN_ID_ATTRIBUTE = "ibex.token.id"  # noqa: S105 - a name

# A row of `failed_tasks`.
DEADLY_TASK = "deadly"
"""`payload.reason`: processes died of it. The worker sets; the observer's sweeper leaves its session alone."""
