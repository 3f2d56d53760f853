"""The data of the chats of a runtime: found, made, saved, let go and deleted.

Whether a conversation survives its chat is decided here and nowhere else: it does where the session
service keeps it, or where its transcript was saved before it left memory; it does not where it is
ephemeral, or was to be deleted.
"""

from __future__ import annotations

import contextlib
from typing import Literal

from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.sessions import BaseSessionService, InMemorySessionService

from adapters.adk.live_sessions import Identity
from adapters.adk.recovery import (
    WITHOUT_EVENTS,
    archive_session,
    get_recovery_store,
    keeps_in_memory,
    load_archived_session,
)
from adapters.adk.session_service import RedisSessionService
from adapters.host import Host
from store.errors import PolicyError
from store.recovery import RecoveryStore


class Conversations:
    """The conversations behind the chats of one runtime.

    Args:
        host: whose process saves them.
        service: that keeps them while they are in use, or for ever.
        recovery: where they are saved; None is beside the host's log, False nowhere.
        ephemeral: they go with their chats.

    Raises:
        PolicyError: they would be lost, and nobody said that this is meant.
    """

    def __init__(
        self,
        host: Host,
        service: BaseSessionService,
        recovery: RecoveryStore | Literal[False] | None,
        *,
        ephemeral: bool,
    ) -> None:
        self._in_memory = keeps_in_memory(service)
        if recovery is False and not ephemeral and self._in_memory:
            raise PolicyError(
                "recovery=False with a service that keeps sessions in memory would lose every chat "
                "that goes idle; if that is meant, say ephemeral=True"
            )
        self._host = host
        self._service = service
        self._recovery = get_recovery_store(host) if recovery is None else recovery or None
        self._ephemeral = ephemeral

    async def find(self, identity: Identity) -> None:
        """Makes sure that the ADK session is there: as it is, brought back, or new."""
        app, user, chat = identity
        if isinstance(self._service, RedisSessionService):
            self._service.note_uses_of(self._host)
        if self._recovery is not None and self._in_memory:
            held = await load_archived_session(
                self._recovery, self._service, app_name=app, user_id=user, session_id=chat
            )
        else:
            held = await self._service.get_session(
                app_name=app, user_id=user, session_id=chat, config=WITHOUT_EVENTS
            )
        if held is None:
            # Another process may have made it in between; then it is there.
            with contextlib.suppress(AlreadyExistsError):
                await self._service.create_session(app_name=app, user_id=user, session_id=chat)

    async def save(self, identity: Identity, agent: str | None) -> None:
        """Writes the recovery record, with the transcript where only this process has it.

        Raises:
            NotJson, TooLarge, RedisUnavailable: see `archive_session`.
        """
        if self._recovery is None or self._ephemeral:
            return
        app, user, chat = identity
        await archive_session(
            self._recovery,
            self._service,
            app_name=app,
            user_id=user,
            session_id=chat,
            agent=agent,
            process=self._host.process,
        )

    async def let_go(self, identity: Identity) -> None:
        """Frees what this process keeps of a conversation that was saved."""
        if self._ephemeral or self._in_memory:
            await self._delete_session(identity)
        elif isinstance(self._service, RedisSessionService):
            self._service.forget_session(*identity)

    async def delete(self, identity: Identity) -> None:
        """Deletes a conversation, its recovery record included."""
        app, user, chat = identity
        await self._delete_session(identity)
        if self._recovery is not None:
            await self._recovery.purge(app, user, chat)

    async def _delete_session(self, identity: Identity) -> None:
        app, user, chat = identity
        await self._service.delete_session(app_name=app, user_id=user, session_id=chat)
        if isinstance(self._service, InMemorySessionService):
            # ADK keeps an empty dict for each user it ever had.
            users = self._service.sessions.get(app, {})
            if not users.get(user, True):
                del users[user]
