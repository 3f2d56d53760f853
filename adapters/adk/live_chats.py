"""The chats that a runtime has, in every map in which they stand: found, added and removed in one tick.

`chats` holds them by name, least recently used first; `user_chats` says which are whose. A chat is known
by app, user and id; its name is the id, unless another user's chat of that id is here too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from adapters.adk.chat import LiveChat
from adapters.adk.live_sessions import Identity, LiveSession, LiveSessions, session_ref, short
from adapters.entry import Entry
from adapters.host import Host


class LiveChats:
    """The registries of the chats of one runtime.

    Args:
        host: of the registries.
        app_name: of the ADK sessions, and in the names of the registries.
        callbacks: of the registry of chats: `save` and `teardown`.

    Attributes:
        chats: name -> chat, least recently used first.
        user_chats: user -> names.
    """

    def __init__(self, host: Host, app_name: str, **callbacks: Any) -> None:
        self._host = host
        self._app_name = app_name
        self.chats = host.registry(
            "session",
            name=f"{app_name} chats",
            uses=lambda _, live: live.uses(),
            user=lambda _, live: live.identity[1],
            **callbacks,
        )
        self.user_chats = host.index(f"{app_name} user_chats", "session")
        self._doubled = 0

    def has(self, live: LiveChat, entry: Entry) -> bool:
        """This very chat is still here."""
        return self.chats.get(entry.key) is live

    def add(self, identity: Identity, ref: str) -> Entry:
        """A chat comes alive."""
        held = self._host.entries.get(ref)
        if held is not None and isinstance(held.obj, LiveSession):
            # Somebody used the session without us; from now on the runtime looks after it.
            LiveSessions.of(self._host).gone(identity)
        name = ref.partition("/")[2]
        self._doubled += name != identity[2]
        self.chats[name] = LiveChat(identity)
        user = identity[1]
        self.user_chats[user] = (*self.user_chats.get(user, ()), name)
        return self._host.entries[ref]

    def touch(self, live: LiveChat, entry: Entry) -> None:
        """It is the most recently used now."""
        live.last_used = time.monotonic()
        # To the end of the dict; nothing else changes, and nobody needs to hear of it.
        dict.__setitem__(self.chats, entry.key, dict.pop(self.chats, entry.key))

    def find(self, chat_id: str, user_id: str | None) -> tuple[LiveChat, Entry] | None:
        """A chat by its id, and its user where ids are shared.

        Raises:
            ValueError: several users have a chat of this id, and none was named.
        """
        if user_id is None:
            plain = self.chats.get(short(chat_id))
            # Only where ids are shared is it worth to look at all.
            chats = self.chats.values() if self._doubled else [plain] if plain else []
            users = {live.identity[1] for live in chats if live.identity[2] == chat_id}
            if len(users) > 1:
                raise ValueError(f"several users have a chat {chat_id}: say whose, user_id=")
            if not users:
                return None
            (user_id,) = users
        entry = self._host.entries.get(session_ref(self._host, (self._app_name, user_id, chat_id)))
        if entry is None or not self.has(entry.obj, entry):
            return None
        return entry.obj, entry

    def remove(self, live: LiveChat, reason: str | None = None) -> None:
        """Takes a chat out of all maps."""
        _, user, chat = live.identity
        ref = session_ref(self._host, live.identity)
        name = ref.partition("/")[2]
        if self.chats.get(name) is not live:
            return
        entry = self._host.entries.get(ref)
        if entry is not None and reason is not None:
            self._host.forget(entry, reason=reason)
        self.chats.pop(name)
        self._doubled -= name != chat
        left = tuple(other for other in self.user_chats.get(user, ()) if other != name)
        if left:
            self.user_chats[user] = left
        else:
            self.user_chats.pop(user, None)

    def release(self, runner: str) -> None:
        """No chat keeps this runner, unless it is open with it: the next use finds another."""
        for name, live in self.chats.items():
            if live.last_runner == runner and runner not in live.runners:
                live.last_runner = None
                entry = self._host.entries.get(f"session/{name}")
                if entry is not None and not entry.terminating:
                    self._host.link(entry.ref, uses=live.uses())

    def leaving(self, names: Iterable[str], but: str) -> Entry | None:
        """One of these that is being ended already, for another reason than this one."""
        entries = (self._host.entries.get(f"session/{name}") for name in names)
        return next((e for e in entries if e and e.terminating and e.terminating != but), None)
