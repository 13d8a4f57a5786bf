"""What a worker's process extracts with: built from the settings, in the process that uses it."""

from __future__ import annotations

from contextlib import suppress

from extproc.memory.database import Database
from extproc.memory.embedding import ModelUnusable, StaticTable, embedding_choice
from extproc.memory.features import open_indexer
from extproc.memory.store import MemoryStore, StoreError, open_store, store_url
from extproc.settings import SettingsError, WorkerSettings
from extproc.worker.extract import Extractor
from extproc.worker.failed import FailedTask, FailedTasks
from extproc.worker.llm import LlmEndpoint, LlmExtractor
from extproc.worker.rules import RuleExtractor
from extproc.worker.secrets import ALWAYS, PII
from extproc.worker.session import SessionExtraction

__all__ = ["Parts", "open_extractor"]


class Parts:
    """Opened at the first use, so that a database that is away at start is a failure of the task, which waits for it.

    Of one process: connections do not survive a fork.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Raises SettingsError; nobody is reached."""
        self._settings = settings
        self._extractor = open_extractor(settings)
        self._database: Database | None = None
        self._store: MemoryStore | None = None
        self._extraction: SessionExtraction | None = None

    def extraction(self) -> SessionExtraction:
        """Raises StoreError and SettingsError."""
        if self._extraction is None:
            self._extraction = self._open()
        return self._extraction

    def set_aside(self, task: FailedTask) -> None:
        """Raises StoreError."""
        FailedTasks(self._opened_database()).put(task)

    def close(self) -> None:
        with suppress(StoreError):
            for part in (self._store, self._database):
                if part is not None:
                    part.close()
        self._database = self._store = self._extraction = None

    def _open(self) -> SessionExtraction:
        settings = self._settings
        try:
            # No other service is asked within a transaction: an engine makes such features later.
            is_remote = settings.embedding == "openai"
            indexer = None if is_remote else open_indexer(embedding_choice(settings).for_documents())
        except ModelUnusable as error:
            raise SettingsError(f"IBEX_EMBEDDING={settings.embedding}: {error}") from None
        self._store = open_store(settings, indexer)
        return SessionExtraction(
            self._opened_database(), self._store, StaticTable.load(), self._extractor, settings.worker_turns
        )

    def _opened_database(self) -> Database:
        if self._database is None:
            self._database = Database(store_url(self._settings), connections=1)
        return self._database


def open_extractor(settings: WorkerSettings) -> Extractor:
    """Raises SettingsError."""
    redacted = ALWAYS | PII if settings.redact_pii else ALWAYS
    if settings.extractor == "rules":
        return RuleExtractor(redacted)
    if not (settings.llm_url.startswith(("http://", "https://")) and settings.llm_model):
        raise SettingsError("IBEX_EXTRACTOR=llm needs IBEX_LLM_URL (http:// or https://) and IBEX_LLM_MODEL")
    if settings.llm_timeout_s >= settings.worker_limit_s:
        raise SettingsError("IBEX_LLM_TIMEOUT_S must be below IBEX_WORKER_LIMIT_S, which ends the whole task")
    endpoint = LlmEndpoint(
        settings.llm_url,
        settings.llm_model,
        settings.llm_key.get_secret_value(),
        settings.llm_timeout_s,
        settings.llm_input_price,
        settings.llm_output_price,
    )
    return LlmExtractor(endpoint, redacted)
