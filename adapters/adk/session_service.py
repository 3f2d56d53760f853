"""`RedisSessionService`: ADK sessions in Redis, each a stream of its events and a hash of its state.

One append is one script call that checks the writer's copy, writes event and state, all or nothing,
and touches no earlier event. Opening a session is one call that answers with the state and the events
this process has not seen. It gives the answers of ADK's in-memory service, but for what
docs/session-service.md lists. Before changing it read `Session._storage_update_marker` in ADK's
database service: here the marker is `incarnation/entry id of the last event`.
"""

from __future__ import annotations

import secrets
from typing import Any, Self

from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.events.event import Event
from google.adk.platform import time as platform_time
from google.adk.platform import uuid as platform_uuid
from google.adk.sessions.base_session_service import (
    BaseSessionService,
    GetSessionConfig,
    ListSessionsResponse,
)
from google.adk.sessions.session import Session

from adapters.adk.live_sessions import Identity
from adapters.adk.loop_stores import LoopStores
from adapters.adk.service_host import APPEND_SPACING, LifecycleCallback, ServiceHost
from adapters.adk.session_cache import START, CachedSession, Position, SessionCache, number_of
from adapters.adk.session_codec import encode_state, merged_state, shared_state
from adapters.adk.session_options import Ephemeral, Options, TimeToLive
from adapters.adk.session_writer import SessionWriter, marker_of
from adapters.adk.stored_sessions import StoredSessions
from adapters.host import Host, check_host
from store.connection import shown
from store.keys import Keys, SessionKeys

_GONE = "its conversation is gone: it expired, or was deleted or archived elsewhere"


