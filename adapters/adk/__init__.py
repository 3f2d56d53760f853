"""What Google ADK services plug in: the session service on Redis.

Everything here needs the extra `adk`. The names below are the public ones; the modules behind them
may change.
"""

from __future__ import annotations

from adapters.adk.session_service import RedisSessionService

__all__ = ["RedisSessionService"]
