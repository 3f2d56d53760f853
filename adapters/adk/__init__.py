"""What Google ADK services plug in: sessions on Redis, chats on shared runners, recovery, a plugin.

Everything here needs the extra `adk`. The names below are the public ones; the modules behind them
may change.
"""

from __future__ import annotations

from adapters.adk.chat import Chat
from adapters.adk.plugin import LifecyclePlugin
from adapters.adk.recovery import (
    archive_session,
    get_recovery_store,
    load_archived_session,
    purge_archived_session,
    restore_session,
)
from adapters.adk.runtime import AdkRuntime
from adapters.adk.session_service import RedisSessionService

__all__ = [
    "AdkRuntime",
    "Chat",
    "LifecyclePlugin",
    "RedisSessionService",
    "archive_session",
    "get_recovery_store",
    "load_archived_session",
    "purge_archived_session",
    "restore_session",
]