class RedisSessionService(BaseSessionService):
    """An ADK session service on Redis.

    The constructor does no I/O; the connection is made by the first call, one for each event loop
    that uses the service, and ends with that loop or with `close`.

    Args:
        url: `redis://…`, `redis+cluster://…`, `embedded://PATH`, …; see `store.connect`. A prefix
            `agent-reconciler+` is allowed, and every option but a mapping can stand in the query.
        namespace: keeps apart what shares a Redis; 1 to 64 of `A-Z a-z 0-9 _ . -`.
        uri: the same as `url`, under the name by which ADK's service registry gives it.
        cache_bytes: memory for events this process has seen, about; least recently used sessions go
            first. 0 remembers nothing.
        share_events: returned sessions hold the very events of the cache, which nobody may change
            then. By default each event is copied when it is looked at.
        accept_stale: an append through a copy that lacks events others appended goes through, as in
            ADK's in-memory service. By default it is refused with StaleSessionError.
        ttl: seconds after its last use (create, open, append, or a run that is on) at which a session
            is dropped, for all apps or by app name; None keeps sessions for ever.
        max_event_bytes: the most that one event, or the state of one call, may take as JSON.
        on_lifecycle: called, in the event loop, when a session is created, opened and deleted. It must
            not block; what it raises is logged and goes no further.
        host: looks after the sessions: they are resources of it while this process uses them.
        name: without a host, the service starts one of this name in the first loop that uses it.
        ephemeral: conversations go with their sessions when the reconciler tears these down; for all
            apps, or for those named.
        agents_dir: given by the ADK command line, not used.

    Raises:
        BadAddress: the address cannot be used.
        NamespaceError: the namespace has a name that cannot be.
        PolicyError: a ttl that is not positive.
    """

    def __init__(
        self,
        url: str | None = None,
        namespace: str | None = None,
        *,
        uri: str | None = None,
        cache_bytes: int | None = None,
        share_events: bool | None = None,
        accept_stale: bool | None = None,
        ttl: TimeToLive = None,
        max_event_bytes: int | None = None,
        on_lifecycle: LifecycleCallback | None = None,
        host: Host | None = None,
        name: str | None = None,
        ephemeral: Ephemeral | None = None,
        agents_dir: str | None = None,
    ) -> None:
        del agents_dir
        self._options = options = Options.read(
            url,
            uri,
            namespace=namespace,
            cache_bytes=cache_bytes,
            share_events=share_events,
            accept_stale=accept_stale,
            ttl=ttl,
            max_event_bytes=max_event_bytes,
            name=name,
            ephemeral=ephemeral,
        )
        self.url = shown(options.url)
        self.namespace = options.namespace
        self._keys = Keys(self.namespace)
        self._cache = SessionCache(options.cache_bytes)
        self._stores = LoopStores(options.url)
        self._stored = StoredSessions(self._stores, self._keys)
        self._writer = SessionWriter(self._stored, self._cache, options)
        own = None if host is not None else options.name
        if host is not None:
            check_host(host)
        self._host = ServiceHost(
            host, own, self.namespace, self._stores, self._end_resource, self._still_used
        )
        self.on_lifecycle = on_lifecycle

    async def close(self) -> None:
        """Closes the connections and stops an embedded server that this service started.

        The service can be used again afterwards; it connects anew.
        """
        await self._host.stop()
        await self._stores.close()

    @property
    def host(self) -> Host | None:
        """The host that looks after the sessions, if one does."""
        return self._host.host

    @property
    def on_lifecycle(self) -> LifecycleCallback | None:
        """Called when a session is created, opened or gone; see the class."""
        return self._host.on_lifecycle

    @on_lifecycle.setter
    def on_lifecycle(self, callback: LifecycleCallback | None) -> None:
        self._host.on_lifecycle = callback

    async def __aenter__(self) -> Self:
        await self._stores.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # --- sessions -------------------------------------------------------------------------------

    async def create_session(
        self,
        *,
        app_name: str,
        user_id: str,
        state: dict[str, Any] | None = None,
        session_id: str | None = None,
    ) -> Session:
        """Creates a session.

        Args:
            app_name: any text.
            user_id: any text.
            state: its first state; `app:` and `user:` keys go where they are shared, `temp:` is
                dropped.
            session_id: any text, without the blanks around it; None or blank makes one up.

        Returns:
            The session as it is stored, with the app's and the user's state.

        Raises:
            AlreadyExistsError: there is such a session; nothing was changed.
            NotJson, TooLarge: the state cannot be stored; nothing was.
            RedisUnavailable: Redis does not answer.
        """
        session_id = (session_id.strip() if session_id else "") or platform_uuid.new_uuid()
        doing = f"create_session of session/{session_id}"
        delta = encode_state(state or {}, where=doing, limit=self._options.max_event_bytes)
        await self._host.ready((app_name, user_id, session_id))
        keys = self._session_keys(app_name, user_id, session_id)
        # Not from ADK's provider, which a test or a replay may make repeat itself.
        incarnation = secrets.token_hex(8).encode()
        now = platform_time.get_time()
        shared = await self._stored.create(
            keys,
            incarnation,
            (_bytes(user_id), _bytes(session_id)),
            now,
            delta,
            ttl=self._options.ttl_ms(app_name),
            ephemeral=self._options.is_ephemeral(app_name),
            doing=doing,
        )
        if shared is None:
            raise AlreadyExistsError(f"Session with id {session_id} already exists.")
        own = dict(zip(delta.session[::2], delta.session[1::2], strict=True))
        session = Session(
            app_name=app_name,
            user_id=user_id,
            id=session_id,
            state=merged_state(own, *shared),
            last_update_time=now,
        )
        session._storage_update_marker = marker_of(incarnation, START)
        with self._cache.lock:
            self._cache.put(keys.session, CachedSession(incarnation))
        self._host.tell("created", _identity(session))
        return session

    async def get_session(
        self,
        *,
        app_name: str,
        user_id: str,
        session_id: str,
        config: GetSessionConfig | None = None,
    ) -> Session | None:
        """Opens a session: its state, and its events, of which only new ones are read from Redis.

        Args:
            app_name: of the session.
            user_id: of the session.
            session_id: of the session.
            config: limits the events; those beyond a limit are not read.

        Returns:
            The session, or None when there is none of that name.

        Raises:
            MalformedEntry: an event that this version of ADK cannot read.
            RedisUnavailable: Redis does not answer.
        """
        session_id = session_id.strip() if session_id else session_id
        doing = f"get_session of session/{session_id}"
        await self._host.ready((app_name, user_id, session_id))
        keys = self._session_keys(app_name, user_id, session_id)
        wanted = config.num_recent_events if config else None
        after = config.after_timestamp if config else None
        with self._cache.lock:
            known = self._cache.get(keys.session)
            position = known.position if known else Position()
        opened = await self._stored.open(
            keys, position, wanted, after, ttl=self._options.ttl_ms(app_name), doing=doing
        )
        if opened is None:
            with self._cache.lock:
                self._cache.drop(keys.session)
            if known is not None or self._host.knows((app_name, user_id, session_id)):
                # It expired, was archived, or was deleted elsewhere: here is where it is noticed.
                self._host.tell("cleaned_up", (app_name, user_id, session_id), _GONE)
            return None
        with self._cache.lock:
            if fresh := known is None or not opened.follows:
                known = CachedSession.of(opened.incarnation, opened.last, opened.entries)
            else:
                known.extend(opened.entries)
            self._cache.remember(keys.session, known)
            events = known.events(
                number_of(opened.last),
                wanted,
                after,
                where=f"session/{session_id}",
                # Nobody else has what is not in the cache and never was.
                share=self._options.share_events
                or (fresh and self._cache.get(keys.session) is not known),
            )
        session = Session(
            app_name=app_name,
            user_id=user_id,
            id=session_id,
            state=merged_state(opened.own, *opened.shared),
            last_update_time=float(opened.own[b"at"]),
        )
        session.events = events
        session._storage_update_marker = marker_of(opened.incarnation, opened.last)
        self._host.tell("reused", _identity(session))
        return session

    async def list_sessions(
        self, *, app_name: str, user_id: str | None = None
    ) -> ListSessionsResponse:
        """Lists sessions with their state and without events, which are not read.

        Args:
            app_name: of the sessions.
            user_id: only those of this user; None lists all users'.

        Returns:
            The sessions by last update time, then user, then id.

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        doing = f"list_sessions of app {app_name}"
        sessions = []
        for own, shared in await self._stored.listed(
            self._keys.app_sessions(app_name), user_id, doing=doing
        ):
            session = Session(
                app_name=app_name,
                user_id=_text(own[b"user"]),
                id=_text(own[b"id"]),
                state=merged_state(own, *shared),
                last_update_time=float(own[b"at"]),
            )
            session._storage_update_marker = marker_of(own[b"incarnation"], own[b"last"])
            sessions.append(session)
        sessions.sort(key=lambda session: (session.last_update_time, session.user_id, session.id))
        return ListSessionsResponse(sessions=sessions)

    async def delete_session(self, *, app_name: str, user_id: str, session_id: str) -> None:
        """Deletes a session and its events, if there is one. App and user state stay.

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        session_id = session_id.strip() if session_id else session_id
        keys = self._session_keys(app_name, user_id, session_id)
        doing = f"delete_session of session/{session_id}"
        deleted = await self._stored.delete(keys, doing=doing)
        with self._cache.lock:
            self._cache.drop(keys.session)
        if deleted:
            self._host.tell("cleaned_up", (app_name, user_id, session_id))

    def note_uses_of(self, host: Host) -> None:
        """From now on sessions that this host has in use are noted as used, so that none of them is ended.

        `AdkRuntime` and `LifecyclePlugin` call it; whoever marks sessions as in use by other means may.
        """
        self._host.watch(host)

    def forget_session(self, app_name: str, user_id: str, session_id: str) -> None:
        """Drops what this process remembers of a session. The conversation stays in Redis."""
        keys = self._session_keys(app_name, user_id, session_id.strip())
        with self._cache.lock:
            self._cache.drop(keys.session)

    async def get_user_state(self, *, app_name: str, user_id: str) -> dict[str, Any]:
        """The state that all sessions of a user share, its keys without `user:`.

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        app = self._keys.app_sessions(app_name)
        doing = f"get_user_state of user {user_id}"
        return shared_state(await self._stored.user_state(app, user_id, doing=doing))

    # --- append ---------------------------------------------------------------------------------

    async def append_event(self, session: Session, event: Event) -> Event:
        """Appends an event, and applies its state change, to the stored session and to `session`.

        Delivering an equal event again changes nothing. An event that failed to be appended can be
        given again, also when it is not known whether it was stored. On any error the stored session,
        `session` and `event` are as they were.

        Args:
            session: as this service returned it. Several tasks of one event loop may append through
                the same object at once.
            event: a partial one is returned and not stored.

        Returns:
            The event, without its `temp:` state, which only `session` gets.

        Raises:
            SessionNotFoundError: there is no such session, or no longer.
            StaleSessionError: somebody else appended since `session` was loaded; load it again.
            NotJson, TooLarge: the event, or a value of its state change, cannot be stored.
            RedisUnavailable: Redis does not answer.
        """
        if event.partial:
            return event
        keys = self._session_keys(session.app_name, session.user_id, session.id)
        async with self._stores.of_this_loop().lock(keys.session):
            stored = await self._writer.append(keys, session, event)
            if stored is None:
                return event
            self._host.note_use(_identity(session), spacing=APPEND_SPACING)
            return self._commit(session, event, *stored)

    def _commit(self, session: Session, event: Event, incarnation: bytes, entry_id: bytes) -> Event:
        """Does to the caller's session what was done to the stored one."""
        self._apply_temp_state(session, event)
        event = self._trim_temp_delta_state(event)
        session.last_update_time = event.timestamp
        session._storage_update_marker = marker_of(incarnation, entry_id)
        return self._commit_event_to_session(session, event)

    def _session_keys(self, app: str, user: str, session: str) -> SessionKeys:
        return self._keys.app_sessions(app).session(user, session)

    async def _end_resource(self, identity: Identity) -> None:
        """The teardown of a session: the conversation stays, unless the app is ephemeral."""
        app, user, session = identity
        if self._options.is_ephemeral(app):
            await self.delete_session(app_name=app, user_id=user, session_id=session)
        else:
            self.forget_session(*identity)

    async def _still_used(self, identities: list[Identity]) -> None:
        """Sessions of this process are in use, whether or not anything is appended to them."""
        used = [(self._session_keys(*one), self._options.ttl_ms(one[0])) for one in identities]
        await self._stored.touch(used, doing="noting sessions that are in use")


def _identity(session: Session) -> Identity:
    return session.app_name, session.user_id, session.id


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")
